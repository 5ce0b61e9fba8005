"""The tokenizer of a folder in Hugging Face's layout, whatever files it consists of."""

import json
from collections.abc import Iterable

from etils import epath

from pretraining.data import hugging_face_pieces
from pretraining.data.piece_model import ROLES
from pretraining.errors import UserError

SENTENCEPIECE = "sentencepiece.model"  # our own model, by a name that means nothing to transformers


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
