"""Dropout whose mask is a hash of the place of an element, computed where it is used.

Random bits by threefry cost a CPU a tenth to a fifth of a training step, and are arrays that are
written and read again. A hash of (key, row, column) is some ten integer operations an element,
which the compiler puts into the loop that multiplies; the backward pass computes it again, so
nothing of it is kept. It is a function of the key and the place alone: the same on any mesh, and
for a member of a `vmap`ped population.
"""

import functools
import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the others up, so that the mean stays.

    Args:
      x: any shape but []; all dimensions but the last are its rows, of which 2^32 are told apart.
        The scaling is done in float32.
      rate: in [0, 1), met to 1 / 2^33; of those that are nearer to 1 one in 2^32 is kept.
      key: None = x unchanged.
    """
    if key is None or rate == 0:
        return x
    return _drop(x, jax.random.bits(key, (2,), jnp.uint32), min(round(rate * 2**32), 2**32 - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x, words, dropped):
    """Keeps `dropped` of 2^32 draws from x, which is linear: its gradient is the same again."""
    scaled = x.astype(jnp.float32) * (2**32 / (2**32 - dropped))
    return jnp.where(_hash(words, x.shape) >= jnp.uint32(dropped), scaled, 0).astype(x.dtype)


_drop.defvjp(
    lambda x, words, dropped: (_drop(x, words, dropped), words),
    lambda dropped, words, gradient: (_drop(gradient, words, dropped), None),
)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[*shape] uint32, random enough for dropout; not for sampling, where `jax.random` belongs."""
    return _hash(jax.random.bits(key, (2,), jnp.uint32), shape)


def _hash(words, shape):
    """Each row has two words, a and b; column c of it is mix(c ^ a) ^ b.

    Two rows with nearly the same a would repeat each other without b.
    """
    first, second = words
    *outer, width = shape
    strides = [math.prod(outer[axis + 1 :]) % 2**32 for axis in range(len(outer))]
    place = lambda axis, shape: jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    row = jnp.zeros((*outer, 1), jnp.uint32)
    for axis, stride in enumerate(strides):
        row += place(axis, (*outer, 1)) * jnp.uint32(stride)
    column = place(len(outer), (*(1 for _ in outer), width))
    return _mix(column ^ _mix(row ^ first)) ^ _mix(row ^ second)


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each input bit flips each output bit half of the time.

    The constants are those that hash-prospector found for this form (C. Wellons, "lowbias32").
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
