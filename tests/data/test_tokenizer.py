"""Vocabularies: normalisation alone loses text, and every figure about ids is exact."""

import dataclasses
import io
import os
import pickle
import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from configs import base
from pretraining.data import piece_model, tokenizer
from pretraining.data.row import SENTENCE_START, WORD_START
from pretraining.errors import UserError

TEXTS = [topics[name] for name in sorted(topics)[:25]] + ["中文没有空格。日本語も同じです。"] * 20
NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
PARTS = [  # compatibility forms, combining marks, joiners, right to left, controls, ...
    *("word", "Straße", "ﬁne", "½", "Ω", "한국어", "中文", "ไทย", "ｆｕｌｌ",
      "İ", "Ǆ", "א", "ب", "ﷺ"),
    *("é", "e\u0301", "a\u0328\u0301", "\u0301", "👩\u200d👩\u200d👧",
      "🇫🇷", "\ufffd", "\u200b", "\u200f"),
    *("\u00a0", "\u3000", "\u2028", "\x00", "\x07", "\x7f", "\x85", "\ufeff",
      "\U0010fffd", "\u00ad"),
    *("▁", "▁▁", "[MASK]", "[CLS]", "[SEP]", "[PAD]", "<s>", "<unk>", "<0x41>", "\u2585", "⁇"),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "\x0b"),
]  # fmt: skip


def nasty_texts():
    draw = random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randrange(1, 12))) for _ in range(400)]
    return ["", " ", "▁", "\n", " x ", "▁▁x▁", *PARTS, *texts]


def tokenizer_config(**changes):
    config = base.get_config().tokenizer
    config.update({"size": 900, **changes})
    return config


