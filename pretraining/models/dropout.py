"""Dropout whose mask is a hash of the place of an element, computed where it is used.

Random bits by threefry cost a CPU a tenth to a fifth of a training step, and are arrays that are
written and read again. A hash of (key, row, column) is a dozen integer operations that the compiler
puts into the loop that multiplies, forward and backward; nothing of it is stored. It is a function
of the key and the place alone: the same on any mesh, and for a member of a `vmap`ped population.
"""

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the others up, so that the mean stays.

    Args:
      x: any shape but []; all dimensions but the last are its rows, of which 2^32 are told apart.
      rate: in [0, 1), met to 1 / 2^33.
      key: None = x unchanged.
    """
    if key is None or rate == 0:
        return x
    dropped = round(rate * 2**32)
    draws = hashed_bits(key, x.shape)
    return jnp.where(draws >= jnp.uint32(dropped), x * (2**32 / (2**32 - dropped)), 0)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[*shape] uint32, random enough for dropout; not for sampling, where `jax.random` belongs.

    Each row has two words that the key decides, a and b; column c of it is mix(c ^ a) ^ b. Two rows
    with nearly the same a would repeat each other without b.
    """
    place = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    strides = [math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 1)]
    row = sum((place(a) * jnp.uint32(s % 2**32) for a, s in enumerate(strides)), jnp.uint32(0))
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    return _mix(place(len(shape) - 1) ^ _mix(row ^ first)) ^ _mix(row ^ second)


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each input bit flips each output bit half of the time.

    The constants are those that hash-prospector found for this form (C. Wellons, "lowbias32").
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
