"""The one thing that the loader hands to every objective."""

from typing import Any, NamedTuple

WORD_START = 1  # bits of `Row.boundary`
SENTENCE_START = 2

SPECIAL_POSITIONS = 3  # L - T: room for [CLS] A [SEP] B [SEP], and for the causal shift


class Row(NamedTuple):
    """One row of payload: T = sequence_length - 3 tokens, the same for every objective.

    A leading batch axis may stand before every shape.

    Attributes:
      tokens: [T] int32, no special token but the separator (eos) that ends a document.
      length: [] int32, valid tokens, at most T; rows that only fill up a batch have length 0.
      document: [T] int32, which document of the row, counted from 0.
      boundary: [T] uint8, bits WORD_START and SENTENCE_START.
      index: [] int32, place in the global batch: with seed and step, the address of the row's
        randomness. The copies of one row share it.
      copy: [] int32, which of `data.copies` copies this is.
    """

    tokens: Any
    length: Any
    document: Any
    boundary: Any
    index: Any
    copy: Any
