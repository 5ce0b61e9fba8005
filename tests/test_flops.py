"""Matmul FLOPs held against hand counts."""

import jax
import jax.numpy as jnp
import pytest

from pretraining import config as config_lib
from pretraining import flops
from pretraining import program as program_lib
from pretraining import state as state_lib
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


def test_what_no_result_needs_does_not_count():
    def wasteful(x, w):
        jax.jit(jnp.matmul)(x @ w, w)
        return x @ w

    assert count(wasteful, (3, 4), (4, 4)) == 2 * 3 * 4 * 4


# Rows of 32 positions.
SIZES = {
    "data.sequence_length": 32,
    "tokenizer.size": 320,
    "model.layers": 2,
    "model.width": 48,
    "model.heads": 3,
    "model.mlp_width": 80,
    "train.batch_size": 8,
}


def step_flops(objective, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    config = config_lib.load(f"configs/{objective}.py:tiny", SIZES | overrides)
    return flops.step_flops(config, tokenizer.stand_in(config.tokenizer.size))


def test_a_step_by_hand():
    """Multiply-adds of a row, of which round(.15 x 31) = 5 positions are predicted."""
    projections = 4 * 32 * 48 * 48  # query, key, value, out
    attention = 2 * 3 * 32 * 32 * 16  # scores and mix of three heads of 16
    mlp = 2 * 32 * 48 * 80
    head = 5 * (48 * 48 + 48 * 320)  # transform and logits
    row = 2 * (projections + attention + mlp) + head
    assert step_flops("masked_lm", objective__mask_rate=0.15) == 3 * 2 * 8 * row


def test_six_times_parameters_times_tokens_and_attention():
    """The usual estimate: 6 x parameters of products x tokens, and 12 x layers x B x L^2 x D."""
    layer = 4 * 48 * 48 + 2 * 48 * 80  # 16,896 parameters, each multiplied once with a position
    head = 320 * 48  # likewise, but with the 29 of a row that predict a token
    attention = 12 * 2 * 8 * 32 * 32 * 48
    by_hand = 6 * 8 * (32 * 2 * layer + 29 * head) + attention
    assert by_hand == 82_722_816
    assert step_flops("causal_lm", model__head_transform=False) == by_hand


def test_two_streams_by_hand():
    """Of the last layer the content stream gives keys and values, and nothing reads the rest.

    But for its queries, which stand in one product with them.
    """

    def stream(n):  # query, out; scores of 32 contents, 63 distances, 2 segments; mix; mlp
        return 2 * n * 48 * 48 + n * (32 + 63 + 2 + 32) * 48 + 2 * n * 48 * 80

    keys_values, distances = 2 * 32 * 48 * 48, 63 * 48 * 48
    predicted = 5  # round(32 / 6)
    first = keys_values + stream(32) + stream(predicted)
    last = keys_values + 32 * 48 * 48 + stream(predicted)
    row = first + last + predicted * 48 * 320
    assert step_flops("permutation_lm") == 3 * 2 * (8 * row + 2 * distances)


@pytest.mark.parametrize("name", config_lib.objective_names())
def test_the_compiler_counts_the_same_in_the_whole_step(name):
    """Within 5 %, elementwise work included, of which there is little at this width.

    XLA takes the body of a loop once: there is none where the logits of a row are one chunk. Its
    count is that of the program that it is given, before anything is fused.
    """
    wide = {"width": 512, "heads": 8, "mlp_width": 2048, "layers": 3, "logits_chunk": 128}
    overrides = {f"model.{key}": value for key, value in wide.items()}
    overrides |= {"tokenizer.size": 4096, "data.sequence_length": 128, "train.batch_size": 8}
    config = config_lib.without_epochs(config_lib.load(f"configs/{name}.py:tiny", overrides))
    vocabulary = tokenizer.stand_in(4096)
    program = program_lib.build(config, vocabulary, jax.devices()[:1])
    rows = state_lib.empty_rows(config, 8)
    with jax.set_mesh(program.mesh):
        lowered = program_lib.jit_update(program, config).lower(program.state, rows, program.seeds)
    by_compiler = lowered.cost_analysis()["flops"]
    assert flops.step_flops(config, vocabulary) == pytest.approx(by_compiler, rel=0.05)


@pytest.mark.parametrize("name", ["masked_lm", "causal_lm"])
def test_the_kernel_of_attention_changes_no_figure(name):
    """The products of splash stand in programs of their own, block by block."""
    asked = dict(data__sequence_length=128, model__attention_dropout=0.0, model__dtype="bfloat16")
    by_xla = step_flops(name, model__attention="xla", **asked)
    assert step_flops(name, model__attention="splash", **asked) == by_xla


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
