"""Predictions through the optional parts of an objective: one row in, log-probabilities out."""

import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pretraining.data.row import Row
from pretraining.errors import UserError

BATCH = 16  # rows of one forward pass
POSITIONS = 2048  # of one forward pass over many rows
ANSWERS = 512  # at most in one pass, each with the whole vocabulary, unless one row asks for more


def require(objective, what: str, *, context: str | None = None) -> None:
    """Refuses what the objective has no part for, in one line.

    Args:
      what: the thing asked for, e.g. "fill_mask".
      context: "left" or "both" where the thing needs a queried position to see just that.
    """
    if objective.query is None or objective.log_probs is None:
        raise UserError(f"{what} is not available: the objective has no query or log_probs")
    if context and objective.context != context:
        sees = {"left": "what stands before it", "both": "both sides"}
        raise UserError(
            f"{what} needs an objective whose positions see {sees[context]}; "
            f"those of this one see {sees[objective.context]}"
        )


def make_row(tokens, boundary, payload: int, what: str = "the text") -> Row:
    """The Row of one sequence of at most `payload` tokens (one document).

    Raises:
      UserError: it is longer than the model's rows, or empty.
    """
    count = len(tokens)
    if not 0 < count <= payload:
        raise UserError(f"{what} has {count} tokens; this model takes 1 to {payload}")
    padded = np.zeros(payload, np.int32)
    padded[:count] = tokens
    flags = np.zeros(payload, np.uint8)
    flags[:count] = boundary
    return Row(
        padded, np.int32(count), np.zeros(payload, np.int32), flags, np.int32(0), np.int32(0)
    )


def text_row(vocabulary, text: str, payload: int) -> Row:
    """The Row of one text."""
    tokens, boundary = vocabulary.encode_document(text)
    return make_row(tokens, boundary, payload, f"the text {text[:30]!r}...")


def log_probs(objective, params, rows: list[Row], positions: np.ndarray) -> np.ndarray:
    """[n, Q, V] float32: log-probabilities at payload positions [n, Q] of n rows.

    Masked objectives mask the queried positions of a row all at once.
    """
    parts = list(_log_prob_batches(objective, params, rows, positions))
    return np.concatenate(parts)[: len(rows)]


def encode(objective, params, rows: list[Row], layer: int) -> np.ndarray:
    """[n, T, D]: vectors of the payload after `layer` (0 = the embeddings, -1 = the last)."""
    function = _encode_function(objective.query, objective.encode, objective.model, layer)
    parts = [np.asarray(function(params, batch)) for batch in _batches(rows)]
    return np.concatenate(parts)[: len(rows)]


def pooled(objective, params, rows: list[Row]) -> dict[str, np.ndarray]:
    """{"mean", "cls"}: [n, D] each, the mean of the last block's vectors of a row's tokens, and its
    `summary`, where the objective has one.
    """
    parts = objective.query, objective.encode, objective.summary, objective.model
    return _in_batches(_pooled_function(*parts), params, _stack(rows), np.arange(len(rows)))


def token_scores(objective, params, row: Row, skip: tuple[int, ...]) -> np.ndarray:
    """[length]: a value for every token of a row, higher where likelier; 0 for the ids in `skip`.

    The objective's own score where it has one (one pass over the intact row), log-likelihoods
    otherwise.
    """
    return scores(objective, params, [row], skip)[0]


def token_log_likelihoods(objective, params, row: Row, skip: tuple[int, ...]) -> np.ndarray:
    """[length] log-likelihood of every token of a row; see `log_likelihoods`."""
    return log_likelihoods(objective, params, [row], skip)[0]


def scores(objective, params, rows: list[Row], skip: tuple[int, ...]) -> list[np.ndarray]:
    """`token_scores` of many rows of one size."""
    if objective.score is None:
        return log_likelihoods(objective, params, rows, skip)
    function = _score_function(objective.query, objective.score, objective.model)
    stacked = _stack(rows)
    values = _in_batches(function, params, stacked, np.arange(len(rows)))
    return _cut(np.where(np.isin(stacked.tokens, skip), 0.0, values), stacked)


