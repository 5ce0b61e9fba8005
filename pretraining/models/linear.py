"""Products with parameters: computed in the compute dtype, their gradients summed in float32.

The gradient of a kernel is a sum over every row and position of the batch, on all devices. A
product in bfloat16 has a gradient in bfloat16, which loses the small addends of a long sum; here
the kernel stays float32 until it is inside the product, whose transpose has a float32 sum.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pretraining.models.partition import ROWS, TENSOR, constrain

Dimensions = tuple[tuple[int, ...], tuple[int, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, dimensions: Dimensions, dtype: Any) -> jax.Array:
    """x times a float32 kernel that is cast to the dtype of x; the kernel's gradient is float32.

    Args:
      x: [..., the dimensions that are contracted].
      kernel: float32.
      dimensions: the contracted ones of x, its last, and of the kernel, its first or its last.
      dtype: of the result, [..., the kernel's other dimensions].
    """
    return _multiply(x, kernel.astype(x.dtype), dimensions, dtype)


def _forward(x, kernel, dimensions, dtype):
    # Not `product`, in which a policy of rematerialization would not see the product.
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
        cpu=functools.partial(_sum_over_rows, len(batch)),
        default=lambda *f: _multiply(*f, (batch, batch), jnp.float32),
    )
    return of_x.astype(x.dtype), of_kernel


product.defvjp(_forward, _backward)


def _sum_over_rows(batch, x, y):
    """The same on CPUs: x^T y of all rows, in float32.

    There XLA does not run every product in 16 bits with a float32 sum, and it reads an operand
    across its rows at a third of the speed. The narrower one is turned first; the barriers keep the
    compiler from folding that into the product again.
    """
    shape = (*x.shape[batch:], *y.shape[batch:])
    x, y = (z.astype(jnp.float32).reshape(-1, math.prod(z.shape[batch:])) for z in (x, y))
    if x.shape[1] <= y.shape[1]:
        return (jax.lax.optimization_barrier(x.T) @ y).reshape(shape)
    turned = jax.lax.optimization_barrier(y.T) @ x
    return jax.lax.optimization_barrier(turned).T.reshape(shape)


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


def joint(layers: list[Dense], x: jax.Array) -> list[jax.Array]:
    """[layer(x) for layer in layers] of layers D -> [H, d], in one product, which is faster."""
    if layers[0].is_initializing():
        return [layer(x) for layer in layers]
    params = [layer.variables["params"] for layer in layers]
    dtype = layers[0].dtype
    out = _joint_product(x.astype(dtype), [each["kernel"] for each in params])
    if layers[0].use_bias:
        bias = jnp.stack([each["bias"] for each in params], axis=1)
        out = (out.astype(jnp.float32) + jnp.expand_dims(bias, range(x.ndim - 1))).astype(dtype)
    return [out[..., n, :] for n in range(len(layers))]


@jax.custom_vjp
def _joint_product(x, kernels):
    """[..., H, n, d] of x [..., D] and n kernels [D, H, d].

    The heads stay outside, so that devices may share them out. The backward pass stacks the kernels
    again, rather than to keep them twice.
    """
    return product(x, jnp.stack(kernels, axis=2), ((x.ndim - 1,), (0,)), x.dtype)


def _joint_forward(x, kernels):
    kernel, dimensions = jnp.stack(kernels, axis=2), ((x.ndim - 1,), (0,))
    return _forward(x, kernel, dimensions, x.dtype)[0], (x, kernels)


def _joint_backward(saved, gradient):
    x, kernels = saved
    kernel, dimensions = jnp.stack(kernels, axis=2), ((x.ndim - 1,), (0,))
    of_x, of_kernel = _backward(dimensions, x.dtype, (x, kernel), gradient)
    return of_x, [of_kernel[:, :, n] for n in range(len(kernels))]


_joint_product.defvjp(_joint_forward, _joint_backward)


class Table(nn.Embed):
    """`nn.Embed` whose width is never shared out in a lookup: a device finds whole vectors.

    Left alone the compiler splits their width where that of the table is split, over devices that
    hold different rows, and the whole network follows.
    """

    promote_dtype: Any = lambda table, dtype, inexact: (constrain(table, TENSOR),)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return constrain(super().__call__(ids), ROWS)
