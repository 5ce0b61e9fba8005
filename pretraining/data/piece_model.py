"""What a tokenizer must tell about its pieces, whichever library runs it."""

from typing import NamedTuple, Protocol

import numpy as np

SPACE = "\u2581"  # how SentencePiece writes a space
# What a special token is for.
ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")


class Segments(NamedTuple):
    """A text as its n tokens cut it.

    Attributes:
      ids: [n] int32.
      text: what was cut, normalised or not; a space is U+2581.
      starts: [n] int64, the character of `text` at which a token starts, ascending. White space
        that no token holds belongs to the next one.
      origins: by character of `text`, its place in the text that was given, ascending.
    """

    ids: np.ndarray
    text: str
    starts: np.ndarray
    origins: "list[int] | range"


class PieceModel(Protocol):
    """V pieces.

    Attributes:
      pieces: [V] how the model writes each id, a space that leads as U+2581.
      lengths: [V] int32, the bytes of UTF-8 that a piece stands for; 0 for silent ones.
      silent: ids of pieces that stand for no text: special, unknown and unused ones.
      word_start: [V] bool, the piece starts a word wherever it stands.
      roles: id by role ("pad", "unk", "bos", "eos", "cls", "sep", "mask"), None = no
        piece of its own for it.
    """

    pieces: list[str]
    lengths: np.ndarray
    silent: list[int]
    word_start: np.ndarray
    roles: dict[str, int | None]

    def encode(self, text: str) -> list[int]:
        """Ids, none of them silent but unk."""

    def decode(self, ids: list[int]) -> str:
        """Text of any ids."""

    def normalize(self, text: str) -> str:
        """The text that survives."""

    def segment(self, text: str, continues: bool = False) -> Segments:
        """The ids of `encode` and where they start.

        continues: the text goes on where a token ends; see `Vocabulary.encode_document`.
        """


def as_text(pieces: str) -> str:
    return pieces.replace(SPACE, " ")


def complete_roles(named: dict[str, int | None]) -> dict[str, int | None]:
    """Where one of cls and bos, or of sep and eos, is missing, the other serves as both."""
    pairs = {"bos": "cls", "cls": "bos", "eos": "sep", "sep": "eos"}
    return {
        role: named[pairs[role]] if own is None and role in pairs else own
        for role, own in named.items()
    }
