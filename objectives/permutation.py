"""Which tokens of a row are predicted, and in which order (XLNet: Yang et al. 2019).

Everything here is for ONE row and has static shapes. Letters: L positions of the model, P of one
permutation, C = L / P permutations of a row.

A permutation orders its targets and its functional tokens, which are special tokens and never
targets. All others are the context: seen by everybody, and seeing no target.
"""

import jax
import jax.numpy as jnp
import numpy as np

from objectives import base, selection
from pretraining.errors import UserError


def draw(config, key, starts, candidate, length, backward) -> tuple[jax.Array, jax.Array]:
    """Targets [L] bool and ranks [L] int32 of a row, one permutation after the other.

    Args:
      starts: [L] bool, begins a word; functional tokens are words.
      candidate: [L] bool, may be a target: valid and not functional.
      length: [] int32, valid positions, the functional ones included.
      backward: [] bool, the text stands in reverse order; targets are chosen in reading order.
        None: it does not.
    """
    size = config.objective.permutation_size or config.data.sequence_length
    first = size * jnp.arange(starts.shape[0] // size)
    filled = jnp.clip(length - first, 0, size)
    share = jnp.asarray(goals(config))
    goal = share[first + filled] - share[first]

    def part(key, starts, candidate, filled, goal):
        read = reverse(size, filled, backward)
        drawn = _permutation(config.objective, key, starts[read], candidate[read], filled, goal)
        return jax.tree.map(lambda x: x[read], drawn)

    starts, candidate = starts.reshape(-1, size), candidate.reshape(-1, size)
    keys = jax.random.split(key, first.shape[0])
    target, place = jax.vmap(part)(keys, starts, candidate, filled, goal)
    return target.reshape(-1), ranks(place, target, candidate).reshape(-1)


def ranks(place: jax.Array, target: jax.Array, candidate: jax.Array) -> jax.Array:
    """[C, P] int32: who stands where in the order of all (xlnet/data_utils.py, _local_perm).

    The context of a permutation comes before its targets and functional tokens, and after all of
    the permutation before; so content sees ranks up to its own, and a query those below it.

    Args:
      place: [C, P] int32, each row a permutation of 0..P-1.
      target, candidate: [C, P] bool.
    """
    parts, size = place.shape
    own = jnp.where(candidate & ~target, -1, place)
    return own + (size + 1) * jnp.arange(parts)[:, None]


def reverse(size: int, length: jax.Array, backward: jax.Array) -> jax.Array:
    """[size] int32: if `backward`, the first `length` places the other way round; None = never.

    From the row to its text and back: it is its own inverse.
    """
    place = jnp.arange(size)
    if backward is None:
        return place
    return jnp.where(backward & (place < length), length - 1 - place, place)


# ---------------------------------------------------------------------------------------- how many


def largest_goal(config) -> int:
    """K: 85 of 512 positions with `predict_fraction` 1/6."""
    return int(goals(config)[config.data.sequence_length - 1])  # one position is never used


def goals(config) -> np.ndarray:
    """[L + 1] int32: how many of the first positions are targets, halves rounded to even.

    The share of a permutation is a difference: XLNet's halves of 256 get 43 and 42.
    """
    share = config.objective.predict_fraction * np.arange(config.data.sequence_length + 1)
    return np.round(share).astype(np.int32)


# ------------------------------------------------------------------------------------------- which


def _permutation(objective, key, starts, candidate, size, goal):
    """Targets [P] bool and places [P] int32 of one permutation, in reading order."""
    place_key, ngram_key, fill_key = jax.random.split(key, 3)
    number = candidate.shape[0]
    goal = jnp.minimum(goal, candidate.sum())
    # Counted from the end, so that the last candidates are those that are taken first.
    place = number - 1 - selection.tokens(place_key, None, jnp.ones(number, bool), number)
    if objective.select == "last":
        return selection.tokens(place_key, None, candidate, goal) < number, place
    target = ngrams(objective, ngram_key, starts, candidate, size, goal)
    fill = selection.tokens(fill_key, None, candidate & ~target, goal - target.sum())
    return target | (fill < number), place


def ngrams(objective, key, starts, candidate, size, goal) -> jax.Array:
    """Targets [P] bool, at most `goal`: n-grams, each in a context of its own
    (xlnet/data_utils.py, _sample_mask).

    n is 1..`ngram_longest` with probability proportional to 1 / n. A context of n x alpha // beta
    tokens is divided by lot into what precedes the n-gram, which begins at the next word, and what
    follows it, where the next context begins. An n-gram that reaches the end is given up.

    Args:
      size: [] int32, valid positions.
    """
    n_key, context_key = jax.random.split(key)
    number, longest = candidate.shape[0], objective.ngram_longest
    place = jnp.arange(number)
    lengths = 1 + selection.draw(n_key, number, 1 / np.arange(1, longest + 1))
    context = jax.random.uniform(context_key, (number,))
    # Words before each position, and the position of each word; past the last one: number.
    before = jnp.pad(jnp.cumsum(starts), (1, 0))
    word = jnp.full(number + longest + 1, number)
    word = word.at[jnp.where(starts, before[:-1], word.shape[0])].set(place, mode="drop")

    def take(state):
        group, at, count, target = state
        n = jnp.minimum(lengths[group], goal - count)
        around = n * objective.mask_alpha // objective.mask_beta
        left = jnp.floor(context[group] * around.astype(jnp.float32)).astype(jnp.int32)
        begin = word[before[jnp.minimum(at + left, number)]]
        end = begin + n if objective.ngram_unit == "pieces" else word[before[begin] + n]
        new = candidate & (place >= begin) & (place < end) & (end < size)
        new &= jnp.cumsum(new) <= goal - count
        at = jnp.where(end < size, end + around - left, size)
        return group + 1, at, count + new.sum(), target | new

    unfinished = lambda state: (state[1] < size) & (state[2] < goal)
    zero = jnp.zeros((), jnp.int32)
    start = zero, zero, zero, jnp.zeros(number, bool)
    return jax.lax.while_loop(unfinished, take, start)[-1]


# ------------------------------------------------------------------------------------------ checks


_CHOICES = {"select": ("ngram", "last"), "ngram_unit": ("words", "pieces")}
_RANGES = {
    "predict_fraction": (0, 1),
    "backward_fraction": (0, 1),
    "ngram_longest": (1,),
    "mask_beta": (1,),
}


def check(config) -> None:
    """Raises UserError where a key is out of range or contradicts another."""
    objective, length = config.objective, config.data.sequence_length
    base.check(config, _CHOICES, _RANGES)
    base.check_range(config, "mask_alpha", objective.mask_beta)
    base.check_range(config, "permutation_size", 0, length)
    if objective.permutation_size and length % objective.permutation_size:
        raise UserError(
            f"config.objective.permutation_size={objective.permutation_size} must divide "
            f"config.data.sequence_length={length}"
        )
    if largest_goal(config) == 0:
        raise UserError(
            f"config.objective.predict_fraction={objective.predict_fraction} predicts none of "
            f"config.data.sequence_length={length} positions"
        )
