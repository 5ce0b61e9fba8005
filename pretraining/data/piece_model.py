"""A SentencePiece model: what its pieces stand for, and where they start in a text."""

import functools
from typing import NamedTuple

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pretraining.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space

sentencepiece.set_min_log_level(2)  # errors only

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_SILENT = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.UNUSED)


class Model(NamedTuple):
    """V pieces.

    Attributes:
      processor: the model itself.
      prefix: whether a space is put before every text.
      texts: [V] what a piece stands for; "" for silent pieces and for bytes beyond ASCII.
      lengths: [V] int32, the bytes of UTF-8 that a piece stands for; 0 for silent ones.
      silent: ids of control, unknown and unused pieces.
      named: id by name of the control and user-defined pieces.
    """

    processor: sentencepiece.SentencePieceProcessor
    prefix: bool
    texts: list[str]
    lengths: np.ndarray
    silent: list[int]
    named: dict[str, int]


@functools.lru_cache(maxsize=4)
def load(model_proto: bytes) -> Model:
    """Raises RuntimeError for bytes that are no model, UserError for a model that cannot serve."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model_proto)  # unlike the constructor, not silent on b""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_proto)
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("a SentencePiece model that writes spaces after words cannot be used")
    pieces = list(proto.pieces)
    symbols = (_Piece.CONTROL, _Piece.USER_DEFINED)
    texts = [_text(piece) for piece in pieces]
    is_byte = np.array([piece.type == _Piece.BYTE for piece in pieces])
    return Model(
        processor=processor,
        prefix=proto.normalizer_spec.add_dummy_prefix,
        texts=texts,
        lengths=np.where(is_byte, 1, [len(text.encode()) for text in texts]).astype(np.int32),
        silent=[i for i, piece in enumerate(pieces) if piece.type in _SILENT],
        named={piece.piece: i for i, piece in enumerate(pieces) if piece.type in symbols},
    )


def _text(piece) -> str:
    if piece.type in _SILENT:
        return ""
    if piece.type == _Piece.BYTE:
        value = int(piece.piece[1:-1], 16)  # <0x41>
        return chr(value) if value < 0x80 else ""
    return as_text(piece.piece)


def as_text(pieces: str) -> str:
    return pieces.replace(SPACE, " ")


def token_starts(model: Model, text: str, normalized: str, ids: np.ndarray) -> np.ndarray:
    """The characters [n] int64 of `normalized` in which the tokens `ids` [n] of `text` start."""
    lengths = model.lengths[ids]
    if np.isin(ids, model.silent).any():  # an unknown piece stands for a run of characters
        pieces = model.processor.encode(text, out_type=str)
        lengths = np.array([len(as_text(piece).encode()) for piece in pieces])
    codes = np.frombuffer(normalized.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    ends = np.cumsum(np.where(codes == ord(SPACE), 1, widths))
    return np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right")
