"""Imported tokenizers keep their ids, and what they tell of their pieces is true."""

import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest
import sentencepiece

from pretraining import notebook
from pretraining.data import encode, tokenizer
from pretraining.data.row import SENTENCE_START, WORD_START

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from pretraining.hugging_face import tokenizers as hugging_face  # noqa: E402


@pytest.fixture(scope="module")
def word_piece(corpus):
    def build(lowercase=True):
        built = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        built.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        built.decoder = decoders.WordPiece()
        special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        built.train_from_iterator(
            corpus,
            trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False),
        )
        return built

    return build


@pytest.fixture(scope="module")
def byte_level(corpus):
    def build(special=("<|endoftext|>",), prefix=False):
        built = tokenizers.Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        built.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        built.train_from_iterator(corpus, trainer)
        return built

    return build


@pytest.fixture(scope="module")
def unigram(corpus):
    def build(mask="<mask>"):
        """As XLNet's."""
        built = tokenizers.Tokenizer(models.Unigram())
        built.normalizer = normalizers.Sequence(
            [normalizers.Replace("``", '"'), normalizers.NFKD()]
        )
        built.pre_tokenizer = pre_tokenizers.Metaspace()
        built.decoder = decoders.Metaspace()
        special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", mask]
        built.train_from_iterator(
            corpus,
            trainers.UnigramTrainer(
                vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False
            ),
        )
        return exact(built)

    return build


def exact(built):
    """Scores that add up exactly: the sums of others are rounded, and cut equal words by chance."""
    written = json.loads(built.to_str())
    vocabulary = written["model"]["vocab"]
    written["model"]["vocab"] = [[piece, round(score * 64) / 64] for piece, score in vocabulary]
    return tokenizers.Tokenizer.from_str(json.dumps(written))


def save(folder, built, **config):
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.load_model(folder)


def roles(vocabulary):
    return [getattr(vocabulary, role) for role in tokenizer.ROLES]


def shown(vocabulary, text, bit):
    ids, boundary = vocabulary.encode_document(text)
    assert ids.tolist() == vocabulary.encode(text)
    pieces = vocabulary.pieces(ids)
    return "".join("|" * bool(b & bit) + p for p, b in zip(pieces, boundary, strict=True))


def test_word_piece(tmp_path, random_texts, corpus, special, word_piece):
    built = word_piece()
    vocabulary = save(tmp_path, built, do_lower_case=True)
    assert roles(vocabulary) == [0, 2, 3, 4, 3, 4, 5]
    assert vocabulary.special_ids == (0, 1, 2, 3, 4, 5)
    assert vocabulary.size == built.get_vocab_size()
    for text in [*random_texts(200), *special, *corpus[:5]]:
        ids = vocabulary.encode(text)
        if not any(name in text for name in ("[MASK]", "[CLS]", "[SEP]", "[UNK]")):
            assert ids == built.encode(text).ids
        assert not set(ids) & set(vocabulary.special_ids) - {vocabulary.unk}
        if vocabulary.unk not in ids:
            visible = "".join(built.normalizer.normalize_str(text).split())
            assert vocabulary.normalize(text) == visible
            assert vocabulary.bytes_per_id[ids].sum() == len(visible.encode())
    assert vocabulary.decode([3, *vocabulary.encode("The statement, is"), 5, 4]) == (
        "the statement, is"
    )
    text = "Statements aren't well-defined.  But\n names are."
    words = shown(vocabulary, text, WORD_START)
    assert words.replace("##", "").split("|") == (
        [
            "",
            "statements",
            "aren",
            "'",
            "t",
            "well",
            "-",
            "defined",
            ".",
            "but",
            "names",
            "are",
            ".",
        ]
    )
    assert [s.replace("##", "") for s in shown(vocabulary, text, SENTENCE_START).split("|")] == (
        ["", "statementsaren'twell-defined.", "but", "namesare."]
    )


