"""One corrupted example of a text, as the loop would compute it, in words.

Letters: L positions of the model, n of them shown: those up to the last one that holds anything.
"""

import collections
from typing import Any, NamedTuple

import jax
import numpy as np

from pretraining import predict, random
from pretraining.errors import UserError
from pretraining.state import corrupt_rows

# How a token is marked.
PLAIN, SPECIAL, CHANGED, ANSWER = "plain", "special", "changed", "answer"

# For legends.
MEANING = {CHANGED: "differs from the first line", ANSWER: "a target or a sample"}
ANSWERED, SPACE = "a position that has one", "· a space"
MATRIX = "who (row) may see whom (column)"


class Line(NamedTuple):
    """One line of tokens.

    Attributes:
      title: what it is.
      pieces: [n] str, "" where there is no token.
      marks: [n] str: ANSWER in a line with gaps, which speaks of some positions alone (targets,
        samples); in one without, CHANGED where it differs from the first; SPECIAL; or PLAIN.
      whole: it has no gaps: a token wherever the first line has one.
    """

    title: str
    pieces: list[str]
    marks: list[str]
    whole: bool


class Shown(NamedTuple):
    """What is drawn.

    Attributes:
      name: of the objective.
      facts: seed, step and knobs.
      lines: the lines of tokens; the first is the input before corruption.
      labels: [n] names of the positions: the pieces of the last line without gaps.
      answered: [n] bool, positions of which a line with gaps speaks.
      numbers: {title: [n] int}, -1 where there is none.
      sees: {title: [n, n] bool}, may the position (first axis) see the other one?
    """

    name: str
    facts: str
    lines: list[Line]
    labels: list[str]
    answered: np.ndarray
    numbers: dict[str, np.ndarray]
    sees: dict[str, np.ndarray]


def read(run, text: str, seed: int | None = None) -> Shown:
    """What the objective of a run does to a text.

    Args:
      run: a `notebook.Run`; its step decides on the masks and on the knobs of the schedule.
      text: at most `run.payload` tokens.
      seed: instead of `config.seed.corruption`.

    Raises:
      UserError: the text is empty or too long, the seed is out of range, or the objective has no
        part `describe`.
    """
    if run.objective.describe is None:
        raise UserError("show is not available: the objective has no part `describe`")
    seed = run.config.seed.corruption if seed is None else seed
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range: from 0 to 2**32 - 1")
    row = predict.text_row(run.vocabulary, text, run.payload)
    description, knobs = describe(run.objective, run.params, row, seed, run.step)
    facts = [f"seed {seed}", f"step {run.step}"]
    facts += [f"{name} {float(value):.4g}" for name, value in knobs.items()]
    return in_words(description, run.vocabulary, run.config.objective.name, ", ".join(facts))


def describe(objective, params, row, seed: int, step: int) -> tuple[Any, dict[str, Any]]:
    """The Description of a row that is the first one of the batch of a step, and its knobs."""

    def function(params, rows, key, step):
        knobs = objective.schedule(step)
        examples = corrupt_rows(objective, key, rows, knobs)
        row, example = jax.tree.map(lambda x: x[0], (rows, examples))
        description = objective.describe(objective.model.apply, params, row, example)
        # What is compiled hands a dict back in the order of its keys.
        return type(description)(*map(collections.OrderedDict, description)), knobs

    rows = jax.tree.map(lambda x: np.asarray(x)[None], row)
    key = random.stream(seed, "corruption", step)
    return jax.device_get(jax.jit(function)(params, rows, key, np.int32(step)))


def in_words(description, vocabulary, name: str, facts: str) -> Shown:
    """Ids become pieces, empty positions behind the last used one go.

    Args:
      description: arrays of numpy.
      vocabulary: that of the ids.
      name, facts: see `Shown`.
    """
    held = [line >= 0 for line in (*description.tokens.values(), *description.numbers.values())]
    n = int(np.flatnonzero(np.any(held, axis=0))[-1]) + 1
    ids = {title: line[:n] for title, line in description.tokens.items()}
    first = next(iter(ids.values()))
    lines = [_line(title, line, first, vocabulary) for title, line in ids.items()]
    gaps = [ids[line.title] >= 0 for line in lines if not line.whole]
    return Shown(
        name,
        facts,
        lines,
        [line.pieces for line in lines if line.whole][-1],
        np.any([np.zeros(n, bool), *gaps], axis=0),
        {title: line[:n] for title, line in description.numbers.items()},
        {title: matrix[:n, :n] for title, matrix in description.sees.items()},
    )


def _line(title: str, ids: np.ndarray, first: np.ndarray, vocabulary) -> Line:
    whole = bool(np.all((ids >= 0) | (first < 0)))

    def mark(own, other):
        if own < 0:
            return PLAIN
        if not whole:
            return ANSWER
        if own != other:
            return CHANGED
        return SPECIAL if own in vocabulary.special_ids else PLAIN

    pieces = vocabulary.pieces(np.maximum(ids, 0))
    return Line(
        title,
        [_readable(piece) if own >= 0 else "" for piece, own in zip(pieces, ids, strict=True)],
        [mark(own, other) for own, other in zip(ids.tolist(), first.tolist(), strict=True)],
        whole,
    )


_SIGNS = str.maketrans({"\u2581": "·", " ": "·", "\n": "↵", "\t": "⇥"})


def _readable(piece: str) -> str:
    """A space is a dot; what moves the cursor or shows nothing has a sign of its own."""
    return "".join(c if c.isprintable() else "\ufffd" for c in piece.translate(_SIGNS))


def bands(widths: list[float], available: float) -> list[range]:
    """Columns in bands that fit; one that is too wide by itself has a band of its own."""
    starts, used = [0], 0.0
    for column, width in enumerate(widths):
        if used + width > available and column > starts[-1]:
            starts.append(column)
            used = 0.0
        used += width
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(widths)], strict=True)]
