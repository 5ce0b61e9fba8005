"""Matmul FLOPs held against hand counts."""

import jax
import jax.numpy as jnp
import pytest

from pretraining import config as config_lib
from pretraining import flops
from pretraining.data import tokenizer


def count(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.matmul_flops(jax.make_jaxpr(function)(*arrays).jaxpr)


def test_a_product_is_two_operations_for_each_multiply_add():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bid,bjd->bij", a, b), (2, 3, 4), (2, 6, 4)) == (
        2 * 2 * 3 * 6 * 4
    )


def test_loops_count_as_often_as_they_run():
    def scanned(x, w):
        return jax.lax.scan(lambda h, _: (jax.nn.relu(h @ w), None), x, None, length=6)[0]

    assert count(scanned, (3, 4), (4, 4)) == 6 * 2 * 3 * 4 * 4


def test_recomputation_and_nested_calls_count_once():
    def rematerialised(x, w):
        return jax.checkpoint(jax.jit(lambda h: jnp.tanh(h @ w)))(x)

    assert count(rematerialised, (3, 4), (4, 4)) == 2 * 3 * 4 * 4


def test_a_branch_counts_as_its_largest():
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(branch, (3, 4), (4, 4)) == 2 * 2 * 3 * 4 * 4


def test_a_step_by_hand():
    """Multiply-adds of a row of 32 positions, of which round(.15 x 31) = 5 are predicted."""
    overrides = {
        "data.sequence_length": 32,
        "tokenizer.size": 320,
        "model.layers": 2,
        "model.width": 48,
        "model.heads": 3,
        "model.mlp_width": 80,
        "train.batch_size": 8,
        "objective.mask_rate": 0.15,
    }
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    projections = 4 * 32 * 48 * 48  # query, key, value, out
    attention = 2 * 3 * 32 * 32 * 16  # scores and mix of three heads of 16
    mlp = 2 * 32 * 48 * 80
    head = 5 * (48 * 48 + 48 * 320)  # transform and logits
    row = 2 * (projections + attention + mlp) + head
    assert flops.step_flops(config, tokenizer.stand_in(320)) == 3 * 2 * 8 * row


@pytest.mark.parametrize(
    "kind, peak, gib",
    [
        ("TPU v2", 22.5e12, 7.48),  # of a core, half a chip
        ("TPU v3", 61.5e12, 15.48),
        ("TPU v4", 275e12, 30.75),
        ("TPU v5 lite", 197e12, 15.75),
        ("TPU v5", 459e12, 95.74),
        ("TPU v5p", 459e12, 95.74),
        ("TPU v6 lite", 918e12, 31.25),
    ],
)
def test_figures_are_found_by_device_kind(kind, peak, gib):
    assert flops.chip(kind)[1:] == (peak, gib * 2**30)


def test_unknown_devices_have_no_published_figures():
    assert flops.chip("cpu") is None
    assert flops.chip("NVIDIA H200").peak == 989e12