def test_byte_level(tmp_path, random_texts, corpus, special, byte_level):
    built = byte_level()
    vocabulary = save(tmp_path, built, unk_token="<|endoftext|>", bos_token="<|endoftext|>",
                      eos_token="<|endoftext|>")  # fmt: skip
    assert roles(vocabulary) == [None, 0, 0, 0, 0, 0, None]
    assert vocabulary.special_ids == (0,)
    for text in [*random_texts(300), *special, *corpus[:5], "a<|endoftext|>b"]:
        ids = vocabulary.encode(text)
        assert 0 not in ids
        assert vocabulary.decode(ids) == text == vocabulary.normalize(text)
        assert vocabulary.bytes_per_id[ids].sum() == len(text.encode())
    text = "The names, defined ☃. In☃\nA 中文 x"
    assert shown(vocabulary, text, WORD_START).replace("▁", "_") == (
        "|The|_names,|_defined|_â|ĺ|ĥ".replace("|ĺ|ĥ", "ĺĥ") + ".|_In" + "âĺĥ|Ċ|A|_ä¸Ń|æĸĩ|_x"
    )
    assert shown(vocabulary, text, SENTENCE_START).count("|") == 3


def test_byte_level_with_a_prefix(tmp_path, byte_level):
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    vocabulary = save(tmp_path, byte_level(names, prefix=True), cls_token="<s>", sep_token="</s>")
    assert roles(vocabulary) == [1, 3, 0, 2, 0, 2, 4]
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    for text in ["the <mask>", "x", "☃"]:
        ids = vocabulary.encode(text)
        assert vocabulary.normalize(text) == text
        assert vocabulary.bytes_per_id[ids].sum() == len(text.encode()) + 1


def test_unigram(tmp_path, corpus, unigram):
    built = unigram()
    vocabulary = save(tmp_path, built)
    assert roles(vocabulary) == [5, 0, 1, 2, 3, 4, 6]
    for text in ["The ``names`` are", "x  y", "中文。", "Ж", *corpus[:5]]:
        ids = vocabulary.encode(text)
        assert ids == built.encode(text).ids
        if 0 not in ids:
            expected = built.normalizer.normalize_str(text)
            assert vocabulary.normalize(text) == expected
            assert vocabulary.bytes_per_id[ids].sum() == len(expected.encode()) + 1
    assert 6 in built.encode("a <mask>").ids
    assert not set(vocabulary.encode("<mask> a<cls><s> </s>")) & set(vocabulary.special_ids[1:])
    shown_words = shown(vocabulary, "The statement. It is", WORD_START).split("|")
    assert [word.replace("▁", " ").strip() for word in shown_words] == [
        "",
        "The",
        "statement.",
        "It",
        "is",
    ]


def test_saved_pickled_and_written_back(
    tmp_path, random_texts, ids_of, corpus, word_piece, byte_level, unigram
):
    cases = {"[MASK]": word_piece(), "<|endoftext|>": byte_level(), "<sep>": unigram()}
    for number, (name, built) in enumerate(cases.items()):
        vocabulary = save(tmp_path / str(number), built, mask_token={"content": name})
        assert vocabulary.pieces([vocabulary.mask]) == [name]
        counted = vocabulary.with_counts(np.arange(vocabulary.size))
        counted.save(tmp_path / "saved")
        loaded = tokenizer.Vocabulary.load(tmp_path / "saved")
        for field in dataclasses.fields(loaded):
            assert np.array_equal(getattr(loaded, field.name), getattr(counted, field.name))
        assert loaded.fingerprint == vocabulary.fingerprint
        texts = [*random_texts(100), *corpus[:3]]
        ids = [vocabulary.encode(text) for text in texts]
        assert [pickle.loads(pickle.dumps(loaded)).encode(text) for text in texts] == ids
        hugging_face.write(tmp_path / "out", vocabulary, [vocabulary.cls], [vocabulary.sep])
        assert ids_of(tmp_path / "out", texts) == ids
        again = tokenizer.load_model(tmp_path / "out")
        assert [again.encode(text) for text in texts] == ids
        assert roles(again) == roles(vocabulary)


ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")


