"""One update on meshes of eight devices is the update of one device, for every objective."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from pretraining import config as config_lib
from pretraining import hlo, program, sharding, state
from pretraining.config import objective_names
from pretraining.data import tokenizer
from pretraining.data.row import SPECIAL_POSITIONS, Row

OBJECTIVES = objective_names()
ONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
B, L, V = 16, 32, 256
SMALL = {
    "model.layers": 1,
    "model.width": 64,
    "model.heads": 4,
    "model.mlp_width": 128,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.attention": "xla",
    "model.logits_chunk": 2,  # several chunks of predicted positions, the last one padded
    "tokenizer.size": V,
    "data.sequence_length": L,
    "train.batch_size": B,
    "train.steps": 10,
    "evaluate.batch_size": B,
    "optimizer.name": "adamw",
    "optimizer.warmup": 0,
    "optimizer.clip": 0.0,  # or the average of the gradients would be one of clipped ones
    "optimizer.epsilon": 1e-3,  # Adam amplifies the rounding of gradients that are far below it
}
QUICK = dict(xla_backend_optimization_level=0)  # to compile


def make_config(objective, sizes, **changes):
    mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
    config = config_lib.load(f"configs/{objective}.py:tiny", SMALL | mesh | changes)
    return config_lib.resolve_durations(config, rows_per_epoch=1000)


def build(config):
    ways = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    return program.build(config, tokenizer.stand_in(V), jax.devices()[:ways])


def make_rows():
    """Rows of every length from full to empty, of two documents each."""
    rng, T = np.random.default_rng(0), L - SPECIAL_POSITIONS
    return Row(
        tokens=rng.integers(5, V, (B, T), dtype=np.int32),
        length=np.linspace(T, 0, B).astype(np.int32),
        document=np.tile((np.arange(T, dtype=np.int32) > 10).astype(np.int32), (B, 1)),
        boundary=rng.integers(0, 4, (B, T), dtype=np.uint8),
        index=np.arange(B, dtype=np.int32),
        copy=np.zeros(B, np.int32),
    )


@functools.cache
def initialize(objective, sizes):
    """The compiled initialization and the state it gives, on the host and where it is."""
    config = make_config(objective, sizes)
    built = build(config)
    create = state.jit_init(built.objective, built.optimizer, config, built.mesh)
    compiled = create.lower(built.seeds.init).compile(compiler_options=QUICK)
    return compiled, compiled(built.seeds.init)


@functools.cache
def update(objective, sizes, **changes):
    """One update of the state that one device initializes: (state, metrics)."""
    config = make_config(objective, sizes, **changes)
    built = build(config)
    begin = jax.device_get(initialize(objective, ONE)[1])
    begin = jax.device_put(begin, jax.tree.map(lambda leaf: leaf.sharding, built.state))
    rows = sharding.put_rows(make_rows(), built.mesh, B)
    with jax.set_mesh(built.mesh):
        compiled = program.jit_update(built, config).lower(begin, rows, built.seeds).compile(QUICK)
    return jax.device_get(compiled(begin, rows, built.seeds))


def named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def gradient(after):
    """The gradient, flat: Adam's first average is 1 - beta1 times it, here and on one device."""
    return ravel_pytree(optax.tree_utils.tree_get(after.optimizer, "mu"))[0]


def relative(ours, reference):
    """The norm of the difference over that of the reference."""
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_initialization_is_bit_equal_and_in_shares(objective, sizes):
    reference = named_leaves(jax.device_get(initialize(objective, ONE)[1]))
    compiled, placed = initialize(objective, sizes)
    built = build(make_config(objective, sizes))
    for name, leaf in named_leaves(placed).items():
        np.testing.assert_array_equal(jax.device_get(leaf), reference[name], err_msg=name)
        where = sharding.partition(name, leaf.shape, built.mesh)
        ways = [1 if axis is None else built.mesh.shape[axis] for axis in where]
        share = tuple(n // w for n, w in zip(leaf.shape, ways, strict=False))
        assert {shard.data.shape for shard in leaf.addressable_shards} == {share}, name
    if sizes == (8, 1, 1):  # whose devices hold the same parameters
        return
    memory = compiled.memory_analysis()  # of one device
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    shares = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    largest = max(leaf.nbytes for leaf in reference.values())
    # What is drawn at a time: a table, its bits, and a copy of either: QUICK reuses no buffer.
    assert held <= shares + 3 * largest


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_update_is_that_of_one_device(objective, sizes):
    """Losses to 1e-5 and the gradient to 1e-5 of its norm: sums of the same addends in another
    order. What the update adds to a parameter, to 1e-4 of its largest entry and the rounding of
    the sum, which is 1e-2 of the smallest updates.

    Dropout is on: its draws, like the masks, are the same on every mesh.
    """
    after, metrics = update(objective, sizes)
    expected, figures = update(objective, ONE)
    assert metrics.keys() == figures.keys()
    for name, value in figures.items():
        tolerance = 1e-6 if name.startswith(BY_MASKS_ALONE) else 1e-5
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=name)
    assert relative(gradient(after), gradient(expected)) < 1e-5
    begin = named_leaves(jax.device_get(initialize(objective, ONE)[1].params))
    theirs = named_leaves(expected.params)
    for name, leaf in named_leaves(after.params).items():
        if not name.endswith("attention/key/bias"):  # its true gradient is 0
            largest = np.abs(theirs[name]).max()
            np.testing.assert_allclose(leaf, theirs[name], rtol=0, atol=1e-4 * largest)
            change, wanted = leaf - begin[name], theirs[name] - begin[name]
            tolerance = 1e-4 * np.abs(wanted).max() + np.spacing(largest)
            np.testing.assert_allclose(change, wanted, rtol=0, atol=tolerance, err_msg=name)


BY_MASKS_ALONE = ("knobs/", "unigram_loss", "overflow", "learning_rate")


def test_in_16_bits_scanned_recomputed_and_accumulated_it_is_close():
    """To 2 % of the gradient's norm: products are rounded to 8 bits, in another order."""
    changes = {
        "model.dtype": "bfloat16",
        "model.execution": "scanned",
        "model.remat": "outputs",
        "train.accumulation": 2,
    }
    (after, metrics), (expected, figures) = (
        update("masked_lm", sizes, **changes) for sizes in ((2, 2, 2), ONE)
    )
    np.testing.assert_allclose(metrics["loss"], figures["loss"], rtol=1e-3)
    difference = relative(gradient(after), gradient(expected))
    assert difference < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_activations_stay_where_their_rows_are(objective):
    """Nothing larger than a parameter goes from device to device: hidden states of all rows are 4
    times as large as the largest one, attention scores more.

    Left alone the compiler splits the width of the residual stream, and moves both.
    """
    config = make_config(objective, (1, 8, 1), **WIDE)
    built = program.build(config, tokenizer.stand_in(512), jax.devices())
    text = program.compile_update(built, config).as_text()
    moved = [
        array
        for array, instruction in hlo.buffers(hlo.parse(text))
        if instruction.opcode.removesuffix("-start") in hlo.COLLECTIVES
    ]
    largest = max(leaf.size for leaf in jax.tree.leaves(built.state.params))
    assert largest == 512 * 128
    assert max(array.elements for array in moved) <= largest


WIDE = {
    "tokenizer.size": 512,
    "data.sequence_length": 128,
    "model.layers": 2,
    "model.width": 128,
    "model.execution": "scanned",
    "model.remat": "outputs",
}
