"""A hand-made example, in pieces of a vocabulary of eleven."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from pretraining.show import example

PIECES = ["[CLS]", "[MASK]", "▁a", "▁man", "s", "▁ran", "\n", "名前", "\x1b", r"$\frac$", "▁▁b"]
VOCABULARY = SimpleNamespace(pieces=lambda ids: [PIECES[i] for i in ids], special_ids=(0, 1))


class Description(NamedTuple):
    """As in objectives/base.py."""

    tokens: dict[str, Any]
    numbers: dict[str, Any]
    sees: dict[str, Any]


@pytest.fixture(scope="session")
def make():
    """({title: pieces, "" = none}, numbers, sees) -> what is shown of them.

    As an objective does, all is filled up with -1 to one length, here that of the longest and 1.
    """

    def make(tokens, numbers=None, sees=None):
        size = 1 + max(map(len, tokens.values()))
        pad = lambda line: np.array([*line, *[-1] * (size - len(line))])
        ids = lambda line: [PIECES.index(piece) if piece else -1 for piece in line]
        lines = {title: pad(ids(line)) for title, line in tokens.items()}
        counts = {title: pad(line) for title, line in (numbers or {}).items()}
        matrices = {title: np.pad(matrix, (0, 1)) for title, matrix in (sees or {}).items()}
        return example.in_words(Description(lines, counts, matrices), VOCABULARY, "name", "seed 0")

    return make


@pytest.fixture
def corrupted(make):
    """a man-s ran: "man" became "a", "s" is masked, "ran" is kept and predicted all the same."""
    return make(
        {
            "original": ["[CLS]", "▁a", "▁man", "s", "▁ran"],
            "input": ["[CLS]", "▁a", "▁a", "[MASK]", "▁ran"],
            "predicted": ["", "", "▁man", "s", "▁ran"],
        },
        {"rank": [-1, -1, 12, 0, 7]},
        {"content": np.tri(5, dtype=bool)},
    )