@pytest.fixture(scope="module")
def vocabularies():
    made = {}

    def make(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = tokenizer.train(TEXTS, tokenizer_config(**changes))
        return made[key]

    return make


@pytest.fixture(scope="module")
def vocabulary(vocabularies):
    return vocabularies()


def fails(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_special_ids(vocabularies, kind):
    vocabulary = vocabularies(kind=kind)
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    assert proto.trainer_spec.model_type == proto.trainer_spec.ModelType.Value(kind.upper())
    ids = [getattr(vocabulary, role) for role in piece_model.ROLES]
    assert ids == [0, 1, 2, 3, 2, 3, 4]
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    assert vocabulary.pieces(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocabulary.size == 900 == len(set(vocabulary.pieces(range(900))))
    text = "[MASK] [CLS]a[SEP] [PAD] <s> </s> [UNK] <0x41>"
    assert not set(vocabulary.special_ids) & set(vocabulary.encode(text))
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([2, *vocabulary.encode("a b"), 4, 3]) == "a b"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", NORMALIZATIONS)
def test_round_trip(vocabularies, rule, kind):
    vocabulary = vocabularies(kind=kind, normalization=rule)
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=rule,
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=rule != "identity",
    )
    for text in nasty_texts():
        text_with_spaces = text.replace("▁", " ")
        expected = normalizer.normalize(text_with_spaces)
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == expected == vocabulary.normalize(text)
        if rule == "identity":
            assert expected == text_with_spaces
        assert vocabulary.bytes_per_id[ids].sum() == len(expected.encode()) + (len(ids) > 0)
        assert not set(ids) & set(vocabulary.special_ids)
        assert vocabulary.encode_document(text)[0].tolist() == ids


def test_newlines(vocabularies):
    for rule in ("identity", "nfkc", "nfkc_cf"):
        vocabulary = vocabularies(normalization=rule)
        newline = [i for i in range(900) if "\n" in vocabulary.pieces([i])[0]]
        assert vocabulary.pieces(newline) == ["\n"]
        assert vocabulary.encode("one\n\ntwo.\n").count(newline[0]) == 3
    assert vocabularies().normalize("one\n\n two") == "one two"


def test_scores_add_up_exactly(vocabularies):
    """Whatever stands before a run of equal characters, it is cut in the same way."""
    vocabulary = vocabularies(normalization="nfkc", character_coverage=1.0, byte_fallback=False)
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    scores = np.array([piece.score for piece in proto.pieces])
    assert np.array_equal(scores * 64, np.round(scores * 64))
    assert len(set(scores.tolist())) > 100
    assert not [piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    for run in ("-" * 23, "=" * 31, "aa" * 20):
        alone = vocabulary.encode(run)
        for before in ("a line\n" * 50, "some words, " * 999):
            assert vocabulary.encode(f"{before} {run}")[-len(alone) :] == alone


def test_bytes_per_id(vocabulary):
    pieces = vocabulary.pieces(range(vocabulary.size))
    assert not vocabulary.bytes_per_id[:5].any()
    assert (vocabulary.bytes_per_id[5:261] == 1).all()
    assert pieces[5:261] == [f"<0x{i:02X}>" for i in range(256)]
    for wanted, length in (("▁the", 4), ("ing", 3), ("▁", 1), ("中", 3)):
        assert vocabulary.bytes_per_id[pieces.index(wanted)] == length
    assert vocabulary.bytes_per_id.dtype == np.int32


def test_empty_documents(vocabulary):
    for text in ("", " \n\t", "\x00"):
        ids, boundary = vocabulary.encode_document(text)
        assert ids.size == boundary.size == len(vocabulary.encode(text))
    assert vocabulary.encode(" \n\t") == []


def test_save_and_load(vocabulary, tmp_path):
    counted = vocabulary.with_counts(np.arange(900)[::-1])
    counted.save(tmp_path / "v")
    loaded = tokenizer.Vocabulary.load(str(tmp_path / "v"))
    for field in dataclasses.fields(loaded):
        assert np.array_equal(getattr(loaded, field.name), getattr(counted, field.name))
    assert loaded.unigram_counts.dtype == np.int64
    assert loaded.fingerprint == vocabulary.fingerprint
    assert pickle.loads(pickle.dumps(loaded)).encode("a b") == vocabulary.encode("a b")


def test_a_saved_vocabulary_is_a_model_too(vocabulary, tmp_path):
    vocabulary.with_counts(np.arange(900)).save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = tokenizer.load_model(path)
        for field in dataclasses.fields(loaded):
            assert np.array_equal(getattr(loaded, field.name), getattr(vocabulary, field.name))
    other = dataclasses.replace(vocabulary, mask=7, special_ids=(0, 1, 2, 3, 7))
    other.save(tmp_path)
    assert tokenizer.load_model(tmp_path).fingerprint == other.fingerprint


def test_a_text_that_goes_on(vocabularies):
    """No space is put before it, and nothing starts there."""
    for rule in NORMALIZATIONS:
        for kind in ("unigram", "bpe"):
            vocabulary = vocabularies(kind=kind, normalization=rule)
            for text in ("the statement. Another one", "s", ". It", "ing of", "中文"):
                ids, boundary = vocabulary.encode_document(text, continues=True)
                normal = vocabulary.normalize(text)
                assert vocabulary.bytes_per_id[ids].sum() == len(normal.encode())
                assert vocabulary.decode([*vocabulary.encode("un"), *ids]) == "un" + normal
                assert not boundary[0] & SENTENCE_START
                assert bool(boundary[0] & WORD_START) == vocabulary.word_start[ids[0]]
                words, sentences = (vocabulary.encode_document(text)[1] & bit for bit in (1, 2))
                assert (boundary & 1 > 0).sum() == (words > 0).sum() - 1
                assert (boundary & 2 > 0).sum() == (sentences > 0).sum() - 1
            whole = vocabulary.encode("the statement of")
            (the,) = vocabulary.encode("the")
            assert [the, *vocabulary.encode_document(" statement of", True)[0]] == whole


def test_special_ids_are_saved(vocabulary, tmp_path):
    other = dataclasses.replace(vocabulary, mask=7, cls=None, special_ids=(0, 1, 2, 3, 7))
    other.save(tmp_path)
    loaded = tokenizer.Vocabulary.load(tmp_path)
    assert (loaded.mask, loaded.cls, loaded.special_ids) == (7, None, (0, 1, 2, 3, 7))
    assert other.fingerprint != vocabulary.fingerprint


def test_counts_have_one_entry_per_id(vocabulary):
    with pytest.raises(ValueError, match=r"\(3,\), expected \(900,\)"):
        vocabulary.with_counts(np.zeros(3))


@pytest.mark.parametrize("name", ["tokenizer.model", "unigram_counts.npy", "vocabulary.json"])
def test_damaged_files_are_named(vocabulary, tmp_path, name):
    vocabulary.save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    damages = [content[:-9], content[:50] + b"#" + content[51:], b"", b"{}", b"[]", b"\xff"]
    for damage in damages:
        path.write_bytes(damage)
        assert name in fails(tokenizer.Vocabulary.load, tmp_path)
    path.unlink()
    assert name in fails(tokenizer.Vocabulary.load, tmp_path)


def test_changed_special_ids_are_noticed(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    path.write_text(path.read_text().replace('"mask": 4', '"mask": 5'))
    assert "vocabulary.json is damaged" in fails(tokenizer.Vocabulary.load, tmp_path)


def test_fingerprint(vocabularies, vocabulary):
    assert vocabulary.with_counts(np.ones(900)).fingerprint == vocabulary.fingerprint
    assert vocabularies(size=600).fingerprint != vocabulary.fingerprint


def foreign_model(path, **settings):
    """A .model that another project might have trained."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(path),
        vocab_size=600,
        minloglevel=2,
        **settings,
    )
    return f"{path}.model"


def test_load_model_with_its_own_ids(tmp_path):
    path = foreign_model(tmp_path / "t5", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    loaded = tokenizer.load_model(path)
    ids = [getattr(loaded, role) for role in piece_model.ROLES]
    assert ids == [0, 2, None, 1, None, 1, None]
    assert loaded.special_ids == (0, 1, 2)
    assert loaded.size == 600

    loaded = tokenizer.load_model(foreign_model(tmp_path / "llama"))
    ids = [getattr(loaded, role) for role in piece_model.ROLES]
    assert ids == [None, 0, 1, 2, 1, 2, None]

    path = foreign_model(
        tmp_path / "xlnet", control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]
    )
    loaded = tokenizer.load_model(path)
    ids = [getattr(loaded, role) for role in piece_model.ROLES]
    assert ids == [5, 0, 1, 2, 3, 4, 6]
    assert loaded.special_ids == (0, 1, 2, 3, 4, 5, 6, 7)

    symbols = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    path = foreign_model(tmp_path / "bert", bos_id=-1, eos_id=-1, control_symbols=symbols)
    loaded = tokenizer.load_model(path)
    assert (loaded.bos, loaded.eos, loaded.cls, loaded.sep, loaded.mask) == (2, 3, 2, 3, 4)


def test_a_learned_piece_is_no_special_one(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[MASK] [CLS] <mask>"] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        add_dummy_prefix=False,
        split_by_unicode_script=False,
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    loaded = tokenizer.load_model(tmp_path / "a.model")
    assert "[MASK]" in loaded.pieces(range(loaded.size))
    assert loaded.mask is None
    assert loaded.special_ids == (0, 1, 2)


def test_unused_pieces_are_special(vocabulary, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    proto.pieces[300].type = proto.SentencePiece.UNUSED
    (tmp_path / "a.model").write_bytes(proto.SerializeToString())
    loaded = tokenizer.load_model(tmp_path / "a.model")
    assert loaded.special_ids == (0, 1, 2, 3, 4, 300)
    assert loaded.bytes_per_id[300] == 0 < vocabulary.bytes_per_id[300]


def test_wrong_models(vocabulary, tmp_path):
    assert "none.model" in fails(tokenizer.load_model, tmp_path / "none.model")
    for content in (b"", b"text", vocabulary.model[:-5]):
        (tmp_path / "a.model").write_bytes(content)
        message = fails(tokenizer.load_model, tmp_path / "a.model")
        assert "config.tokenizer.model=" in message
        assert "a.model' is no SentencePiece model" in message
    path = foreign_model(tmp_path / "suffix", treat_whitespace_as_suffix=True)
    assert "spaces after words" in fails(tokenizer.load_model, path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"kind": "word"}, "config.tokenizer.kind='word': allowed are unigram, bpe"),
        ({"normalization": "nfd"}, "config.tokenizer.normalization='nfd': allowed are nmt_nfkc"),
        ({"character_coverage": 0.9}, "config.tokenizer.character_coverage=0.9: allowed are 0.98"),
        ({"size": 100}, "config.tokenizer.size=100: special and byte pieces need 262"),
        ({"size": -1, "byte_fallback": False}, "config.tokenizer.size=-1"),
    ],
)
def test_wrong_config(changes, named):
    assert named in fails(tokenizer.train, TEXTS, tokenizer_config(**changes))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_sizes_in_errors_are_the_limits(kind, rule, capfd):
    texts = ["a few short words, few enough", "and\na second text"]
    train = lambda size: tokenizer.train(
        texts, tokenizer_config(kind=kind, normalization=rule, size=size)
    )
    message = fails(train, 5000)
    assert message.startswith("config.tokenizer.size=5000 is more than the corpus supports")
    largest = int(re.search(r"at most (\d+)", message)[1])
    assert train(largest).size == largest
    fails(train, largest + 1)
    message = fails(train, 262)
    assert "config.tokenizer.size=262 does not hold the characters" in message
    least = int(re.search(r"at least (\d+)", message)[1])
    assert train(least).size == least
    assert "does not hold" in fails(train, least - 1)
    assert capfd.readouterr() == ("", "")


def test_training_needs_text():
    assert "no text" in fails(tokenizer.train, ["", " \n"], tokenizer_config())


def test_training_does_not_depend_on_the_machine(vocabulary):
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        again = tokenizer.train(iter(TEXTS), tokenizer_config())
    finally:
        os.sched_setaffinity(0, cores)
    assert again.model == vocabulary.model
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    assert proto.trainer_spec.num_threads == 16


def test_sample_is_independent_of_order():
    draw = random.Random(0)
    once = [f"{i} " + "x" * draw.randrange(1, 300) for i in range(500)]
    documents = once + once[:50] + once[:20]
    size = sum(map(len, once))
    for limit in (0, 1, 1000, 10_000, size // 2, size - 1, size):
        first = tokenizer.sample(documents, limit)
        for _ in range(5):
            assert tokenizer.sample(draw.sample(documents, len(documents)), limit) == first
        # the longest beginning of the whole order that fits
        following = tokenizer.sample(documents, size)[: len(first) + 1]
        assert following[: len(first)] == first
        assert sum(map(len, first)) <= limit
        assert limit == size or sum(map(len, following)) > limit
    assert sorted(first) == sorted(once)


def test_sample_is_uniform():
    documents = [f"{i:05d}" for i in range(20_000)]
    chosen = np.array([int(text) for text in tokenizer.sample(documents, 25_000)])
    assert len(chosen) == 5000
    sd_of_the_mean = 20_000 / np.sqrt(12 * 5000)
    assert abs(chosen.mean() - 9999.5) < 4 * sd_of_the_mean
    assert abs((chosen % 2).mean() - 0.5) < 4 * 0.5 / np.sqrt(5000)


def test_long_documents_are_sampled_in_parts():
    words = [f"wörd{i}" for i in range(3000)]
    letters = "".join(chr(0x4E00 + i) for i in range(9000))
    parts = tokenizer.sample([" \n".join(words), letters], 10**6)
    assert max(map(len, parts)) <= 4000
    assert sorted(" ".join(p for p in parts if p[0] == "w").split()) == sorted(words)
    assert sorted(len(p) for p in parts if p[0] != "w") == [1000, 4000, 4000]