def log_likelihoods(objective, params, rows: list[Row], skip: tuple[int, ...]) -> list[np.ndarray]:
    """[length] log-likelihoods of the tokens of each of many rows; 0 for the ids in `skip`.

    Exact where positions see only their left (one pass). Where they see both sides it is the
    pseudo-log-likelihood (Salazar et al. 2020): each token masked alone, all others visible.
    """
    stacked = _stack(rows)
    everywhere = np.arange(stacked.tokens.shape[1])
    counts = (everywhere < stacked.length[:, None]) & ~np.isin(stacked.tokens, skip)
    if objective.context == "left":
        found = [
            label_log_probs(objective, params, rows, np.arange(len(rows)), positions)
            for start in range(0, len(everywhere), ANSWERS)
            for positions in [np.tile(everywhere[start : start + ANSWERS], (len(rows), 1))]
        ]
        return _cut(np.where(counts, np.concatenate(found, axis=1), 0.0), stacked)
    which, place = np.nonzero(counts)
    values = np.zeros(counts.shape)
    if which.size:
        alone = label_log_probs(objective, params, rows, which, place[:, None])
        values[which, place] = alone[:, 0]
    return _cut(values, stacked)


def label_log_probs(
    objective, params, rows: list[Row], which: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """[m, Q] log-probabilities of what stands at payload positions [m, Q] of the rows `which` [m].

    The queried positions of one entry are masked all at once, where the objective masks.
    """
    function = _label_function(objective.query, objective.log_probs, objective.model)
    most = max(1, ANSWERS // positions.shape[1])
    where = positions.astype(np.int32)
    return _in_batches(function, params, _stack(rows), which, where, most=most)


def _stack(rows: list[Row]) -> Row:
    return jax.tree.map(lambda *x: np.stack(x), *rows)


def _cut(values: np.ndarray, rows: Row) -> list[np.ndarray]:
    return [value[:length] for value, length in zip(values, rows.length, strict=True)]


def _in_batches(
    function, params, rows: Row, which: np.ndarray, *others: np.ndarray, most: int = POSITIONS
):
    """`function(params, rows[which], *others)`, about POSITIONS positions, `most` rows at once.

    The last batch is filled up with its last entry, so that one compiled program serves all.
    """
    several = max(1, POSITIONS // rows.tokens.shape[1])
    size = min(several, most, 1 << (len(which) - 1).bit_length())
    parts = []
    for start in range(0, len(which), size):
        entries = np.minimum(np.arange(start, start + size), len(which) - 1)
        taken = jax.tree.map(operator.itemgetter(which[entries]), rows)
        parts.append(function(params, taken, *(other[entries] for other in others)))
    parts = jax.device_get(parts)
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(which)], *parts)


def _log_prob_batches(objective, params, rows, positions) -> Iterator[np.ndarray]:
    function = _query_function(objective.query, objective.log_probs, objective.model)
    for row, where in zip(_batches(rows), _batches(list(positions)), strict=True):
        yield np.asarray(function(params, row, where.astype(np.int32)))


def _batches(items: list) -> Iterator:
    """Stacks of BATCH items; a single item makes a stack of one.

    A short stack is filled up with its last item, so that one compiled program serves all.
    """
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        filler = [part[-1]] * (BATCH - len(part) if len(items) > 1 else 0)
        yield jax.tree.map(lambda *x: np.stack(x), *part, *filler)


@functools.lru_cache(maxsize=8)
def _query_function(query, log_probs, model):
    def function(params, rows, positions):
        examples = jax.vmap(query)(rows, positions)
        return log_probs(model.apply, params, examples)

    return jax.jit(function)


@functools.lru_cache(maxsize=8)
def _label_function(query, log_probs, model):
    def function(params, rows, positions):
        values = log_probs(model.apply, params, jax.vmap(query)(rows, positions))
        labels = jnp.take_along_axis(rows.tokens, positions, axis=1)
        return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]

    return jax.jit(function)


@functools.lru_cache(maxsize=8)
def _pooled_function(query, encode, summary, model):
    def function(params, rows):
        example = _intact(query, rows)
        vectors = encode(model.apply, params, example)[-1].astype(jnp.float32)
        valid = jnp.arange(vectors.shape[1])[None] < rows.length[:, None]
        total = jnp.sum(vectors, axis=1, where=valid[..., None])
        found = {"mean": total / jnp.maximum(rows.length, 1)[:, None].astype(jnp.float32)}
        if summary is not None:
            found["cls"] = summary(model.apply, params, example).astype(jnp.float32)
        return found

    return jax.jit(function)


@functools.lru_cache(maxsize=8)
def _score_function(query, score, model):
    return jax.jit(lambda params, rows: score(model.apply, params, _intact(query, rows)))


@functools.lru_cache(maxsize=8)
def _encode_function(query, encode, model, layer):
    return jax.jit(lambda params, rows: encode(model.apply, params, _intact(query, rows))[layer])


def _intact(query, rows: Row):
    """The examples of whole rows, nothing being asked."""
    return jax.vmap(query)(rows, np.zeros((rows.length.shape[0], 0), np.int32))
