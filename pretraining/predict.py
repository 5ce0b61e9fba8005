"""Predictions through the optional parts of an objective: one row in, log-probabilities out."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from pretraining.data.row import Row
from pretraining.errors import UserError

BATCH = 16  # rows of one forward pass


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


def token_scores(objective, params, row: Row, skip: tuple[int, ...]) -> np.ndarray:
    """[length]: a value for every token of a row, higher where likelier; 0 for the ids in `skip`.

    The objective's own score where it has one (one pass over the intact row), log-likelihoods
    otherwise.
    """
    if objective.score is None:
        return token_log_likelihoods(objective, params, row, skip)
    function = _score_function(objective.query, objective.score, objective.model)
    values = np.asarray(function(params, next(_batches([row]))))[0, : int(row.length)]
    return np.where(np.isin(row.tokens[: len(values)], skip), 0.0, values)


def token_log_likelihoods(objective, params, row: Row, skip: tuple[int, ...]) -> np.ndarray:
    """[length] log-likelihood of every token of a row; 0 for the ids in `skip`.

    Exact where positions see only their left (one pass). Where they see both sides it is the
    pseudo-log-likelihood (Salazar et al. 2020): each token masked alone, all others visible.
    """
    length, everywhere = int(row.length), np.arange(row.tokens.shape[0])
    labels = row.tokens[:length]
    if objective.context == "left":
        values = log_probs(objective, params, [row], everywhere[None])[0]
    else:
        alone = everywhere[:length, None]
        batches = _log_prob_batches(objective, params, [row] * length, alone)
        values = np.concatenate([batch[:, 0] for batch in batches])
    return np.where(np.isin(labels, skip), 0.0, values[everywhere[:length], labels])


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
def _score_function(query, score, model):
    return jax.jit(lambda params, rows: score(model.apply, params, _intact(query, rows)))


@functools.lru_cache(maxsize=8)
def _encode_function(query, encode, model, layer):
    return jax.jit(lambda params, rows: encode(model.apply, params, _intact(query, rows))[layer])


def _intact(query, rows: Row):
    """The examples of whole rows, nothing being asked."""
    return jax.vmap(query)(rows, np.zeros((rows.length.shape[0], 0), np.int32))
