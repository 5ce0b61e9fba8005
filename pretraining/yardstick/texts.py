"""Many short texts through a model whose rows are long.

A sentence of ten tokens in a row of 128 positions would cost twelve times what it must. Texts of
similar length are read together, by the same parameters in a model of shorter rows.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from pretraining import config as config_lib
from pretraining import predict
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError

AT_ONCE = 2048  # texts between two signs of progress, whose vectors are in memory at once
_QUANTILES = (0.5, 0.9, 1.0)  # of the lengths of the texts: where a group ends
_SHORTEST = 5  # tokens: configs accept no fewer


class Texts(NamedTuple):
    """Tokens of texts, each cut to what one row of the model takes.

    Attributes:
      tokens: [n] arrays of ids.
      boundary: [n] arrays of the bits of `Row.boundary`.
      cut: [n] whether it was longer.
    """

    tokens: list[np.ndarray]
    boundary: list[np.ndarray]
    cut: list[bool]


def tokenize(run, texts: list[str]) -> Texts:
    """The tokens of each text as a document of its own."""
    return cut([run.vocabulary.encode_document(text) for text in texts], run.payload)


def cut(encoded: list[tuple[np.ndarray, np.ndarray]], payload: int) -> Texts:
    """Texts of (ids, boundary) pairs, of which the first `payload` tokens stay."""
    return Texts(
        [ids[:payload] for ids, _ in encoded],
        [boundary[:payload] for _, boundary in encoded],
        [len(ids) > payload for ids, _ in encoded],
    )


def apply(run, texts: Texts, function: Callable[..., Any], title: str) -> list:
    """function(objective, rows, numbers) -> a sequence of results, for all texts in their order.

    Args:
      function: gets the objective, rows of one size, and which texts they are.
      title: of the progress that is shown.

    Raises:
      UserError: a text has no token.
    """
    results: list = [None] * len(texts.tokens)
    with _progress(title, len(results)) as done:
        for longest, group in _groups(np.array([len(tokens) for tokens in texts.tokens])):
            objective, payload = shorten(run, longest)
            for start in range(0, len(group), AT_ONCE):
                numbers = group[start : start + AT_ONCE]
                rows = [
                    predict.make_row(texts.tokens[i], texts.boundary[i], payload, f"{title}: one")
                    for i in numbers
                ]
                for i, result in zip(numbers, function(objective, rows, numbers), strict=True):
                    results[i] = result
                done(len(numbers))
    return results


def shorten(run, payload: int) -> tuple[Any, int]:
    """The objective of the run for rows of at least `payload` tokens, and how many they take.

    It fits the run's parameters and computes the same: a learned table of positions keeps its rows.
    An objective that cannot be shorter (permutations of a fixed size) is the run's own.
    """
    payload = max(payload, _SHORTEST)
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.position_rows = config.model.position_rows or config.data.sequence_length
        config.data.sequence_length = payload + SPECIAL_POSITIONS
    try:
        return config_lib.build_objective(config, run.vocabulary), payload
    except UserError:
        return run.objective, run.payload


def _groups(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(longest of a group, its numbers), the short texts first."""
    before = -1
    for end in np.unique(np.quantile(lengths, _QUANTILES, method="higher")):
        yield int(end), np.flatnonzero((lengths > before) & (lengths <= end))
        before = end


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """What is told how many texts were done: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        with tqdm.tqdm(desc=title, total=total, unit=" texts") as bar:
            yield bar.update
        return
    counts = [0]

    def tell(count: int) -> None:
        counts.append(counts[-1] + count)
        print(f"{title}: {counts[-1]:,} of {total:,} texts", file=sys.stderr)

    yield tell
