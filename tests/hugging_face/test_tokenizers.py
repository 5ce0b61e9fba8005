"""Exported tokenizers give our ids."""

import random

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from configs import base
from pretraining.data import tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import normalizers  # noqa: E402

from pretraining.hugging_face import charsmap  # noqa: E402
from pretraining.hugging_face import tokenizers as hugging_face  # noqa: E402

NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")


@pytest.fixture(scope="module")
def train(corpus):
    def train(**changes):
        config = base.get_config().tokenizer
        config.update({"size": 900, **changes})
        return tokenizer.train(corpus, config)

    return train


@pytest.fixture(scope="module")
def vocabulary(train):
    return train(character_coverage=1.0)


@pytest.fixture(scope="module")
def foreign_model(corpus):
    """A .model that another project might have trained, loaded."""

    def train(path, **settings):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_prefix=str(path), minloglevel=2, **settings
        )
        return tokenizer.load_model(f"{path}.model")

    return train


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", NORMALIZATIONS)
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_are_ours(
    tmp_path, kind, rule, byte_fallback, random_texts, ids_of, corpus, special, train
):
    vocabulary = train(
        kind=kind, normalization=rule, byte_fallback=byte_fallback, character_coverage=1.0
    )
    hugging_face.write(tmp_path, vocabulary, [vocabulary.cls], [vocabulary.sep])
    texts = [*random_texts(300, seed=len(rule)), *corpus[:10], *special]
    assert ids_of(tmp_path, texts) == [vocabulary.encode(text) for text in texts]


