"""The corruption that masked language models share: choose tokens, put something in their place.

It reads the keys of `config.objective` that configs/masked_lm.py explains. An objective that masks
in another way replaces a part: a unit of selection, a replacement, or the fields of its example.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from objectives import base, selection
from objectives.base import Description
from pretraining.data.row import SPECIAL_POSITIONS, Row
from pretraining.errors import UserError
from pretraining.models.attention import Attention


class Example(NamedTuple):
    """A corrupted row; K slots for what is predicted.

    Attributes:
      tokens: [L] int32, what the model sees.
      length: [] int32, valid positions, [CLS] and [SEP] included.
      document: [L] int32, or None without `config.model.document_attention`.
      corrupted: [L] bool, chosen, even if the token stayed what it was.
      positions: [K] int32, positions of the model that are predicted; 0 in unused slots.
      labels: [K] int32, the tokens that stood there; padding in unused slots.
      weights: [K] float32, 1 or, in unused slots, 0.
      overflow: [] float32, tokens that should be predicted but found no slot.
    """

    tokens: Any
    length: Any
    document: Any
    corrupted: Any
    positions: Any
    labels: Any
    weights: Any
    overflow: Any


class Masking(NamedTuple):
    """The parts of an Objective that concern corruption, and K."""

    corrupt: Callable[..., Example]
    schedule: Callable[[jax.Array], dict[str, jax.Array]]
    evaluation_knobs: dict[str, float]
    slots: int


def create(config, vocabulary) -> Masking:
    """What `config.objective` says.

    Raises:
      UserError: a key is out of range or contradicts another, or the vocabulary has no [CLS], [SEP]
        or [MASK].
    """
    _check(config)
    base.require(vocabulary, config.objective.name, "cls", "sep", "mask")
    rule, copies = config.objective.count, config.data.copies
    size = config.data.sequence_length - SPECIAL_POSITIONS
    slots = max(selection.largest_budget(rule, rate, size) for rate in _largest_rates(config))
    unit, replace = make_unit(config), make_replace(config, vocabulary)

    def corrupt(key: jax.Array, row: Row, knobs: dict[str, jax.Array]) -> Example:
        """Formats a row as [CLS] payload [SEP] padding, and corrupts it.

        The copies of a row share `key`: they corrupt disjoint tokens, and replace them by draws of
        their own. With `predict_rate` below `mask_rate`, what was chosen first is predicted.

        Example: L = 11, T = 8 payload tokens of which 7 are valid, mask_rate .3, predict_rate .2.
        BERT's counts are round(.3 x (7 + 2)) = 3 and round(.2 x (7 + 2)) = 2; here K = 2. "old",
        "cat" and "mat" are chosen, in this order, and masked, kept and replaced by "dog".

          row.tokens          the    cat    sat    on     the    old    mat    (pad)
          tokens       [CLS]  the    cat    sat    on     the    [MASK] dog    [SEP]  [PAD]  [PAD]
          corrupted    0      0      1      0      0      0      1      1      0      0      0
          length       9
          positions    6 2,  labels  old cat,  weights  1 1
        """
        count_key, order_key, replace_key = jax.random.split(key, 3)
        words = selection.find_words(row, vocabulary.special_ids)
        rate, predict_rate = knobs["mask_rate"], knobs["predict_rate"]
        budget, predict = selection.budgets(
            rule, count_key, words.candidate, row.length, rate, predict_rate, copies
        )
        rank = selection.select(unit, order_key, words, budget, row.copy)
        chosen = rank < size
        tokens = replace(jax.random.fold_in(replace_key, row.copy), row.tokens, chosen, knobs)
        return Example(
            **_frame(config, vocabulary, row, tokens, row.length),
            corrupted=jnp.pad(chosen, (1, SPECIAL_POSITIONS - 1)),
            **_targets(row.tokens, rank, predict[row.copy], slots, base.padding(vocabulary)),
        )

    return Masking(corrupt, make_schedule(config), evaluation_knobs(config), slots)


def query(config, vocabulary, row: Row, positions: jax.Array) -> Example:
    """[MASK] at the queried payload positions [Q], the rest intact; K = Q.

    Position `row.length` appends a [MASK] to the payload.
    """
    tokens = jnp.pad(row.tokens, (0, 1))
    asked = jnp.any(jnp.arange(tokens.shape[0])[:, None] == positions[None], axis=1)
    masked = jnp.where(asked, vocabulary.mask, tokens)
    length = row.length + asked[row.length].astype(jnp.int32)
    known = positions < row.length
    return Example(
        **_frame(config, vocabulary, row, masked, length),
        corrupted=jnp.pad(asked, (1, SPECIAL_POSITIONS - 2)),
        positions=positions + 1,
        labels=jnp.where(known, tokens[positions], base.padding(vocabulary)),
        weights=known.astype(jnp.float32),
        overflow=jnp.zeros((), jnp.float32),
    )


def describe(apply, params, row: Row, example: Example) -> Description:
    """The row before and after corruption, what is predicted, and who sees whom."""
    size = example.tokens.shape[0]
    inside = jnp.pad(row.tokens, (1, SPECIAL_POSITIONS - 1))
    original = jnp.where(example.corrupted, inside, example.tokens)
    attention = Attention(False, example.length, example.document)
    return Description(
        tokens={
            "original": base.blank(original, example.length),
            "input": base.blank(example.tokens, example.length),
            "predicted": base.at_positions(
                example.positions, example.labels, example.weights, size
            ),
        },
        numbers={},
        sees={"attention": base.see(attention, size)},
    )


def _frame(config, vocabulary, row, tokens, length):
    size, fill = config.data.sequence_length, base.padding(vocabulary)
    return {
        "tokens": base.frame(tokens, length, size, vocabulary.cls, vocabulary.sep, fill),
        "length": length + 2,
        "document": base.frame_document(row, size) if config.model.document_attention else None,
    }


def _targets(tokens, rank, predict, slots, fill):
    """The tokens with rank < predict, that of rank k in slot k."""
    wanted = rank < predict
    slot = jnp.where(wanted, rank, slots)
    source = jnp.zeros(slots, jnp.int32).at[slot].set(jnp.arange(rank.shape[0]), mode="drop")
    used = jnp.arange(slots) < wanted.sum()
    weights = used.astype(jnp.float32)
    return {
        "positions": jnp.where(used, source + 1, 0),
        "labels": jnp.where(used, tokens[source], fill),
        "weights": weights,
        "overflow": jnp.sum(wanted, dtype=jnp.float32) - weights.sum(),
    }


def make_unit(config) -> Callable[..., jax.Array]:
    """The unit of selection that `config.objective.unit` names; see objectives/selection.py."""
    objective = config.objective
    return {
        "token": selection.tokens,
        "whole_word": selection.whole_words,
        "span": functools.partial(
            selection.spans,
            probability=objective.span_probability,
            longest=objective.span_longest,
        ),
        "ngram": functools.partial(selection.ngrams, longest=objective.ngram_longest),
    }[objective.unit]


# ------------------------------------------------------------------------------------ replacement


def make_replace(config, vocabulary) -> Callable[..., jax.Array]:
    """What stands in the place of a chosen token: `(key, tokens [T], chosen [T], knobs) -> [T]`.

    One uniform draw decides between [MASK], a random token and the token itself: a draw for each
    token (BERT), or with `replacement_unit` "span" for each run of chosen tokens, in which random
    tokens are still drawn one by one (SpanBERT, masking.py, span_masking).
    """
    by_span = config.objective.replacement_unit == "span"
    draw_random = random_tokens(config, vocabulary)

    def replace(key, tokens, chosen, knobs):
        choice_key, random_key = jax.random.split(key)
        choice = jax.random.uniform(choice_key, tokens.shape)
        if by_span:
            choice = choice[selection.run_starts(chosen)]
        changed = knobs["mask_fraction"] + knobs["random_fraction"]
        other = jnp.where(choice < changed, draw_random(random_key, tokens.shape), tokens)
        replaced = jnp.where(choice < knobs["mask_fraction"], vocabulary.mask, other)
        return jnp.where(chosen, replaced, tokens)

    return replace


def random_tokens(config, vocabulary) -> Callable[..., jax.Array]:
    """How random tokens are drawn, `(key, shape) -> ids`, by `config.objective.random_tokens`.

    all: every id alike, special ones too (BERT). no_specials: every other id alike (RoBERTa, which
    still draws [MASK]). unigram: by frequency in the training split, special ids never (SpanBERT).
    """
    kind = config.objective.random_tokens
    if kind == "all":
        return lambda key, shape: jax.random.randint(key, shape, 0, vocabulary.size)
    counts = np.ones(vocabulary.size) if kind == "no_specials" else vocabulary.unigram_counts
    counts = np.array(counts, np.float64)
    counts[list(vocabulary.special_ids)] = 0
    if not counts.any():
        raise UserError(
            f"config.objective.random_tokens={kind!r}: the vocabulary has no counts to draw from"
        )
    ids = np.flatnonzero(counts)
    # 32 random bits against the distribution function: float32 would lose the rare tokens.
    edges = np.cumsum(counts[ids])[:-1] / counts.sum() * 2**32
    edges = np.minimum(np.round(edges), 2**32 - 1).astype(np.uint32)

    def draw(key, shape):
        place = jnp.searchsorted(edges, jax.random.bits(key, shape), side="right")
        return jnp.asarray(ids, jnp.int32)[place]

    return draw


# ------------------------------------------------------------------------------------------ knobs


def make_schedule(config) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """step -> knobs: `mask_rate` runs from its first value at step 0 to the final one at the end.

    The other knobs are constant: `predict_rate` (1 = all that is corrupted), `mask_fraction` and
    `random_fraction`. Needs `config.train.steps` as an int unless the rate is constant.
    """
    objective = config.objective
    start, end = objective.mask_rate, _final_rate(config)
    linear = lambda step: jnp.clip(step / config.train.steps, 0, 1)
    share = {
        "constant": lambda step: 0.0,
        "linear": linear,
        "cosine": lambda step: (1 - jnp.cos(jnp.pi * linear(step))) / 2,
    }[objective.mask_rate_schedule]
    constant = {
        "predict_rate": objective.predict_rate or 1.0,
        "mask_fraction": objective.mask_fraction,
        "random_fraction": objective.random_fraction,
    }

    def schedule(step):
        knobs = constant | {"mask_rate": start + (end - start) * share(step)}
        return {name: jnp.asarray(value, jnp.float32) for name, value in knobs.items()}

    return schedule


def evaluation_knobs(config) -> dict[str, float]:
    """BERT's replacement at `evaluation_mask_rate`; everything that is corrupted is predicted."""
    return {
        "mask_rate": config.objective.evaluation_mask_rate,
        "predict_rate": 1.0,
        "mask_fraction": 0.8,
        "random_fraction": 0.1,
    }