def test_special_tokens_keep_their_flags(tmp_path, byte_level):
    """A mask of RoBERTa holds the space before it, wherever that is said."""
    mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)
    said = {"content": "<mask>", "lstrip": True}
    built = byte_level((*ROBERTA, mask))
    plain = byte_level((*ROBERTA, "<mask>"))
    known = json.loads(plain.to_str())
    known["added_tokens"] = [t for t in known["added_tokens"] if t["content"] != "<mask>"]
    unadded = tokenizers.Tokenizer.from_str(json.dumps(known))
    known["added_tokens"] += [json.loads(built.to_str())["added_tokens"][-1] | {"special": False}]
    not_special = tokenizers.Tokenizer.from_str(json.dumps(known))
    cases = [
        (built, {"mask_token": "<mask>"}),
        (built, {"mask_token": said | {"lstrip": False}}),
        (unadded, {"mask_token": said}),
        (unadded, {"mask_token": "<mask>", "added_tokens_decoder": {"4": said}}),
        (not_special, {"mask_token": "<mask>"}),
    ]
    texts = ["a <mask>.", "the <mask> of  <mask>", "un<mask>able", "<mask>", "a <s> <mask>"]
    assert built.encode(texts[0]).tokens == ["a", " <mask>", "."]
    for number, (source, config) in enumerate(cases):
        vocabulary = save(tmp_path / str(number), source, **config)
        assert vocabulary.mask in vocabulary.special_ids
        assert vocabulary.mask not in vocabulary.encode("a <mask>.")
        check_export(tmp_path / f"out{number}", vocabulary, built, texts)


def test_flags_beside_lists_of_pieces(tmp_path, byte_level):
    built = byte_level((*ROBERTA, tokenizers.AddedToken("<mask>", lstrip=True, special=True)))
    built.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<mask>"}')
    map_ = {"mask_token": {"content": "<mask>", "lstrip": True, "normalized": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_))
    vocabulary = tokenizer.load_model(tmp_path)
    check_export(tmp_path / "out", vocabulary, built, ["a <mask>.", "un<mask>able"])


def check_export(folder, vocabulary, built, texts):
    """Also of special tokens that stand in the texts."""
    hugging_face.write(folder, vocabulary, [], [])
    again = tokenizer.load_model(folder)
    assert roles(again) == roles(vocabulary)
    for written in ((folder / "tokenizer.json").read_text(), again.model.decode()):
        exported = tokenizers.Tokenizer.from_str(written)
        assert [exported.encode(t).ids for t in texts] == [built.encode(t).ids for t in texts]


def test_transformers_finds_special_tokens_alike(tmp_path, byte_level, unigram):
    transformers = pytest.importorskip("transformers")
    mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)
    for name, built in (("roberta", byte_level((*ROBERTA, mask))), ("xlnet", unigram(mask))):
        vocabulary = save(tmp_path / name, built, mask_token="<mask>")
        hugging_face.write(tmp_path / name / "out", vocabulary, [], [])
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name / "out")
        for text in ["a <mask>.", "the <mask> of  <mask>", "un<mask>able"]:
            assert theirs(text)["input_ids"] == built.encode(text).ids


