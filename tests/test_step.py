"""The update, on an objective small enough to follow by hand: fit y = w x, in weighted squares."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from objectives.base import Objective, Term
from pretraining import random, step
from pretraining.data.row import Row
from pretraining.state import LossAverage, State


class Line(nn.Module):
    @nn.compact
    def __call__(self, x, key=None):
        return x * self.param("w", nn.initializers.constant(2.0), ())


def corrupt(key, row, knobs):
    """x = the row's tokens; the weight is 1 on its first `length` tokens; noise by address."""
    noise = jax.random.uniform(key)
    return {
        "x": row.tokens.astype(jnp.float32) * knobs["scale"],
        "weight": (jnp.arange(row.tokens.shape[0]) < row.length).astype(jnp.float32),
        "noise": noise,
    }


def loss(apply, params, example, knobs, key, train):
    error = jnp.square(apply({"params": params}, example["x"]) - 1.0)
    weight = example["weight"].sum()
    return {
        "square": Term((error * example["weight"]).sum(), weight),
        "noise": Term(example["noise"].sum(), jnp.float32(example["noise"].size), 0.0),
        "smoothed": Term((error * example["weight"]).sum(), weight, 0.5, 1.0),
    }


OBJECTIVE = Objective(
    model=Line(),
    schedule=lambda step: {"scale": 1.0 + step.astype(jnp.float32)},
    evaluation_knobs={"scale": 1.0},
    corrupt=corrupt,
    loss=loss,
    context="both",
)
TOKENS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]], np.int32)
LENGTHS = np.array([3, 1, 0, 2], np.int32)
SEEDS = random.Seeds(*map(np.uint32, (0, 7, 0, 5)))  # corruption 7, evaluation 5


def config(accumulation=1, ema=0.0):
    seed = dict(init=0, data=0, corruption=7, dropout=0, evaluation=5)
    guard = dict(spike_memory=4)
    return ConfigDict(dict(train=dict(accumulation=accumulation, ema=ema), seed=seed, guard=guard))


def rows():
    index = np.arange(4, dtype=np.int32)
    return Row(TOKENS, LENGTHS, np.zeros_like(TOKENS), np.zeros((4, 3), np.uint8), index, 0 * index)


def state(optimizer, w=2.0, ema=None):
    params = {"w": jnp.float32(w)}
    ema = None if ema is None else {"w": jnp.float32(ema)}
    losses = LossAverage(*[jnp.float32(0)] * 3)
    zero = jnp.int32(0)
    return State(zero, params, optimizer.init(params), ema, zero, zero, losses)


def by_hand(w):
    """Loss and gradient over the six tokens that count: 1 2 3 | 4 | | 1 1."""
    x = np.array([1, 2, 3, 4, 1, 1], np.float64)
    squares, slopes = (w * x - 1) ** 2, 2 * (w * x - 1) * x
    return squares.sum() * (1 / 6 + 0.5 / 7), slopes.sum() * (1 / 6 + 0.5 / 7)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_update_by_hand_for_any_number_of_microbatches(parts):
    """Row weights are 3, 1, 0, 2: a mean of microbatch means would be another number."""
    optimizer = optax.sgd(0.01)
    update = jax.jit(step.train_step(OBJECTIVE, optimizer, lambda step: 0.01, config(parts)))
    new, metrics = update(state(optimizer), rows(), SEEDS)
    loss, slope = by_hand(2.0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["square"], loss / (1 / 6 + 0.5 / 7) / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], abs(slope), rtol=1e-6)
    np.testing.assert_allclose(new.params["w"], 2.0 - 0.01 * slope, rtol=1e-6)
    assert (new.step, new.skipped, metrics["finite"]) == (1, 0, True)
    assert metrics["knobs/scale"] == 1.0
    assert metrics["fill"] == 6 / 12  # tokens that are there


def test_noise_is_addressed_by_seed_step_and_index():
    optimizer = optax.sgd(0.0)
    update = jax.jit(step.train_step(OBJECTIVE, optimizer, lambda step: 0.0, config()))
    begin = state(optimizer)
    moved = rows()._replace(index=np.array([3, 2, 1, 0], np.int32))
    first, again = update(begin, rows(), SEEDS)[1], update(begin, moved, SEEDS)[1]
    key = random.stream(7, "corruption", 0)
    expected = np.mean([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(4)])
    np.testing.assert_allclose(first["noise"], expected, rtol=1e-6)
    np.testing.assert_allclose(again["noise"], expected, rtol=1e-6)
    later = update(begin.replace(step=jnp.int32(1)), rows(), SEEDS)[1]
    assert later["noise"] != first["noise"]


def test_an_update_that_is_not_finite_changes_only_the_counters():
    optimizer = optax.sgd(0.1, momentum=0.9)
    update = jax.jit(step.train_step(OBJECTIVE, optimizer, lambda step: 0.1, config(1, 0.9)))
    begin = state(optimizer, w=3e38, ema=1.0)  # its square overflows
    new, metrics = update(begin, rows(), SEEDS)
    assert not metrics["finite"]
    assert (new.step, new.skipped, metrics["skipped"]) == (1, 1, 1.0)
    assert new.losses == begin.losses
    jax.tree.map(
        np.testing.assert_array_equal,
        (new.params, new.optimizer, new.ema),
        (begin.params, begin.optimizer, begin.ema),
    )