def _final_rate(config):
    return config.objective.mask_rate_final or config.objective.mask_rate


def _largest_rates(config):
    """Of what is predicted in training, and in evaluation."""
    objective = config.objective
    highest = max(objective.mask_rate, _final_rate(config))
    return objective.predict_rate or highest, objective.evaluation_mask_rate


# ----------------------------------------------------------------------------------------- checks

_CHOICES = {
    "unit": ("token", "whole_word", "span", "ngram"),
    "count": selection.COUNT_RULES,
    "mask_rate_schedule": ("constant", "linear", "cosine"),
    "random_tokens": ("all", "no_specials", "unigram"),
    "replacement_unit": ("token", "span"),
}
_RANGES = {
    "mask_rate": (1 / selection.GRID, 1),
    "mask_rate_final": (0, 1),
    "predict_rate": (0, 1),
    "evaluation_mask_rate": (1 / selection.GRID, 1),
    "mask_fraction": (0, 1),
    "random_fraction": (0, 1),
    "keep_fraction": (0, 1),
    "span_probability": (0, 1),
    "span_longest": (1,),
    "ngram_longest": (1,),
}


def _check(config) -> None:
    base.check(config, _CHOICES, _RANGES)
    _check_fractions(config.objective)
    _check_rates(config.objective, config.data.copies)


def _check_fractions(objective) -> None:
    total = objective.mask_fraction + objective.random_fraction + objective.keep_fraction
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError(
            f"config.objective.mask_fraction={objective.mask_fraction}, random_fraction="
            f"{objective.random_fraction}, keep_fraction={objective.keep_fraction} must add up to 1"
        )


def _check_rates(objective, copies) -> None:
    first, final = objective.mask_rate, objective.mask_rate_final
    constant = objective.mask_rate_schedule == "constant"
    if (constant and final not in (0, first)) or not (constant or final):
        raise UserError(
            f"config.objective.mask_rate_final={final} contradicts "
            f"config.objective.mask_rate_schedule={objective.mask_rate_schedule!r}"
        )
    rates = first, final or first
    if objective.predict_rate > min(rates):
        raise UserError(
            f"config.objective.predict_rate={objective.predict_rate} is above the lowest mask "
            f"rate, {min(rates)}: to predict more than is corrupted, raise config.data.copies"
        )
    if copies * max(rates) > 1:
        raise UserError(
            f"config.data.copies={copies} x the highest mask rate, {max(rates)}, is above 1: the "
            "copies of a row corrupt disjoint tokens"
        )