def test_the_vocabulary_of_a_run_is_reused(tmp_path, byte_level):
    """Roles that stand in tokenizer_config.json alone, too."""
    names = {"cls_token": "</s>", "sep_token": "<s>", "mask_token": "<unk>"}
    vocabulary = save(tmp_path / "a", byte_level(ROBERTA), **names)
    vocabulary.with_counts(np.arange(vocabulary.size)).save(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer.json"):
        loaded = tokenizer.load_model(path)
        assert loaded.fingerprint == vocabulary.fingerprint
        for field in dataclasses.fields(loaded):
            assert np.array_equal(getattr(loaded, field.name), getattr(vocabulary, field.name))


def test_added_tokens_have_the_ids_given(tmp_path, word_piece, byte_level):
    for name, built in (("vocab.txt", word_piece()), ("vocab.json", byte_level())):
        size = built.get_vocab_size()
        folder = tmp_path / name.split(".")[1]
        folder.mkdir()
        built.model.save(str(folder))
        added = {"<hidden>": size + 3, "zyxzyx": size}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        (folder / "tokenizer_config.json").write_text('{"mask_token": "<hidden>"}')
        vocabulary = tokenizer.load_model(folder)
        assert (vocabulary.size, vocabulary.mask) == (size + 4, size + 3)
        assert {size + 1, size + 2, size + 3} <= {*vocabulary.special_ids}
        assert vocabulary.bytes_per_id[size:].tolist() == [6, 0, 0, 0]
        the, of = built.encode("the").ids, built.encode(" of").ids
        assert vocabulary.encode("thezyxzyx of") == [*the, size, *of]
        hugging_face.write(folder / "out", vocabulary, [], [])
        written = tokenizers.Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))
        assert written.encode("the<hidden> of").ids == [*the, size + 3, *of]


def test_a_word_goes_on_after_a_mask(tmp_path, byte_level, unigram):
    pieces = ["[UNK]", "[MASK]", "un", "able", "##able", ".", "to", "##s", "[PAD]", "ᐁ"]
    words = tokenizers.Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    llama = tokenizers.Tokenizer(
        models.BPE({"▁": 0, "a": 1, "b": 2, "▁a": 3, "<mask>": 4}, [("▁", "a")])
    )
    llama.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    cases = {
        "words": (words, {"un[MASK]able to": [2, 1, 4, 6], "to [MASK]ables. un": [6, 1, 4, 7, 5, 2],
                          "[MASK]. un": [1, 5, 2], "[MASK] able[MASK]s": [1, 3, 1, 7],
                          "[MASK]x able": [1, 0, 3]}),
        "llama": (llama, {"b[MASK]ab a": [0, 2, 4, 1, 2, 3], "a [MASK] a": [3, 4, 3]}),
    }  # fmt: skip
    for name, (built, texts) in cases.items():
        vocabulary = save(tmp_path / name, built)
        for text, ids in texts.items():
            assert around_masks(vocabulary, text)[0] == ids
    _, boundary = around_masks(save(tmp_path / "words", words), "un[MASK]ables. To")
    assert [flag & WORD_START > 0 for flag in boundary] == [True, False, False, False, True, True]
    assert [flag & SENTENCE_START > 0 for flag in boundary] == [True, *[False] * 4, True]
    for prefix in (False, True):
        built = byte_level((*ROBERTA, "<mask>"), prefix=prefix)
        vocabulary = save(tmp_path / f"bytes{prefix}", built)
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        check_rest_of_word(vocabulary, built, "Ġ" * prefix)
    built = unigram()
    vocabulary = save(tmp_path / "unigram", built)
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    check_rest_of_word(vocabulary, built, "▁")


def around_masks(vocabulary, text):
    run = notebook.Run(None, None, vocabulary, None, None, 0)
    tokens, boundary, positions = run._mask_text(text)
    assert positions == [i for i, token in enumerate(tokens) if token == vocabulary.mask]
    return tokens, boundary


def check_rest_of_word(vocabulary, plain, prefix):
    """`plain`: the same tokenizer, which puts no space before a text."""
    tokens, _ = around_masks(vocabulary, "the [MASK] of")
    space = [] if not prefix else [" "]
    the, of = plain.encode("".join([*space, "the"])).ids, plain.encode(" of").ids
    assert tokens == [*the, vocabulary.mask, *of]
    tokens, boundary = around_masks(vocabulary, "the [MASK]statement of")
    assert tokens == [*the, vocabulary.mask, *plain.encode("statement of").ids]
    assert boundary[len(the) + 1] == 0