def test_ties_are_cut_alike_wherever_they_stand(tmp_path, vocabulary, ids_of):
    draw = random.Random(0)
    before = ["", "the ", "a paper. " * 30, "x1 " * 3000]
    runs = [draw.choice("-=.0a") * draw.randrange(2, 60) for _ in range(200)]
    texts = [draw.choice(before) + run for run in runs]
    hugging_face.write(tmp_path, vocabulary, [], [])
    assert ids_of(tmp_path, texts) == [vocabulary.encode(text) for text in texts]
    tails = [vocabulary.encode("x1 " * 3000 + run)[-len(vocabulary.encode(run)) :] for run in runs]
    assert tails == [vocabulary.encode(run) for run in runs]


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf"])
def test_every_sequence_of_the_table_is_normalised(rule, train):
    ours = sentencepiece.SentencePieceNormalizer(
        rule_name=rule,
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(train(normalization=rule).model)
    table = proto.normalizer_spec.precompiled_charsmap
    theirs = normalizers.Sequence(charsmap.normalizers(table))
    sequences = sorted(charsmap._sequences(charsmap._units(table)))
    assert len(sequences) > 225_000
    checked = [s for s in sequences[::41] if s != "▁" and not NEW.intersection(s)]
    assert [s for s in checked if theirs.normalize_str(s) != ours.normalize(s)] == []


NEW = {  # letters of Unicode 14 to 16, which the library's NFKC does not know
    chr(code)
    for first, last in (
        *((0xA7F1, 0xA7F4), (0x105C0, 0x105FF), (0x11380, 0x113FF), (0x16100, 0x1613F)),
        *((0x16D40, 0x16D7F), (0x1CCD6, 0x1CCF9), (0x1E030, 0x1E06D)),
    )
    for code in range(first, last + 1)
}


def test_frames(tmp_path, vocabulary):
    cls, sep = vocabulary.cls, vocabulary.sep
    one, two = vocabulary.encode("one"), vocabulary.encode("two words")
    cases = [  # BERT, GPT, XLNet
        ([cls], [sep], [cls, *one, sep], [cls, *one, sep, *two, sep]),
        ([cls], [], [cls, *one], [cls, *one, *two]),
        ([], [sep, cls], [*one, sep, cls], [*one, sep, *two, sep, cls]),
    ]
    for before, after, single, pair in cases:
        hugging_face.write(tmp_path, vocabulary, before, after, segments=True)
        written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert written.encode("one").ids == single
        encoding = written.encode("one", "two words")
        assert encoding.ids == pair
        first = len(pair) - len(two) - len(after)
        assert encoding.type_ids == [0] * first + [1] * (len(pair) - first)


def test_special_tokens_in_texts(tmp_path, vocabulary):
    hugging_face.write(tmp_path, vocabulary, [], [])
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    a, b, able = (vocabulary.encode(text) for text in ("is a", "this", "un"))
    assert written.encode(" is a [MASK] this ").ids == [*a, vocabulary.mask, *b]
    assert written.encode("un[MASK]").ids == [*able, vocabulary.mask]
    after = written.encode("[MASK]ing").tokens
    assert after[0] == "[MASK]"
    assert "".join(after[1:]) == "ing"


def test_transformers_opens_it(tmp_path, random_texts, corpus, special, train):
    transformers = pytest.importorskip("transformers")
    for kind, rule in (("unigram", "nmt_nfkc"), ("bpe", "nfkc"), ("unigram", "identity")):
        vocabulary = train(kind=kind, normalization=rule, character_coverage=1.0)
        cls, sep = vocabulary.cls, vocabulary.sep
        folder = tmp_path / kind / rule
        hugging_face.write(folder, vocabulary, [cls], [sep], max_length=77)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in [*random_texts(200), *special, *hugging_face.SAMPLES, corpus[0]]:
            ids = vocabulary.encode(text)
            plain = theirs(text, add_special_tokens=False, split_special_tokens=True)
            assert plain["input_ids"] == ids
            framed = theirs(text, split_special_tokens=True)
            assert framed["input_ids"] == [cls, *ids, sep]
            read = theirs.decode(ids, skip_special_tokens=False)
            assert read == vocabulary.decode(ids)
        assert "token_type_ids" not in framed
        assert (theirs.model_max_length, theirs.padding_side) == (77, "right")
        for role in tokenizer.ROLES:
            assert getattr(theirs, f"{role}_token_id") == getattr(vocabulary, role)


def test_our_own_folder_gives_the_same_vocabulary(tmp_path, vocabulary, random_texts, special):
    hugging_face.write(tmp_path, vocabulary, [2], [3])
    loaded = tokenizer.load_model(tmp_path)
    assert loaded.fingerprint == vocabulary.fingerprint
    (tmp_path / hugging_face.SENTENCEPIECE).unlink()
    loaded = tokenizer.load_model(tmp_path)
    assert loaded.kind == "tokenizers"
    for name in (*tokenizer.ROLES, "special_ids", "size"):
        assert getattr(loaded, name) == getattr(vocabulary, name)
    assert np.array_equal(loaded.bytes_per_id, vocabulary.bytes_per_id)
    assert np.array_equal(loaded.word_start, vocabulary.word_start)
    for text in [*random_texts(200), *special]:
        assert loaded.encode(text) == vocabulary.encode(text)
        assert loaded.normalize(text) == vocabulary.normalize(text)


def test_other_ids_are_refused(tmp_path, vocabulary, monkeypatch, fails):
    standard = lambda table: [normalizers.Precompiled(table)]
    monkeypatch.setattr(charsmap, "normalizers", standard)
    place = tmp_path / "new"
    message = fails(hugging_face.write, place, vocabulary, [2], [3])
    assert message.startswith("the tokenizer cannot be exported: '")
    monkeypatch.setattr(hugging_face, "SAMPLES", ())
    hugging_face.write(tmp_path / "unchecked", vocabulary, [2], [3])
    texts = ["fine", "\u1112\u1161\u11ab"]
    message = fails(hugging_face.write, place, vocabulary, [2], [3], texts=texts)
    assert "'\\u1112\\u1161\\u11ab' would have other ids" in message
    assert not place.exists()


def test_models_without_a_counterpart_are_refused(tmp_path, vocabulary, fails, foreign_model):
    place = tmp_path / "new"
    words = foreign_model(tmp_path / "a", model_type="char", vocab_size=80)
    assert "type CHAR" in fails(hugging_face.write, place, words, [], [])
    proto = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    proto.pieces[400].type = proto.SentencePiece.UNUSED
    (tmp_path / "b.model").write_bytes(proto.SerializeToString())
    unused = tokenizer.load_model(tmp_path / "b.model")
    assert "unused pieces" in fails(hugging_face.write, place, unused, [], [])
    symbols = foreign_model(
        tmp_path / "c", model_type="bpe", vocab_size=500, user_defined_symbols=["statement"]
    )
    assert "'statement' would have other ids" in fails(hugging_face.write, place, symbols, [], [])
    assert not place.exists()


def test_foreign_models(tmp_path, random_texts, ids_of, foreign_model):
    """XLNet's settings among them."""
    settings = [
        dict(user_defined_symbols=["<eop>", ".", "(", ")"], control_symbols=["<cls>", "<sep>"]),
        dict(add_dummy_prefix=False, model_type="bpe"),
        dict(split_by_whitespace=False, byte_fallback=True),
        dict(remove_extra_whitespaces=False),
    ]
    for number, each in enumerate(settings):
        vocabulary = foreign_model(tmp_path / str(number), vocab_size=800, **each)
        folder = tmp_path / f"out{number}"
        hugging_face.write(folder, vocabulary, [vocabulary.cls], [vocabulary.sep])
        ties = "aaaa"  # their scores are not rounded
        texts = [text for text in random_texts(200) if ties not in text]
        texts += ["a <eop>(b). c", "(.)", "one\r\ntwo"]
        assert ids_of(folder, texts) == [vocabulary.encode(text) for text in texts]


def test_a_symbol_is_always_found(tmp_path, ids_of, foreign_model):
    """Even where all pieces are alike, so that its parts would be as good."""
    symbols = foreign_model(tmp_path / "a", vocab_size=800, user_defined_symbols=["statement"])
    proto = sentencepiece_model_pb2.ModelProto.FromString(symbols.model)
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score = -3
    (tmp_path / "b.model").write_bytes(proto.SerializeToString())
    vocabulary = tokenizer.load_model(tmp_path / "b.model")
    ids = vocabulary.encode("a statement")
    assert "statement" in vocabulary.pieces(ids)
    hugging_face.write(tmp_path, vocabulary, [], [])
    assert ids_of(tmp_path, ["a statement"]) == [ids]
