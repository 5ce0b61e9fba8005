"""Tokenizers in and out of Hugging Face's layout."""

import json
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from pretraining.data import hugging_face_pieces
from pretraining.data.piece_model import as_text
from pretraining.data.tokenizer import ROLES, Vocabulary
from pretraining.errors import UserError

SENTENCEPIECE = "sentencepiece.model"  # our own model, by a name that means nothing to transformers

SAMPLES = (
    "",
    " ",
    'The quick brown fox jumps over the lazy dog. It\'s 12,345.67 km -- and 98% of it "uphill"!',
    "Ça va, Straße, żółć, İstanbul, Ǆ, naïve; cafe\u0301, Z\u0323\u0302, a\u0328\u0301, \u0301",
    "Ελληνικά με τόνους: Άγιος, ᾠδή. Кириллица: ёжик, й, и\u0306. Հայերեն. ქართული.",
    "العربية: ﷺ ﻻ مَرْحَبًا ٣٤٥؟ עברית: שָׁלוֹם, בְּרֵאשִׁית.",
    "हिन्दी: क़लम, क्षत्रिय। বাংলা: কো। தமிழ்: கொ. ไทย: สวัสดีชาวโลก น้ำ. ລາວ. မြန်မာ. ខ្មែរ.",
    "中文没有空格，真的吗？～ 日本語：ﾊﾝｶｸｶﾞ、か\u3099き゚！ 한국어 \u1112\u1161\u11ab 각\u11a8. ﾡ",
    "👩\u200d👩\u200d👧‍👦 🇫🇷🇩 👍🏽 ☃\ufe0f ☃☃ ✂",
    "\tone\n\ntwo\r\nthree  four   \u00a0five\u3000six\u2028seven\x0beight ",
    "  leading, trailing  \n",
    "ﬁne ﬂow ½ ² ℌ ｆｕｌｌ ① Ⅷ ㎏ ſ ´ ¨",
    "\x00\x01a\x07b\x7f\x85\u00ad\u200b\u200e\u200f\ufeffc\ufffd\ufffe",
    "\ue000\uf8ff\U000f0000\U0010fffd",
    "## \u2585 ⁇ ▁ a▁b",
)
"""Texts on which an exported tokenizer is compared with the vocabulary."""


def write(
    folder,
    vocabulary: Vocabulary,
    before: Sequence[int],
    after: Sequence[int],
    *,
    max_length: int | None = None,
    segments: bool = False,
    texts: Iterable[str] = (),
) -> None:
    """Writes a tokenizer that `transformers.AutoTokenizer` opens and that gives our ids.

    Writes `tokenizer.json` and `tokenizer_config.json`, and for a SentencePiece vocabulary its
    model, from which `read` gets the same vocabulary again. One that came from a tokenizer.json is
    written as it was, but for the frame around a text. Nothing is written unless the tokenizer
    gives the ids of `vocabulary.encode` for `SAMPLES`, for every piece by itself and for `texts`.

    What differs from `vocabulary.encode`: by custom of that layout special tokens are found in
    texts ("Paris is [MASK]."), unless `split_special_tokens=True`. Even then, and for bytes
    ("<0x41>"), a unigram model finds the name of such a piece if it does not know all characters of
    the name. Unigram models that were not trained here may cut a run of equal characters elsewhere,
    because of roundings (see `sentencepiece_pieces.with_exact_sums`).

    Args:
      folder: where to; made if it is not there.
      before, after: the special ids that frame a text as the model sees it. Between two texts
        stands sep where `after` has it.
      max_length: the most positions that the model takes; None = not said.
      segments: the model tells two texts apart: `token_type_ids` are given.
      texts: more texts to compare the ids of.

    Raises:
      UserError: the package `tokenizers` is not installed, or the ids of a text differ.
    """
    tokenizer = _fast_tokenizer(vocabulary)
    tokenizer.encode_special_tokens = True
    _check_ids(tokenizer, vocabulary, texts)
    tokenizer.encode_special_tokens = False
    tokenizer.post_processor = _frame(vocabulary, before, after)
    config = _tokenizer_config(vocabulary, max_length, segments)
    contents = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
    }
    if vocabulary.kind == "sentencepiece":
        contents[SENTENCEPIECE] = vocabulary.model
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _fast_tokenizer(vocabulary: Vocabulary):
    if vocabulary.kind == "tokenizers":
        tokenizer = hugging_face_pieces.library().Tokenizer.from_str(vocabulary.model.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    hugging_face_pieces.library()
    from pretraining.hugging_face import fast_tokenizer

    return fast_tokenizer.convert(vocabulary.model)


def _check_ids(tokenizer, vocabulary: Vocabulary, texts: Iterable[str]) -> None:
    for text in [*SAMPLES, *_texts_of_pieces(vocabulary), *texts]:
        ours = vocabulary.encode(text)
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise UserError(
                f"the tokenizer cannot be exported: {_shortened(text)} would have other ids,"
                f" {_shortened(theirs)} for {_shortened(ours)}"
            )


def _texts_of_pieces(vocabulary: Vocabulary) -> Iterator[str]:
    """Of all but the special ones and single bytes."""
    written = map(as_text, vocabulary.pieces(range(vocabulary.size)))
    for text, length in zip(written, vocabulary.bytes_per_id, strict=True):
        if len(text.encode()) == length:
            yield text


def _shortened(value) -> str:
    written = ascii(value)
    return written if len(written) <= 80 else written[:77] + "..."


def _frame(vocabulary: Vocabulary, before: Sequence[int], after: Sequence[int]):
    """One text: before A after. Two: before A sep B after."""
    from tokenizers import processors

    name = lambda i: vocabulary.pieces([i])[0]
    opening, closing = [name(i) for i in before], [name(i) for i in after]
    between = [name(vocabulary.sep)] if vocabulary.sep in after else []
    second = [f"{each}:1" for each in ("$B", *closing)]
    return processors.TemplateProcessing(
        single=[*opening, "$A", *closing],
        pair=[*opening, "$A", *between, *second],
        special_tokens=[(name(i), i) for i in {*before, *after}],
    )


def _tokenizer_config(vocabulary: Vocabulary, max_length: int | None, segments: bool) -> dict:
    ids = {role: getattr(vocabulary, role) for role in ROLES}
    names = {f"{role}_token": vocabulary.pieces([i])[0] for role, i in ids.items() if i is not None}
    inputs = ["input_ids", *["token_type_ids"] * segments, "attention_mask"]
    length = {} if max_length is None else {"model_max_length": max_length}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        **length,
        "model_input_names": inputs,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }


