"""A tokenizer of the package `tokenizers` (a tokenizer.json): what its pieces stand for, and where.

Three ways to write pieces are known: WordPiece (BERT, ELECTRA), byte-level BPE (GPT-2, RoBERTa) and
U+2581 for a space, in unigram or BPE models (XLNet, T5, Llama). They say where words start:

  WordPiece    a piece without "##", so that a punctuation mark is a word of its own, as in the
               whole word masking of BERT's authors.
  the others   see `boundaries`: at white space, as for SentencePiece.

Bytes. A piece of byte-level BPE counts its bytes, which sum to the text's. Elsewhere pieces count
the bytes of the text as the tokenizer normalises it; WordPiece drops white space, so that none is
counted, and unknown words and characters count nothing.
"""

import json
import re
from collections.abc import Callable, Iterator

import numpy as np

from pretraining.data import boundaries
from pretraining.data.piece_model import SPACE, Segments, as_text
from pretraining.errors import UserError

NAMES = {  # of the roles, where nothing else says them
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<|endoftext|>"),
    "eos": ("</s>", "<|endoftext|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
_UNUSED = re.compile(r"\[unused\d+\]|madeupword\d+")  # fillers of BERT's and RoBERTa's vocabularies
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def library():
    """The package `tokenizers`, an optional one.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "a Hugging Face tokenizer needs the package tokenizers:"
            ' pip install "pretraining[hugging_face]"'
        ) from None
    return tokenizers


def load(content: bytes) -> "HuggingFacePieces":
    """The tokenizer of a tokenizer.json.

    Raises:
      ValueError: the bytes are no tokenizer.
      UserError: a way to write pieces that is not known here, or the package is not installed.
    """
    tokenizers = library()
    description = json.loads(content)
    try:
        whole = tokenizers.Tokenizer.from_str(content.decode())
        return HuggingFacePieces(whole, description)
    except UserError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(str(error)) from None


class HuggingFacePieces:
    """A `piece_model.PieceModel`."""

    def __init__(self, whole, description: dict):
        ids = whole.get_vocab(with_added_tokens=True)
        pieces = [""] * (1 + max(ids.values()))
        for piece, i in ids.items():
            pieces[i] = piece
        self.roles = {
            role: next((ids[name] for name in names if name in ids), None)
            for role, names in NAMES.items()
        }
        self.silent = sorted(_silent(pieces, description) | {*self.roles.values()} - {None})
        self._bytes = _bytes_of_pieces(pieces, {*self.silent}, description)
        self.pieces = [_shown(*each) for each in zip(pieces, self._bytes, strict=True)]
        self.lengths = np.array([len(content) for content in self._bytes], np.int32)
        self.word_start = _word_starts(pieces, self._bytes, self.silent, description)
        self._hidden = {*self.silent} - {self.roles["unk"]}
        hidden = {pieces[i] for i in self._hidden}
        self._backend = _without_special(description, hidden)
        self._anchor = _anchor(pieces) if description["model"]["type"] == "WordPiece" else ""
        continuing = _continuing(description, self._anchor, len(pieces))
        self._continuing = _without_special(continuing, hidden)
        first = self.encode("a")[:1]
        self._prefix = int(self._joined(first).startswith(b" "))  # a space before every text

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Special ids are silent, unk reads as the model writes it."""
        return self._backend.decode(
            [i for i in ids if i not in self._hidden], skip_special_tokens=False
        )

    def normalize(self, text: str) -> str:
        """The text that the ids stand for: white space and unknown words can be missing."""
        return self._joined(self.encode(text))[self._prefix :].decode(errors="replace")

    def segment(self, text: str, continues: bool = False) -> Segments:
        backend, anchor = (self._continuing, self._anchor) if continues else (self._backend, "")
        encoding = backend.encode(anchor + text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        ends = np.maximum.accumulate(places[:, 1])
        starts = np.minimum(places[:, 0], np.append(0, ends)[:-1])  # a gap belongs to the next
        ids = np.array(encoding.ids, np.int32)
        starts = np.maximum.accumulate(starts)
        kept = ids < len(self.pieces)  # all but the anchor
        origins = range(-len(anchor), len(text))
        return Segments(ids[kept], anchor + text.replace(" ", SPACE), starts[kept], origins)

    def _joined(self, ids: list[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids)


def _silent(pieces: list[str], description: dict) -> set[int]:
    special = {token["id"] for token in description["added_tokens"] if token["special"]}
    unused = {i for i, piece in enumerate(pieces) if not piece or _UNUSED.fullmatch(piece)}
    return special | unused


def _bytes_of_pieces(pieces: list[str], silent: set[int], description: dict) -> list[bytes]:
    """[V] what each piece stands for, in UTF-8."""
    to_bytes = _way_of_writing(description)
    verbatim = {token["content"] for token in description["added_tokens"]}
    contents = [piece.encode() if piece in verbatim else to_bytes(piece) for piece in pieces]
    return [b"" if i in silent else content for i, content in enumerate(contents)]


def _shown(piece: str, content: bytes) -> str:
    """The piece, whose leading space is U+2581 instead of another sign for it."""
    return SPACE + piece[1:] if content[:1] == b" " and piece[0] in " \u0120" else piece


def _way_of_writing(description: dict) -> Callable[[str], bytes]:
    """From a piece to the bytes that it stands for."""
    model = description["model"]
    steps = [description[key] for key in ("normalizer", "pre_tokenizer")]
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return lambda piece: piece.removeprefix(prefix).encode()
    if "ByteLevel" in _types(steps):
        table = _byte_alphabet()
        return lambda piece: bytes(table[character] for character in piece)
    if SPACE in json.dumps(steps, ensure_ascii=False):
        if model["byte_fallback"]:
            return lambda piece: _byte(piece) or as_text(piece).encode()
        return lambda piece: as_text(piece).encode()
    raise UserError(
        f"a Hugging Face tokenizer with a {model['type']} model, neither WordPiece nor byte-level"
        f" nor with {SPACE} for spaces, cannot be used"
    )


def _types(part) -> Iterator[str]:
    """The types of the steps of a pipeline, nested ones too."""
    if isinstance(part, list):
        for each in part:
            yield from _types(each)
    elif isinstance(part, dict):
        yield part["type"]
        yield from _types(part.get("normalizers") or part.get("pretokenizers"))


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet stands for.

    A printable character of Latin-1 stands for itself, those from U+0100 on for the other bytes.
    """
    alphabet = sorted(library().pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(character) for character in alphabet if character < "\u0100"]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(alphabet, printable + others, strict=True))


def _byte(piece: str) -> bytes | None:
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else None


def _word_starts(
    pieces: list[str], contents: list[bytes], silent: list[int], description: dict
) -> np.ndarray:
    model = description["model"]
    if model["type"] == "WordPiece":
        starts = [not piece.startswith(model["continuing_subword_prefix"]) for piece in pieces]
    else:
        starts = [boundaries.starts_word(each.decode(errors="replace")) for each in contents]
    starts = np.array(starts)
    starts[silent] = False
    return starts


def _without_special(description: dict, names: set[str]):
    """The tokenizer, which finds none of the tokens `names` in a text.

    Those that its model knows get a space before their names: no piece of a text has a plain one.
    """
    model = description["model"]
    rename = {name: " " + name for name in names - {model.get("unk_token")}}
    if isinstance(model["vocab"], dict):
        vocab = {rename.get(piece, piece): i for piece, i in model["vocab"].items()}
        known = model["vocab"].keys()
    else:  # unigram
        vocab = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
        known = {piece for piece, _ in model["vocab"]}
    added = [
        token
        for token in description["added_tokens"]
        if token["content"] not in rename or token["content"] not in known
    ]
    changes = {"model": model | {"vocab": vocab}, "added_tokens": added}
    unframed = {"post_processor": None, "padding": None, "truncation": None}
    tokenizer = library().Tokenizer.from_str(json.dumps(description | changes | unframed))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _anchor(pieces: list[str]) -> str:
    """A letter that no piece begins with: WordPiece cuts what follows it as the rest of a word."""
    first = {piece[:1] for piece in pieces}
    return next(letter for letter in map(chr, range(0x1401, 0x1680)) if letter not in first)


def _continuing(description: dict, anchor: str, anchor_id: int) -> dict:
    """The tokenizer, which puts no space before a text and knows the anchor, if there is one."""
    model = description["model"]
    changes = {key: _without_prefix(description[key]) for key in ("normalizer", "pre_tokenizer")}
    if anchor:
        changes["model"] = model | {"vocab": model["vocab"] | {anchor: anchor_id}}
    return description | changes


def _without_prefix(part):
    """A pipeline, or one of its steps, that puts no space before a text."""
    off = {
        "ByteLevel": {"add_prefix_space": False},
        "Metaspace": {"prepend_scheme": "never"},
        "Prepend": {"prepend": ""},
    }
    if isinstance(part, list):
        return [_without_prefix(each) for each in part]
    if isinstance(part, dict):
        changes = off.get(part.get("type"), {})
        return {key: _without_prefix(each) for key, each in part.items()} | changes
    return part
