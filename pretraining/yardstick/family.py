"""Figures of a run's own prediction of tokens; they compare runs of one `Objective.family` alone.

All are of the first rows of the validation split, the same for every run on the store.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from pretraining import predict
from pretraining.data.row import Row

SEED = 15  # of the positions that are masked
RATE = 0.15  # of the tokens of a row


class Sample(NamedTuple):
    """How many rows of each validation source are read."""

    rows: int
    pseudo_rows: int


SAMPLES = {"quick": Sample(1_024, 4), "full": Sample(8_192, 64)}


def measure(run, stores, sample: Sample) -> dict[str, float]:
    """Where positions see their left `bits_per_byte`, else `masked_loss` and `pseudo_perplexity`.

    An objective without `query`, or of no family, has none. Where nothing is replaced by [MASK]
    (permutations) the masked tokens are hidden from everybody instead. Where it is another network
    than the encoder that predicts, its name stands before: `generator_masked_loss`.

    Args:
      stores: ((store, weight), ...) whose `validation` split is read; weights play no part.
    """
    objective = run.objective
    if objective.query is None or objective.log_probs is None or not objective.family:
        return {}
    if objective.context == "left":
        found = {"bits_per_byte": bits_per_byte(run, stores, sample.rows)}
    else:
        found = {
            "masked_loss": masked_loss(run, stores, sample.rows),
            "pseudo_perplexity": pseudo_perplexity(run, stores, sample.pseudo_rows)[0],
        }
    of = f"{objective.predictor}_" if objective.predictor else ""
    return {of + name: value for name, value in found.items()}


def masked_loss(run, stores, count: int) -> float:
    """Mean NLL (nats) of `RATE` of the tokens of each row, all hidden at once; see `positions`."""
    found = [
        (row, chosen)
        for number, row in _rows(stores, run.payload, count)
        if len(chosen := positions(row, number, run.vocabulary.special_ids))
    ]
    if not found:
        return math.nan
    rows = [row for row, _ in found]
    # One shape for all rows: to ask for the last position again changes nothing.
    most = max(len(chosen) for _, chosen in found)
    asked = np.stack([np.pad(chosen, (0, most - len(chosen)), "edge") for _, chosen in found])
    values = predict.label_log_probs(run.objective, run.params, rows, np.arange(len(rows)), asked)
    kept = np.arange(most) < np.array([[len(chosen)] for _, chosen in found])
    return -float(np.mean(values[kept], dtype=np.float64))


def positions(row: Row, number: tuple[int, int], special_ids: tuple[int, ...]) -> np.ndarray:
    """The payload positions that are masked, ascending: `RATE` of those without special tokens,
    rounded (halves to even), at least one; drawn by SEED and the number of source and row alone.
    """
    candidates = np.flatnonzero(~np.isin(row.tokens[: row.length], special_ids))
    draw = np.random.default_rng([SEED, *number]).random(row.tokens.shape[0])[candidates]
    count = min(len(candidates), max(1, round(RATE * len(candidates))))
    return np.sort(candidates[np.argsort(draw)[:count]])


def bits_per_byte(run, stores, count: int) -> float:
    """Bits of all tokens, separators too, over the bytes of normalised text they stand for."""
    rows = [row for _, row in _rows(stores, run.payload, count)]
    values = predict.log_likelihoods(run.objective, run.params, rows, ())
    nats = -math.fsum(value.sum(dtype=np.float64) for value in values)
    size = sum(int(run.vocabulary.bytes_per_id[row.tokens[: row.length]].sum()) for row in rows)
    return nats / math.log(2) / size if size else math.nan


def pseudo_perplexity(run, stores, count: int) -> tuple[float, int]:
    """exp of the mean NLL of tokens masked one at a time (Salazar et al. 2020), and of how many."""
    skip, nats, total = run.vocabulary.special_ids, 0.0, 0
    for _, row in _rows(stores, run.payload, count):
        (values,) = predict.log_likelihoods(run.objective, run.params, [row], skip)
        nats -= math.fsum(values.tolist())
        total += int((~np.isin(row.tokens[: row.length], skip)).sum())
    return (math.exp(nats / total) if total else math.nan), total


def _rows(stores, payload: int, count: int) -> Iterator[tuple[tuple[int, int], Row]]:
    """((source, number), row) of the first rows of every source."""
    for source, split in enumerate(store.validation for store, _ in stores):
        for number in range(min(count, split.rows(payload))):
            (row,) = [jax.tree.map(lambda field: field[0], split.read([number], payload))]
            yield (source, number), row