# ---------------------------------------------------------------------------------------- reading


def read(path) -> tuple[str, bytes, dict[str, int]]:
    """The tokenizer of a folder in Hugging Face's layout, or of a tokenizer.json.

    The first of these that the folder has: `sentencepiece.model` (our own exports),
    `tokenizer.json`, `spiece.model` (XLNet, ALBERT, T5: its own ids), `vocab.txt` (WordPiece, by
    `tokenizer_config.json` with BERT's defaults), `vocab.json` and `merges.txt` (byte-level BPE);
    the last two with `added_tokens.json`.

    Departures from transformers: `spiece.model` is taken as it is, whereas XLNet's tokenizer first
    makes "``" and "''" a quotation mark and takes accents away (a tokenizer.json says so itself).
    Special tokens are not found in texts.

    Returns:
      kind, content: of the vocabulary.
      roles: ids that `tokenizer_config.json` or `special_tokens_map.json` name, by role.

    Raises:
      UserError: none of these files, a damaged one, or the package `tokenizers` is missing.
    """
    path = epath.Path(path)
    file = _find(path) if path.is_dir() else path
    content = _content(file)
    if file.suffix == ".model":
        return "sentencepiece", content, {}
    hugging_face_pieces.library()
    try:
        names = ("special_tokens_map.json", "tokenizer_config.json")
        configs = [_json(file.parent / name) for name in names]
        config = configs[0] | configs[1]
        tokenizer = _READERS.get(file.name, _from_json)(file, config)
        named = _add_roles(tokenizer, config, _flags(configs))
        if file.name in _READERS:
            _add_others(tokenizer, _added_tokens(file))
        content = tokenizer.to_str().encode()
        hugging_face_pieces.load(content)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the package tokenizers raises nothing narrower
        raise UserError(f"{str(file)!r} is no Hugging Face tokenizer: {error}") from None
    return "tokenizers", content, named


def _find(folder):
    names = (SENTENCEPIECE, "tokenizer.json", "spiece.model", "vocab.txt", "vocab.json")
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise UserError(f"{str(folder)!r} holds no tokenizer, none of {', '.join(names)}")
    return found[0]


def _content(file) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def _json(file) -> dict:
    return json.loads(_content(file)) if file.exists() else {}


def _flags(configs: list[dict]) -> dict[str, dict]:
    """Whatever the files say of special tokens, such as "lstrip", by the name of the token."""
    values = [value for config in configs for value in config.values()]
    values += [value for c in configs for value in c.get("added_tokens_decoder", {}).values()]
    said = [value for value in values if isinstance(value, dict) and "content" in value]
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {each["content"]: {name: each[name] for name in names if name in each} for each in said}


def _add_roles(tokenizer, config: dict, flags: dict[str, dict]) -> dict[str, int]:
    """The ids by role that the folder names; they become special where they are not."""
    from tokenizers import AddedToken

    declared = {role: config.get(f"{role}_token") for role in ROLES}
    names = {role: n["content"] if isinstance(n, dict) else n for role, n in declared.items()}
    ids = {role: tokenizer.token_to_id(name) for role, name in names.items() if name}
    known = {role: i for role, i in ids.items() if i is not None}
    for role, i in known.items():
        name = names[role]
        token = tokenizer.get_added_tokens_decoder().get(i) or AddedToken(
            name, **flags.get(name, {})
        )
        if not token.special:  # one that is added again under its name alone would lose its flags
            token.special = True
            tokenizer.add_special_tokens([token])
    return known


def _add_others(tokenizer, names: Iterable[str]) -> None:
    """Of `added_tokens.json`, those that have no role: found in texts, but not special."""
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([name for name in names if name not in present])


def _added_tokens(file) -> dict[str, int]:
    """Ids by name, which stand beside a list of pieces. (A tokenizer.json says them itself.)"""
    return _json(file.parent / "added_tokens.json")


def _from_json(file, config: dict):
    return hugging_face_pieces.library().Tokenizer.from_str(_content(file).decode())


def _from_vocab_txt(file, config: dict):
    """BERT's: `tokenizer_config.json` need not be there, or say everything."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = _content(file).decode().removesuffix("\n").split("\n")
    settings = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
    settings |= {"unk_token": "[UNK]"} | config
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)} | _added_tokens(file)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=settings["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _from_merges(file, config: dict):
    """GPT-2's and RoBERTa's: vocab.json with merges.txt beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    lines = _content(file.parent / "merges.txt").decode().split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    settings = {"add_prefix_space": False} | config
    tokenizer = Tokenizer(models.BPE(_json(file) | _added_tokens(file), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(settings["add_prefix_space"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_READERS = {"vocab.txt": _from_vocab_txt, "vocab.json": _from_merges}  # by name of the file
