"""Everything that a run carries from step to step, and how it begins."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pretraining import random, sharding
from pretraining.data.row import SPECIAL_POSITIONS, Row


@flax.struct.dataclass
class LossAverage:
    """What the losses of the last updates were like; all [] float32.

    Attributes:
      mean, variance: exponential averages.
      count: losses seen.
    """

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


@flax.struct.dataclass
class State:
    """The saved state of a run; the data need none, because a batch is a function of (seed, step).

    Attributes:
      step: [] int32, updates made.
      params: parameter tree, float32.
      optimizer: optax state.
      ema: moving average of the parameters, or None.
      skipped: [] int32, updates discarded because they were not finite.
      skipped_in_a_row: [] int32, those of them that came last, without another one between.
      losses: by which a spike is known.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    ema: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    losses: LossAverage


def empty_rows(config, count: int = 1) -> Row:
    """`count` rows of length 0: the shapes of a batch, for initialisation and ahead-of-time use."""
    payload = config.data.sequence_length - SPECIAL_POSITIONS
    return Row(
        tokens=jnp.zeros((count, payload), jnp.int32),
        length=jnp.zeros(count, jnp.int32),
        document=jnp.zeros((count, payload), jnp.int32),
        boundary=jnp.zeros((count, payload), jnp.uint8),
        index=jnp.arange(count, dtype=jnp.int32),
        copy=jnp.zeros(count, jnp.int32),
    )


def corrupt_rows(objective, key: jax.Array, rows: Row, knobs: dict) -> Any:
    """Examples of a batch of rows; each row's randomness is addressed by its index."""
    keys = random.per_row(key, rows.index)
    return jax.vmap(objective.corrupt, in_axes=(0, 0, None))(keys, rows, knobs)


def init_params(objective, config, seed: int | jax.Array | None = None) -> Any:
    """The parameter tree, from the seed alone (traceable); None = `config.seed.init`."""
    key = random.stream(config.seed.init if seed is None else seed, "init")
    example = corrupt_rows(objective, key, empty_rows(config), objective.evaluation_knobs)
    return objective.model.init(key, example)["params"]


def shape(objective, optimizer: optax.GradientTransformation, config, mesh: Mesh) -> State:
    """The state as ShapeDtypeStructs with their shardings; nothing is computed."""
    abstract = jax.eval_shape(lambda: _create(objective, optimizer, config, config.seed.init))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        sharding.tree_shardings(abstract, mesh),
    )


def init(objective, optimizer: optax.GradientTransformation, config, mesh: Mesh) -> State:
    """The state before the first step; every leaf is made where it lives."""
    return jit_init(objective, optimizer, config, mesh)(random.seeds(config).init)


def jit_init(objective, optimizer: optax.GradientTransformation, config, mesh: Mesh):
    """The jitted `seed -> state`, for states that differ in `config.seed.init` alone."""
    where = jax.tree.map(lambda leaf: leaf.sharding, shape(objective, optimizer, config, mesh))
    return jax.jit(lambda seed: _create(objective, optimizer, config, seed), out_shardings=where)


def _create(objective, optimizer, config, seed) -> State:
    params = init_params(objective, config, seed)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if config.train.ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        losses=LossAverage(*(jnp.zeros((), jnp.float32) for _ in range(3))),
    )