def test_older_layouts(tmp_path, random_texts, corpus, word_piece, byte_level):
    folder = tmp_path / "bert"
    folder.mkdir()
    for lowercase in (True, False):
        built = word_piece(lowercase)
        names = sorted(built.get_vocab(), key=built.get_vocab().get)
        (folder / "vocab.txt").write_text("".join(f"{name}\n" for name in [*names, "<gap>"]))
        config = {} if lowercase else {"do_lower_case": False, "pad_token": {"content": "<gap>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        vocabulary = tokenizer.load_model(folder)
        gap = vocabulary.size - 1
        assert roles(vocabulary) == [0 if lowercase else gap, 2, 3, 4, 3, 4, 5]
        assert vocabulary.special_ids == (0, 1, 2, 3, 4, 5, *[gap] * (not lowercase))
        assert vocabulary.bytes_per_id[gap] == (5 if lowercase else 0)
        for text in [*random_texts(100), *corpus[:3], "Élan"]:
            if "[MASK]" not in text:
                assert vocabulary.encode(text) == built.encode(text).ids
    built = byte_level()
    folder = tmp_path / "gpt2"
    folder.mkdir()
    built.model.save(str(folder))
    vocabulary = tokenizer.load_model(folder)
    assert roles(vocabulary) == [None, None, 0, 0, 0, 0, None]
    for text in [*random_texts(100), *corpus[:3]]:
        assert vocabulary.encode(text) == built.encode(text).ids
    folder = tmp_path / "xlnet"
    folder.mkdir()
    symbols = ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=600,
        control_symbols=symbols,
        minloglevel=2,
    )
    vocabulary = tokenizer.load_model(folder)
    assert vocabulary.kind == "sentencepiece"
    assert roles(vocabulary) == [5, 0, 1, 2, 3, 4, 6]


def test_transformers_reads_the_same_ids(tmp_path, random_texts, corpus, word_piece, byte_level):
    transformers = pytest.importorskip("transformers")
    cases = {
        "BertTokenizerFast": (word_piece(), {"do_lower_case": True}),
        "GPT2TokenizerFast": (byte_level(), {}),
        "RobertaTokenizerFast": (byte_level(("<s>", "<pad>", "</s>", "<unk>", "<mask>")), {}),
    }
    for name, (built, config) in cases.items():
        folder = tmp_path / name
        vocabulary = save(folder, built, **config)
        built.model.save(str(folder))
        theirs = getattr(transformers, name).from_pretrained(folder)
        for text in [*random_texts(100, seed=3), *corpus[:3]]:
            if "[MASK]" not in text:
                assert theirs(text, add_special_tokens=False)["input_ids"] == vocabulary.encode(
                    text
                )
        for role in tokenizer.ROLES:
            if (
                getattr(theirs, f"{role}_token_id") is not None
                and getattr(vocabulary, role) is not None
            ):
                assert getattr(theirs, f"{role}_token_id") == getattr(vocabulary, role), role


def test_processes(tmp_path, corpus, byte_level):
    vocabulary = save(tmp_path, byte_level())
    texts = corpus[:6]
    chunks = [list(encode.encode_all(texts, vocabulary, 0.0, n)) for n in (1, 2)]
    tokens = [np.concatenate([chunk["train"].tokens for chunk in each]) for each in chunks]
    assert tokens[0].tolist() == tokens[1].tolist()
    assert tokens[0].tolist() == [i for text in texts for i in [*vocabulary.encode(text), 0]]


def test_wrong_folders(tmp_path, fails):
    assert "holds no tokenizer, none of sentencepiece.model" in fails(
        tokenizer.load_model, tmp_path
    )
    file = tmp_path / "tokenizer.json"
    for content in ("{}", "no JSON", "[]"):
        file.write_text(content)
        assert "tokenizer.json' is no Hugging Face tokenizer" in fails(tokenizer.load_model, file)
    file.unlink()
    assert "cannot read" in fails(tokenizer.load_model, file)
    built = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert "WordLevel" in fails(save, tmp_path, built)


def test_the_package_is_optional(tmp_path, monkeypatch, fails, byte_level):
    vocabulary = save(tmp_path, byte_level())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    expected = 'pip install "pretraining[hugging_face]"'
    assert expected in fails(tokenizer.load_model, tmp_path)
    assert expected in fails(hugging_face.write, tmp_path / "new", vocabulary, [2], [3])
