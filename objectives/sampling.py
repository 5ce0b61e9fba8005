"""What the discriminator gets to see: rows in which tokens are replaced by a generator's samples.

Letters: B rows, L positions, K slots of a row, G width of the generator, V vocabulary. An example
is one of objectives/replaced_token_detection.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pretraining.models.heads import gather_positions


class Fake(NamedTuple):
    """Rows with the generator's samples in place.

    Attributes:
      samples: [B, K] int32, of every slot.
      tokens: [B, L] int32, what the discriminator sees.
      selected: [B, L] bool, a sample stands here.
      replaced: [B, L] bool, and it is not the original.
      valid: [B, L] bool, a token, or the [CLS] or [SEP] of a row that has tokens.
      generator_hidden: [B, L, G].
    """

    samples: Any
    tokens: Any
    selected: Any
    replaced: Any
    valid: Any
    generator_hidden: Any


def make_fake(
    apply: Callable,
    params: Any,
    hidden: jax.Array,
    example: Any,
    chunk: int,
    disallow_correct: bool = False,
) -> Fake:
    """What the discriminator gets to see; no gradient goes through it.

    Args:
      hidden: [B, L, G], what `Networks.generate` returned.
      chunk: `config.model.logits_chunk`.
      disallow_correct: never sample the original token.
    """
    hidden, params = jax.lax.stop_gradient((hidden, params))
    project = functools.partial(apply, {"params": params}, method="project")
    at_slots = gather_positions(hidden, example.positions)
    samples = sample(project, at_slots, example, chunk, disallow_correct)
    tokens, selected = replace(example, samples)
    inside = jnp.arange(tokens.shape[1])[None] < example.length[:, None]
    # A row of [CLS] and [SEP] alone fills up a batch and counts nothing.
    valid = inside & (example.length > 2)[:, None]
    return Fake(samples, tokens, selected, tokens != example.original, valid, hidden)


def replace(example: Any, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The samples [B, K] in their places: (tokens [B, L] int32, selected [B, L] bool).

    A position with several samples gets the floor of the mean of their ids, a token that nobody
    drew, as in the original (electra/pretrain/pretrain_helpers.py, scatter_update).
    """

    def one(original, positions, weights, samples):
        used = jnp.where(weights > 0, positions, original.shape[0])
        nothing = jnp.zeros_like(original)
        total = nothing.at[used].add(samples, mode="drop")
        count = nothing.at[used].add(1, mode="drop")
        return jnp.where(count > 0, total // jnp.maximum(count, 1), original), count > 0

    return jax.vmap(one)(example.original, example.positions, example.weights, samples)


def sample(
    project: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    example: Any,
    chunk: int,
    disallow_correct: bool = False,
) -> jax.Array:
    """One token for every slot, from softmax(logits / temperature): [B, K] int32.

    The argmax of logits / temperature + Gumbel noise. The noise of a slot is addressed by its row's
    key and its position, so that it depends neither on the other rows and slots nor on K; a
    position that stands in several slots has noise of its own in each.

    Args:
      project: hidden states [B, G] -> logits [B, V].
      hidden: [B, K, G].
      example: its `positions`, `labels`, `noise` and `temperature` are read.
      chunk: how many positions of a row have logits at once.
      disallow_correct: never take the label.
    """
    keys = jax.random.wrap_key_data(example.noise)
    fold_in = jax.vmap(jax.random.fold_in)

    def draw(hidden, position, repeat, label):
        logits = project(hidden)
        slot_keys = fold_in(fold_in(keys, position), repeat)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(slot_keys)
        score = logits / example.temperature[:, None] + noise
        token = jnp.arange(score.shape[1])[None]
        if disallow_correct:
            score = jnp.where(token == label[:, None], -jnp.inf, score)
        # The argmax, by two reductions that a CPU does many times faster.
        best = score.max(axis=1, keepdims=True)
        return jnp.min(jnp.where(score == best, token, score.shape[1]), axis=1)

    positions = example.positions
    return by_positions(draw, chunk, hidden, positions, _repeats(positions), example.labels)


def _repeats(positions):
    """[B, K] int32: how many earlier slots of the row have the same position."""
    same = positions[:, :, None] == positions[:, None, :]
    return jnp.sum(jnp.tril(same, -1), axis=2, dtype=jnp.int32)


def label_log_probs(
    project: Callable[[jax.Array], jax.Array], hidden: jax.Array, labels: jax.Array, chunk: int
) -> jax.Array:
    """log softmax(logits) at the labels [B, L]: [B, L] float32; arguments as in `sample`."""

    def read(hidden, label):
        logits = project(hidden).astype(jnp.float32)
        label_logit = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        return label_logit - jax.nn.logsumexp(logits, axis=1)

    return by_positions(jax.checkpoint(read, prevent_cse=False), chunk, hidden, labels)


def by_positions(function: Callable, chunk: int, *arrays: jax.Array) -> jax.Array:
    """[B, K], `function` of every position: arrays [B, K, ...] -> parts [B, ...] -> [B].

    It runs on `chunk` positions at once.
    """
    by_position = [array.swapaxes(0, 1) for array in arrays]
    run = lambda parts: function(*parts)
    return jax.lax.map(run, by_position, batch_size=chunk).swapaxes(0, 1)
