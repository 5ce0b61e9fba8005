"""Products with parameters: computed in the compute dtype, their gradients summed in float32.

The gradient of a kernel is a sum over every row and position of the batch, on all devices. A
product in bfloat16 has a gradient in bfloat16, which loses the small addends of a long sum; here
the kernel stays float32 until it is inside the product, whose transpose has a float32 sum. In
float32 nothing differs from the modules of Flax.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pretraining.models.partition import ROWS, TENSOR, constrain

Dimensions = tuple[tuple[int, ...], tuple[int, ...]]


def product(x: jax.Array, kernel: jax.Array, dimensions: Dimensions, dtype: Any) -> jax.Array:
    """x times a float32 kernel that is cast to the dtype of x; the kernel's gradient is float32.

    Args:
      x: [..., the dimensions that are contracted].
      kernel: float32.
      dimensions: the contracted ones of x, its last, and of the kernel, its first or its last.
      dtype: of the result, [..., the kernel's other dimensions].
    """
    if x.dtype == kernel.dtype:
        return _multiply(x, kernel, dimensions, dtype)
    return _mixed(x, kernel, dimensions, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mixed(x, kernel, dimensions, dtype):
    return _multiply(x, kernel.astype(x.dtype), dimensions, dtype)


def _forward(x, kernel, dimensions, dtype):
    # Not `_mixed`, in which a policy of rematerialization would not see the product.
    return _multiply(x, kernel.astype(x.dtype), dimensions, dtype), (x, kernel)


def _backward(dimensions, dtype, saved, gradient):
    x, kernel = saved
    inner = dimensions[1]
    outer = tuple(d for d in range(kernel.ndim) if d not in inner)
    features = tuple(range(gradient.ndim - len(outer), gradient.ndim))
    of_x = _multiply(gradient, kernel.astype(x.dtype), (features, outer), dtype)
    batch = tuple(range(x.ndim - len(inner)))
    factors = (x, gradient) if inner[0] == 0 else (gradient, x)
    of_kernel = jax.lax.platform_dependent(
        *factors,
        # On CPUs XLA does not run every product in 16 bits with a float32 sum.
        cpu=lambda *f: _multiply(*(y.astype(jnp.float32) for y in f), (batch, batch), jnp.float32),
        default=lambda *f: _multiply(*f, (batch, batch), jnp.float32),
    )
    return of_x.astype(x.dtype), of_kernel


_mixed.defvjp(_forward, _backward)


def _multiply(x, y, dimensions, dtype):
    return jax.lax.dot_general(x, y, (dimensions, ((), ())), preferred_element_type=dtype)


class Dense(nn.DenseGeneral):
    """`nn.DenseGeneral` with float32 gradients of kernel and bias; `dtype` is that of compute."""

    promote_dtype: Any = lambda x, kernel, bias, dtype: (x.astype(dtype), kernel, bias)
    dot_general_cls: Any = lambda: _float32_product

    def __call__(self, x: jax.Array) -> jax.Array:
        # The bias, float32, has been added in float32, so that its gradient is summed in it.
        return super().__call__(x).astype(self.dtype)


def _float32_product(x, kernel, dimension_numbers, precision):
    del precision
    return product(x, kernel, dimension_numbers[0], x.dtype).astype(jnp.float32)


class Table(nn.Embed):
    """`nn.Embed` whose width is never shared out in a lookup: a device finds whole vectors.

    Left alone the compiler splits their width where that of the table is split, over devices that
    hold different rows, and the whole network follows.
    """

    promote_dtype: Any = lambda table, dtype, inexact: (constrain(table, TENSOR),)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return constrain(super().__call__(ids), ROWS)
