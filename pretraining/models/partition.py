"""Where activations live: which of their dimensions are shared out over the axes of the mesh.

The compiler spreads the sharding of parameters and rows through the program, and where the two
disagree it guesses: on 256 chips it moved 504 GiB of attention scores between them at every step of
ELECTRA-large, instead of 1.4 GiB of parameters. Parameters have their rules in
pretraining/sharding.py.
"""

import jax
import numpy as np
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")  # the axes of the mesh whose devices hold different rows
TENSOR = "tensor"  # the axis that shares out heads, feed-forward and vocabulary


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """x, of which dimension i is shared out over `axes[i]`, those that follow over nothing.

    Without a mesh (`jax.set_mesh`) it is x itself. A dimension that its axes don't divide is not
    shared out, as it is not in a parameter either.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divide(mesh, x.shape, axes))


def _divide(mesh, shape, axes):
    return PartitionSpec(
        *(
            axis if axis is not None and size % _ways(mesh, axis) == 0 else None
            for size, axis in zip(shape, axes, strict=False)
        )
    )


def _ways(mesh, axis):
    names = (axis,) if isinstance(axis, str) else axis
    return int(np.prod([mesh.shape[name] for name in names]))
