"""A SentencePiece model: what its pieces stand for, and where they start in a text."""

import functools

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pretraining.data import boundaries
from pretraining.data.piece_model import SPACE, Segments, as_text
from pretraining.errors import UserError

sentencepiece.set_min_log_level(2)  # errors only

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_SILENT = (Piece.CONTROL, Piece.UNKNOWN, Piece.UNUSED)


def load(content: bytes) -> "SentencePieces":
    """The model of a .model file.

    Raises:
      ValueError: the bytes are no model.
      UserError: a model that writes spaces after words.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)  # unlike the constructor, not silent on b""
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("a SentencePiece model that writes spaces after words cannot be used")
    return SentencePieces(processor, proto)


class SentencePieces:
    """A `piece_model.PieceModel`. U+2581 in a text reads as a space."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, proto):
        pieces = list(proto.pieces)
        is_byte = np.array([piece.type == Piece.BYTE for piece in pieces])
        self._processor = processor
        self._proto = proto
        self._prefix = proto.normalizer_spec.add_dummy_prefix  # a space before every text
        self.pieces = [piece.piece for piece in pieces]
        texts = [_text(piece) for piece in pieces]
        lengths = np.where(is_byte, 1, [len(text.encode()) for text in texts])
        self.lengths = lengths.astype(np.int32)
        self.silent = [i for i, piece in enumerate(pieces) if piece.type in _SILENT]
        self.word_start = np.array([boundaries.starts_word(text) for text in texts])
        self.roles = _roles(processor, pieces)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(as_text(text))

    def decode(self, ids: list[int]) -> str:
        """Control ids are silent, unk reads " ⁇ "."""
        return self._processor.decode(ids)

    def normalize(self, text: str) -> str:
        return as_text(self._processor.normalize(as_text(text)))[self._prefix :]

    def segment(self, text: str, continues: bool = False) -> Segments:
        text = as_text(text)
        processor = self._continuing(text) if continues else self._processor
        normalized, origins = processor.normalize(text, with_offsets=True)
        ids = processor.encode(text, return_type="numpy")
        return Segments(ids, normalized, self._starts(processor, text, normalized, ids), origins)

    def _continuing(self, text: str) -> sentencepiece.SentencePieceProcessor:
        """Puts no space before the text, unless to replace one that normalisation takes away."""
        plain = self._without_prefix
        spaced = plain.normalize("x" + text)[1:2] == SPACE
        kept = plain.normalize(text)[:1] == SPACE
        return self._processor if spaced and not kept else plain

    @functools.cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(self._proto)
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def _starts(self, processor, text: str, normalized: str, ids: np.ndarray) -> np.ndarray:
        lengths = self.lengths[ids]
        if np.isin(ids, self.silent).any():  # an unknown piece stands for a run of characters
            pieces = processor.encode(text, out_type=str)
            lengths = np.array([len(as_text(piece).encode()) for piece in pieces])
        codes = np.frombuffer(normalized.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        ends = np.cumsum(np.where(codes == ord(SPACE), 1, widths))
        return np.searchsorted(ends, np.cumsum(lengths) - lengths, side="right")


def _roles(processor, pieces) -> dict[str, int | None]:
    symbols = (Piece.CONTROL, Piece.USER_DEFINED)
    named = {piece.piece: i for i, piece in enumerate(pieces) if piece.type in symbols}

    def first(*ids: int | None) -> int | None:
        return next((i for i in ids if i is not None and i >= 0), None)

    return {
        "pad": first(processor.pad_id()),
        "unk": first(processor.unk_id()),
        "bos": first(processor.bos_id()),
        "eos": first(processor.eos_id()),
        "cls": first(named.get("[CLS]"), named.get("<cls>")),
        "sep": first(named.get("[SEP]"), named.get("<sep>")),
        "mask": first(named.get("[MASK]"), named.get("<mask>")),
    }


def _text(piece) -> str:
    """What a piece stands for, whole characters alone."""
    if piece.type in _SILENT:
        return ""
    if piece.type == Piece.BYTE:
        value = int(piece.piece[1:-1], 16)  # <0x41>
        return chr(value) if value < 0x80 else ""
    return as_text(piece.piece)


def with_exact_sums(model: bytes) -> bytes:
    """The model with the scores of its pieces as multiples of 1/64, and newlines like any piece.

    SentencePiece adds scores up in float32 from the start of a document. Of two segmentations that
    are equally good ("aa" "a", "a" "aa") rounding then chooses, one way here and another there.
    Sums of these multiples are exact up to 2^18, about 30,000 tokens: everywhere the same choice,
    which other libraries make too. (No other piece holds a newline, so it stays a token; the score
    that SentencePiece makes up for a user-defined symbol would be no such multiple.)
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        if piece.type == Piece.USER_DEFINED:
            piece.type = Piece.NORMAL
        piece.score = round(piece.score * 64) / 64
    return proto.SerializeToString()
