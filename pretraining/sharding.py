"""Where arrays live: one mesh, one rule for the batch, one rule for every parameter.

Mesh axes: `data` (other rows, same parameters), `fsdp` (other rows, parameters shared out),
`tensor` (same rows; heads, feed-forward and vocabulary shared out). Sharding changes where numbers
are computed, never which.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pretraining.errors import UserError
from pretraining.models import partition as activations

AXES = (*activations.ROWS, activations.TENSOR)
ROWS = PartitionSpec(activations.ROWS)  # the leading axis of a batch

# Which dimension of a parameter is shared out over `tensor`, by the pattern found in its "/"-joined
# path: of these at most one. What remains, and a parameter without a pattern, is shared out over
# `fsdp` by GENERAL. Optimizer state follows its parameter, whose path its own path contains.
NAMED = (
    (r"attention/(query|key|value|position)/kernel$", 1),  # [D, H, d]: heads
    (r"attention/(query|key|value)/bias$", 0),  # [H, d]
    (r"attention/(content|position|segment)_bias$", 0),  # [H, d]
    (r"attention/segment_embedding$", 1),  # [2, H, d]
    (r"attention/out/kernel$", 0),  # [H, d, D]
    (r"mlp/(up|gate)/kernel$", 1),  # [D, F]: inner width
    (r"mlp/(up|gate)/bias$", 0),  # [F]
    (r"mlp/down/kernel$", 0),  # [F, D]
    (r"(token|output)/embedding$", 0),  # [V, E]: vocabulary
)
GENERAL = "largest divisible dimension"


def make_mesh(config, devices=None) -> Mesh:
    """The mesh of `config.mesh`; one axis may be -1 and takes the devices that are left.

    Args:
      devices: those of a topology that is not attached; None = all that are here, on all hosts.

    Raises:
      UserError: the sizes don't multiply to the number of devices, or the devices are wired as a
        torus that cannot be cut like that.
    """
    sizes = [config.mesh[axis] for axis in AXES]
    written = ", ".join(f"config.mesh.{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    devices = jax.devices() if devices is None else devices
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{written}: sizes are at least 1, and one of them may be -1")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"{written} don't multiply to the number of devices, {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:
        raise UserError(
            f"{written}: each must be a product of whole sides of the torus of the {len(devices)} "
            "devices"
        ) from None


def check_batch(config, mesh: Mesh) -> None:
    """Refuses batches that don't divide among the devices that hold different rows."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, size in (
        ("train.batch_size", config.train.batch_size // config.train.accumulation),
        ("evaluate.batch_size", config.evaluate.batch_size),
    ):
        if size % ways:
            micro = " (a microbatch)" if config.train.accumulation > 1 else ""
            raise UserError(
                f"config.{key}: {size} rows{micro} are not divisible by the {ways} devices that "
                f"hold different rows (mesh.data={mesh.shape['data']} x "
                f"mesh.fsdp={mesh.shape['fsdp']})"
            )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf (array or ShapeDtypeStruct) of parameters or a state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh)), tree
    )


class Placement(NamedTuple):
    """Where one leaf lives.

    Attributes:
      name: its "/"-joined path.
      shape: of the whole.
      partition: of its dimensions.
      rule: what decided; see `rule`.
    """

    name: str
    shape: tuple[int, ...]
    partition: PartitionSpec
    rule: str


def table(tree: Any, mesh: Mesh) -> list[Placement]:
    """The placement of every leaf (array or ShapeDtypeStruct) of parameters or a state."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        where = partition(name, leaf.shape, mesh)
        rows.append(Placement(name, leaf.shape, where, rule(name, leaf.shape)))
    return rows


def rule(name: str, shape: tuple[int, ...]) -> str:
    """What decides where a leaf lives: a pattern of NAMED (then GENERAL for the rest), or GENERAL.

    An optimizer may keep factored or scalar statistics under the path of a parameter: a pattern
    whose dimension the leaf lacks does not count.
    """
    return next(
        (
            pattern
            for pattern, dimension in NAMED
            if re.search(pattern, name) and dimension < len(shape)
        ),
        GENERAL,
    )


def path_name(path) -> str:
    """ "encoder/layer_0/mlp/up/kernel" of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one leaf: a named dimension over `tensor`, then the largest over `fsdp`.

    `fsdp` takes the largest remaining dimension that it divides (the first of equals); a leaf
    without one is replicated. A vocabulary that `tensor` does not divide is not split over it, nor
    are the heads of a smaller network beside the encoder (a generator may have a single one); the
    encoder's heads and inner widths must divide, or UserError is raised.
    """
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    dimension = _tensor_dimension(name, shape) if tensor > 1 else None
    if dimension is not None and shape[dimension] % tensor == 0:
        axes[dimension] = "tensor"
    elif dimension is not None and re.search(r"(^|/)encoder/layer_", name):
        raise UserError(
            f"config.mesh.tensor={tensor} does not divide dimension {dimension} of {name}, "
            f"whose shape is {shape}"
        )
    free = [d for d in range(len(shape)) if axes[d] is None and shape[d] % fsdp == 0]
    if fsdp > 1 and free:
        axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*axes)


def _tensor_dimension(name: str, shape: tuple[int, ...]) -> int | None:
    return dict(NAMED).get(rule(name, shape))


@functools.lru_cache
def local_places(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The places in the global batch of the rows that this process's devices hold, ascending.

    Where `tensor` spans processes they hold the same rows, and where the mesh follows the wiring of
    the machine the places need not adjoin.
    """
    shares = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    places = np.arange(batch_size, dtype=np.int32)
    return np.unique(np.concatenate([places[index] for index in shares.values()]))


def put_rows(rows: Any, mesh: Mesh, batch_size: int) -> Any:
    """The global batch on the mesh, from the rows of `local_places`."""
    sharding, places = NamedSharding(mesh, ROWS), local_places(mesh, batch_size)

    def place(x):
        def share(index):
            wanted = np.arange(batch_size)[index[0]]
            return x[np.searchsorted(places, wanted)]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, share)

    return jax.tree.map(place, rows)
