"""Randomness is addressed, not carried: every key is a function of (seed, name, step).

Nothing random is ever saved. A run that resumes, moves to another number of devices or hosts, or
is replayed in a notebook draws what it drew before.
"""

import zlib
from typing import NamedTuple

import jax
import numpy as np

# Values must not depend on how an array is sharded, nor on a default that changes with versions.
jax.config.update("jax_threefry_partitionable", True)


class Seeds(NamedTuple):
    """The seeds that compiled programs read, all uint32.

    They are inputs of these programs: runs that differ in them share one compiled program.
    """

    init: np.uint32
    corruption: np.uint32
    dropout: np.uint32
    evaluation: np.uint32


def seeds(config) -> Seeds:
    """Those of `config.seed`."""
    seed = config.seed
    values = seed.init, seed.corruption, seed.dropout, seed.evaluation
    return Seeds(*map(np.uint32, values))


def stream(seed: int | jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of one named stream at one step.

    Args:
      seed: the seed of the purpose (`config.seed.<name>`); seeds are apart so that a sweep can vary
        one of them and hold the rest. A Python integer, or uint32, perhaps traced.
      name: what is drawn, e.g. "corruption"; hashed, so that a new stream never shifts another.
      step: the step, a Python integer or a traced scalar.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def per_row(key: jax.Array, index: jax.Array) -> jax.Array:
    """Keys [B] of the rows whose places in the global batch are `index` [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
