"""Every parameter is covered by one rule; meshes and batches that cannot work are refused."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pretraining import config as config_lib
from pretraining import program, sharding
from pretraining.config import objective_names
from pretraining.data import tokenizer
from pretraining.errors import UserError


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh(ConfigDict(dict(mesh=dict(data=data, fsdp=fsdp, tensor=tensor))))


@pytest.mark.parametrize(
    "sizes, shape",
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4))],
)
def test_minus_one_takes_what_is_left(sizes, shape):
    assert tuple(mesh_of(*sizes).shape.values()) == shape


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1)])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(UserError, match=f"config.mesh.data={sizes[0]}"):
        mesh_of(*sizes)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        (
            "encoder/layer_0/attention/query/kernel",
            (64, 4, 16),
            PartitionSpec("fsdp", "tensor", None),
        ),
        (
            "encoder/layer_0/attention/out/kernel",
            (4, 16, 64),
            PartitionSpec("tensor", None, "fsdp"),
        ),
        ("encoder/layer_0/mlp/up/kernel", (64, 256), PartitionSpec("fsdp", "tensor")),
        ("encoder/layer_0/mlp/down/kernel", (256, 64), PartitionSpec("tensor", "fsdp")),
        ("encoder/embeddings/token/embedding", (100, 64), PartitionSpec("tensor", "fsdp")),
        ("0/mu/encoder/embeddings/token/embedding", (100, 64), PartitionSpec("tensor", "fsdp")),
        ("encoder/layer_0/mlp_norm/scale", (63,), PartitionSpec(None)),  # 2 does not divide 63
        ("encoder/layer_0/mlp_norm/scale", (64,), PartitionSpec("fsdp")),
        ("encoder/embeddings/token/embedding", (101, 64), PartitionSpec(None, "fsdp")),
        (
            "encoder/layer_0/attention/position/kernel",
            (64, 4, 16),
            PartitionSpec("fsdp", "tensor", None),
        ),
        (
            "encoder/layer_0/attention/content_bias",
            (4, 16),
            PartitionSpec("tensor", "fsdp"),
        ),
        (
            "encoder/layer_0/attention/segment_embedding",
            (2, 4, 15),
            PartitionSpec("fsdp", "tensor", None),
        ),
        # A generator of one head.
        (
            "generator/layer_0/attention/query/kernel",
            (16, 1, 16),
            PartitionSpec("fsdp", None, None),
        ),
        ("step", (), PartitionSpec()),
    ],
)
def test_partition(name, shape, expected):
    assert sharding.partition(name, shape, mesh_of(2, 2, 2)) == expected


def recipe_leaves(recipe):
    """(path, shape) of every leaf of the state of a recipe."""
    config = config_lib.resolve_durations(config_lib.load(recipe), rows_per_epoch=100_000)
    return program.build(config, tokenizer.stand_in(config.tokenizer.size)).state


def test_one_rule_covers_each_parameter_of_every_recipe_and_none_is_dead():
    mesh, found = mesh_of(2, 2, 2), set()
    for objective, size in itertools.product(objective_names(), ("tiny", "small", "base", "large")):
        tree = recipe_leaves(f"configs/{objective}.py:{size}")
        rows = sharding.table(tree, mesh)
        assert [row.name for row in rows] == [sharding.path_name(p) for p, _ in leaves(tree)]
        for row, (_, leaf) in zip(rows, leaves(tree), strict=True):
            patterns = [p for p, _ in sharding.NAMED if re.search(p, row.name)]
            assert len(patterns) <= 1, row
            assert row.rule == (patterns or [sharding.GENERAL])[0], row
            assert row.shape == leaf.shape
            assert len(row.partition) == leaf.ndim
            # Nothing as large as a matrix is left whole.
            if patterns or leaf.ndim > 1:
                assert any(row.partition), row
            found.add(row.rule)
    assert found >= {p for p, _ in sharding.NAMED}


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_statistics_that_lack_the_dimension_follow_the_general_rule():
    name = "v/encoder/layer_0/mlp/up/kernel"
    assert sharding.rule(name, (64,)) == sharding.GENERAL
    assert sharding.partition(name, (64,), mesh_of(2, 2, 2)) == PartitionSpec("fsdp")


def test_heads_that_tensor_does_not_divide_are_refused():
    with pytest.raises(UserError, match="config.mesh.tensor=4 does not divide .*query/kernel"):
        sharding.partition("encoder/layer_0/attention/query/kernel", (64, 6, 16), mesh_of(1, 2, 4))


def test_batches_that_devices_do_not_divide_are_refused():
    config = ConfigDict(
        dict(train=dict(batch_size=24, accumulation=2), evaluate=dict(batch_size=8))
    )
    with pytest.raises(UserError, match="config.train.batch_size: 12 rows .a microbatch. .* 8 dev"):
        sharding.check_batch(config, mesh_of(8, 1, 1))
    sharding.check_batch(config, mesh_of(2, 2, 2))
    config.evaluate.batch_size = 6
    with pytest.raises(UserError, match="config.evaluate.batch_size: 6 rows"):
        sharding.check_batch(config, mesh_of(2, 2, 2))


def test_rows_are_laid_out_in_order():
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    placed = sharding.put_rows(rows, mesh_of(4, 2, 1), 8)
    assert placed.sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(jax.device_get(placed), rows)
    assert [shard.data.tolist() for shard in placed.addressable_shards] == [
        [row] for row in rows.tolist()
    ]
    assert placed.dtype == jnp.int32


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_holds_every_row(sizes):
    assert sharding.local_places(mesh_of(*sizes), 16).tolist() == list(range(16))
