"""One update and one evaluation: pure functions of (state, rows), the same for every objective.

Corruption happens here, on the device: keys come from (seed, step, index), so masks are the same on
any number of devices and hosts, and after any resume.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pretraining import random
from pretraining.data.row import Row
from pretraining.state import LossAverage, State, corrupt_rows

Terms = dict[str, Any]  # name -> objectives.base.Term


def train_step(
    objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    config,
) -> Callable[[State, Row, random.Seeds], tuple[State, dict[str, jax.Array]]]:
    """Builds `(state, rows [B], seeds) -> (state, metrics)`; jit it with the state donated.

    A loss or gradient that is not finite changes nothing but the counters: the old parameters are
    gone once their buffers are donated, so the update must be discarded in here.

    Metrics (float32 scalars): `loss`, every term's mean, `gradient_norm` (before clipping),
    `learning_rate`, `knobs/<name>`, `fill` (the share of the payload that is no padding), `skipped`
    (updates discarded so far), `loss_deviation` (see `watch`), and for the guard alone `finite`
    (bool) and `skipped_in_a_row` (int32).
    """
    parts = config.train.accumulation

    def step(state: State, rows: Row, seeds: random.Seeds):
        examples, knobs, dropout = inputs(objective, seeds, state.step, rows)
        grads, metrics = gradients(objective, state.params, examples, knobs, dropout, parts)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        # The optimizer counts the updates that it made: those that were skipped don't count.
        metrics["learning_rate"] = jnp.asarray(
            learning_rate(state.step - state.skipped), jnp.float32
        )
        metrics |= {f"knobs/{name}": value for name, value in knobs.items()}
        # Summed as integers: the same on any mesh.
        metrics["fill"] = rows.length.sum().astype(jnp.float32) / rows.tokens.size
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        losses, metrics["loss_deviation"] = watch(
            state.losses, metrics["loss"], config.guard.spike_memory
        )
        state = _update(state, grads, optimizer, config.train.ema, finite, losses)
        metrics["skipped"] = state.skipped.astype(jnp.float32)
        return state, metrics | {"finite": finite, "skipped_in_a_row": state.skipped_in_a_row}

    return step


def inputs(
    objective, seeds: random.Seeds, step: jax.Array, rows: Row
) -> tuple[Any, dict, jax.Array]:
    """What the update at `step` makes of its rows [B]: (examples, knobs, key of the dropout)."""
    knobs = objective.schedule(step)
    corruption = random.stream(seeds.corruption, "corruption", step)
    examples = corrupt_rows(objective, corruption, rows, knobs)
    return examples, knobs, random.stream(seeds.dropout, "dropout", step)


def watch(average: LossAverage, loss: jax.Array, memory: int) -> tuple[LossAverage, jax.Array]:
    """The average with one more loss, and how many standard deviations the loss lies above it.

    That is 0 until `memory` losses have been seen, and for a loss that is not finite, which does
    not enter the average.
    """
    finite, deviation = jnp.isfinite(loss), loss - average.mean
    share = 1 / jnp.minimum(average.count + 1, memory)
    updated = LossAverage(
        mean=average.mean + share * deviation,
        variance=(1 - share) * (average.variance + share * deviation**2),
        count=average.count + 1,
    )
    known = finite & (average.count >= memory) & (average.variance > 0)
    sd = jnp.sqrt(jnp.where(known, average.variance, 1.0))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, average)
    return kept, jnp.where(known, deviation / sd, 0.0)


def _update(state: State, grads, optimizer, ema_decay: float, finite, losses) -> State:
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
        ema = optax.incremental_update(params, ema, 1 - ema_decay)
    params, optimizer_state, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, optimizer_state, ema),
        (state.params, state.optimizer, state.ema),
    )
    now = jnp.where(finite, 0, 1).astype(jnp.int32)
    in_a_row = (state.skipped_in_a_row + now) * now
    return State(
        step=state.step + 1,
        params=params,
        optimizer=optimizer_state,
        ema=ema,
        skipped=state.skipped + now,
        skipped_in_a_row=in_a_row,
        losses=losses,
    )


def gradients(objective, params, examples, knobs, key, parts: int) -> tuple[Any, dict]:
    """The gradient of the loss over all examples [B, ...], and {"loss", each term's mean}.

    With `parts` microbatches each is divided by the summed weights of all of them, so that losses,
    means and gradients simply add up to those of the one big batch (dropout apart, which draws by
    microbatch). Weights depend on examples alone: the forward pass that would produce them first is
    dead code, and the compiler removes it.
    """

    def loss(params, example, key, weights=None):
        terms = objective.loss(objective.model.apply, params, example, knobs, key, True)
        if weights is not None:
            terms = {name: t._replace(weight=weights[name]) for name, t in terms.items()}
        value = total(terms)
        return value, {"loss": value} | {name: mean(term) for name, term in terms.items()}

    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, examples, key)

    def weigh(example, key):
        terms = objective.loss(objective.model.apply, params, example, knobs, key, True)
        return {name: term.weight for name, term in terms.items()}

    micro = jax.tree.map(lambda x: _split(x, parts), examples), jax.random.split(key, parts)
    weights = jax.tree.map(jnp.sum, jax.lax.map(lambda part: weigh(*part), micro))

    def accumulate(sums, part):
        return jax.tree.map(jnp.add, sums, gradient(params, *part, weights)), None

    like = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return jax.lax.scan(accumulate, zeros, micro)[0]


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; part m holds rows m, m + parts, ...

    Strided, so that every device keeps its own rows in every microbatch.
    """
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def mean(term) -> jax.Array:
    """sum / (weight + smooth) of a Term, where 0 / 0 = 0 (with a gradient of 0)."""
    denominator = term.weight + term.smooth
    safe = jnp.where(denominator > 0, denominator, 1.0)
    return jnp.where(denominator > 0, term.sum / safe, 0.0)


def total(terms: Terms) -> jax.Array:
    """The loss: the sum over terms of scale x mean."""
    return sum((mean(term) * term.scale for term in terms.values()), jnp.zeros((), jnp.float32))


def evaluation_step(objective) -> Callable[[Any, Row, random.Seeds], Terms]:
    """Builds `(params, rows [B], seeds) -> terms`, summed over the batch, without dropout.

    Masks are a function of (seeds.evaluation, row.index): the same at every evaluation, for
    any batch size, in every run of a sweep.
    """

    def step(params, rows: Row, seeds: random.Seeds) -> Terms:
        knobs = jax.tree.map(
            lambda knob: jnp.asarray(knob, jnp.float32), objective.evaluation_knobs
        )
        key = random.stream(seeds.evaluation, "evaluation")
        examples = corrupt_rows(objective, key, rows, knobs)
        return objective.loss(objective.model.apply, params, examples, knobs, key, False)

    return step
