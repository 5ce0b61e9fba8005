"""FLOPs of a step, counted from its own matrix products, and the peak they are held against."""

import time
from typing import NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from pretraining import config as config_lib
from pretraining.state import corrupt_rows, empty_rows, init_params


class Chip(NamedTuple):
    """One device as its maker describes it.

    Attributes:
      name: a part of its `device_kind`.
      peak: dense bfloat16 FLOP/s.
      memory: bytes of HBM, of a TPU those that libtpu lets a program use; None where the name comes
        in several sizes.
    """

    name: str
    peak: float
    memory: float | None


# The first match decides: longer names stand before their prefixes. On TPU v2 and v3 a device is a
# core, half of the chip whose figures are published; on v4 and v5p it is a chip, as jax has it.
# The memory of TPUs is what libtpu 0.0.42 names when a program takes more.
_CHIPS = (
    Chip("H200", 989e12, 141e9),
    Chip("H100", 989e12, None),
    Chip("A100", 312e12, None),
    Chip("V100", 125e12, None),
    Chip("TPU v6", 918e12, 31.25 * 2**30),
    Chip("TPU v5p", 459e12, 95.74 * 2**30),
    Chip("TPU v5 lite", 197e12, 15.75 * 2**30),
    Chip("TPU v5e", 197e12, 15.75 * 2**30),
    Chip("TPU v5", 459e12, 95.74 * 2**30),
    Chip("TPU v4", 275e12, 30.75 * 2**30),
    Chip("TPU v3", 61.5e12, 15.48 * 2**30),
    Chip("TPU v2", 22.5e12, 7.48 * 2**30),
)


def chip(device_kind: str) -> Chip | None:
    """The figures of a device, or None."""
    return next((chip for chip in _CHIPS if chip.name in device_kind), None)


def step_flops(config, vocabulary) -> float:
    """Matmul FLOPs of one training step over the global batch: 3 x the forward pass of the loss.

    The backward pass of a product is two products of its size; of products without one (the logits
    that samples are drawn from) it is counted all the same, at most some percent. Counted is what
    the loss needs, however it is computed: not recomputation, elementwise work, the optimizer, nor
    what nothing reads (the content stream of a last layer, but for its queries, which stand in one
    product with what is read). Heads count where they run (K positions), padding counts, and so do
    scores that a fused kernel would skip.
    """
    objective = config_lib.build_objective(_plain(config, "unrolled"), vocabulary)

    def forward(params, rows):
        knobs, key = objective.schedule(jnp.zeros((), jnp.int32)), jax.random.key(0)
        examples = corrupt_rows(objective, key, rows, knobs)
        return objective.loss(objective.model.apply, params, examples, knobs, key, True)

    # All rows of a batch, which share some products.
    rows = jax.eval_shape(lambda: empty_rows(config, config.train.batch_size))
    closed = jax.make_jaxpr(forward)(_params(config, vocabulary), rows)
    return 3.0 * matmul_flops(closed.jaxpr)


def _plain(config, execution: str):
    """The config with nothing on that changes no product but takes time to trace, or hides some."""
    config = config.copy_and_resolve_references()
    plain = dict(attention="xla", dropout=0.0, attention_dropout=0.0, remat="none")
    with config.unlocked():
        config.model.update(plain | dict(execution=execution))
    return config


def _params(config, vocabulary):
    """Shapes; of scanned layers, which have the same ones, because one layer is traced faster."""
    config = _plain(config, "scanned")
    objective = config_lib.build_objective(config, vocabulary)
    return jax.eval_shape(lambda: init_params(objective, config))


def matmul_flops(jaxpr) -> float:
    """2 x multiply-adds of every dot product that the results need, in loops as often as they run.

    A while loop counts once (corruption loops hold no products); a branch counts as its largest. Of
    what a call or a loop computes all counts if anything is needed.
    """
    needed, flops = _variables(jaxpr.outvars), 0.0
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed |= _variables(equation.invars)
            flops += _flops(equation)
    return flops


def _variables(operands) -> set:
    """Without the constants that are written in their place."""
    return {operand for operand in operands if isinstance(operand, jax.extend.core.Var)}


def _flops(equation) -> float:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = np.prod([shape[d] for d in contracted], dtype=float)
        return float(2.0 * depth * np.prod(equation.outvars[0].aval.shape, dtype=float))
    inner = [matmul_flops(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params)]
    if equation.primitive.name == "cond":
        return max(inner, default=0.0)
    return equation.params.get("length", 1) * sum(inner)


def peak_flops(config) -> float:
    """FLOP/s of all devices together: `config.log.peak_flops`, the published peak, or measured."""
    devices = jax.devices()
    if config.log.peak_flops:
        return config.log.peak_flops * len(devices)
    if published := chip(devices[0].device_kind):
        return published.peak * len(devices)
    # Simulated devices share the one machine.
    alike = jax.process_count() if devices[0].platform == "cpu" else len(devices)
    return _measured_peak() * alike


def _measured_peak(size: int = 2048, repeats: int = 5) -> float:
    """Best of a few float32 products on one device."""
    matrix = jax.device_put(np.ones((size, size), np.float32))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