def test_a_gradient_that_is_not_finite_changes_only_the_counters_whatever_the_loss():
    """The square root of 0 is 0, and infinitely steep."""
    root = OBJECTIVE._replace(
        loss=lambda apply, params, *rest: {"root": Term(jnp.sqrt(params["w"]), jnp.float32(1))}
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    update = jax.jit(step.train_step(root, optimizer, lambda step: 0.1, config(1, 0.9)))
    begin = state(optimizer, w=0.0, ema=1.0)
    new, metrics = update(begin, rows(), SEEDS)
    assert (metrics["loss"], metrics["gradient_norm"]) == (0.0, np.inf)
    assert (new.step, new.skipped, metrics["finite"]) == (1, 1, False)
    jax.tree.map(
        np.testing.assert_array_equal,
        (new.params, new.optimizer, new.ema),
        (begin.params, begin.optimizer, begin.ema),
    )


def test_the_learning_rate_is_that_of_the_updates_that_were_made():
    """Three updates are skipped, then one is made: the optimizer's first."""
    rate = lambda step: 0.1 * (1 + step.astype(jnp.float32))
    optimizer = optax.sgd(rate)
    update = jax.jit(step.train_step(OBJECTIVE, optimizer, rate, config()))
    begin = state(optimizer, w=3e38)
    for count in (1, 2, 3):
        begin, metrics = update(begin, rows(), SEEDS)
        assert (begin.skipped, begin.skipped_in_a_row) == (count, count)
    begin = begin.replace(params={"w": jnp.float32(2.0)})
    after, metrics = update(begin, rows(), SEEDS)
    assert (after.step, after.skipped, after.skipped_in_a_row) == (4, 3, 0)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)
    change = float(begin.params["w"] - after.params["w"])
    np.testing.assert_allclose(abs(change), 0.1 * metrics["gradient_norm"], rtol=1e-5)


def test_moving_average():
    optimizer = optax.sgd(0.01)
    update = jax.jit(step.train_step(OBJECTIVE, optimizer, lambda step: 0.01, config(1, 0.9)))
    new, _ = update(state(optimizer, ema=5.0), rows(), SEEDS)
    np.testing.assert_allclose(new.ema["w"], 0.9 * 5.0 + 0.1 * new.params["w"], rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_without_anything_to_predict_give_zero_loss_and_no_change(parts):
    optimizer = optax.sgd(0.01)
    update = jax.jit(step.train_step(OBJECTIVE, optimizer, lambda step: 0.01, config(parts)))
    new, metrics = update(state(optimizer), rows()._replace(length=np.zeros(4, np.int32)), SEEDS)
    assert (metrics["loss"], metrics["square"], metrics["finite"]) == (0.0, 0.0, True)
    assert new.params["w"] == 2.0


def test_evaluation_has_its_own_knobs_and_masks_and_adds_up_over_batches():
    evaluate = jax.jit(step.evaluation_step(OBJECTIVE))
    params = {"w": jnp.float32(2.0)}
    whole = evaluate(params, rows(), SEEDS)
    halves = [
        evaluate(params, jax.tree.map(lambda x, part=part: x[part], rows()), SEEDS)
        for part in (slice(0, 2), slice(2, 4))
    ]
    for name, term in whole.items():
        np.testing.assert_allclose(term.sum, sum(half[name].sum for half in halves), rtol=1e-6)
        np.testing.assert_allclose(term.weight, sum(half[name].weight for half in halves))
    loss, _ = by_hand(2.0)
    np.testing.assert_allclose(step.total(whole), loss, rtol=1e-6)


def test_mean_of_nothing_is_zero_with_a_zero_gradient():
    def value(x):
        return step.mean(types.SimpleNamespace(sum=x, weight=jnp.float32(0), smooth=0.0))

    assert jax.value_and_grad(value)(jnp.float32(0)) == (0.0, 0.0)


def test_microbatches_keep_rows_on_their_device():
    split = step._split(jnp.arange(8), 2)
    assert split.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_loss_is_measured_against_those_before_it():
    """By hand: with a memory of 2 the shares are 1, 1/2, 1/2, ...

    losses     4    2    3    9
    mean       4    3    3    6
    variance   0    1    .5   9.25
    deviations 0    0    0    (9 - 3) / sqrt(.5)
    """
    average, deviations, seen = LossAverage(*[jnp.float32(0)] * 3), [], []
    for loss in (4.0, 2.0, 3.0, 9.0):
        average, deviation = step.watch(average, jnp.float32(loss), memory=2)
        seen.append((float(average.mean), float(average.variance)))
        deviations.append(float(deviation))
    np.testing.assert_allclose(seen, [(4, 0), (3, 1), (3, 0.5), (6, 9.25)], rtol=1e-6)
    np.testing.assert_allclose(deviations, [0, 0, 0, 6 / np.sqrt(0.5)], rtol=1e-6)
    for bad in (np.nan, np.inf):
        same, deviation = step.watch(average, jnp.float32(bad), memory=2)
        assert (same, deviation) == (average, 0.0)


def test_equal_losses_have_no_spread_to_be_measured_by():
    average = LossAverage(*[jnp.float32(0)] * 3)
    for loss in (5.0, 5.0, 5.0, 6.0):
        average, deviation = step.watch(average, jnp.float32(loss), memory=2)
        assert deviation == 0.0
    assert average.variance > 0
