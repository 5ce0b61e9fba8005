"""What a network did with a text: who took how much from whom, and which tokens are alike."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from pretraining.data.row import Row
from pretraining.errors import UserError
from pretraining.models.transformer import WATCHED

_STEP = 16  # positions: texts of similar length share a program


class AttentionMap(NamedTuple):
    """The attention of one text.

    Attributes:
      pieces: [n], those of the text and the special tokens around it.
      probabilities: [layers, heads, n, n] float32; row i is what position i takes from each
        position, and sums to 1.
    """

    pieces: list[str]
    probabilities: np.ndarray


def attention(objective, params, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] and the probabilities [N, H, n, n] of the pass that `encode` makes over a row.

    By the reference path of attention, whatever `config.model.attention` is. Of a network with two
    streams it is the content stream. Examples must have `tokens` and `length`, as those of a
    LanguageModel have.

    Raises:
      UserError: the objective has no `encode`, its examples lack these fields, or its network keeps
        no probabilities.
    """
    if objective.query is None or objective.encode is None:
        raise UserError("attention is not available: the objective has no query or no encode")
    rows = jax.tree.map(lambda x: np.asarray(x)[None], row)
    example = objective.query(row, np.zeros(0, np.int32))
    if not (hasattr(example, "tokens") and hasattr(example, "length")):
        raise UserError("attention is not available: examples have no tokens or no length")
    length = int(example.length)
    size = -(-length // _STEP) * _STEP
    function = _attention_function(objective.query, objective.encode, objective.model, size)
    layers = jax.device_get(function(params, rows))
    if not layers:
        raise UserError("attention is not available: the encoder is no network of pretraining")
    return np.asarray(example.tokens)[:length], np.stack(layers)[:, :, :length, :length]


@functools.lru_cache(maxsize=8)
def _attention_function(query, encode, model, size):
    """Of every layer the first `size` positions, [H, size, size]: a row may have thousands."""

    def function(params, rows):
        kept = {}

        def apply(*arguments, **options):
            out, variables = model.apply(*arguments, **options, mutable=[WATCHED])
            kept.update(variables.get(WATCHED, {}).get("encoder", {}))
            return out

        examples = jax.vmap(query)(rows, np.zeros((rows.length.shape[0], 0), np.int32))
        encode(apply, params, examples)
        layers = [kept[f"layer_{n}"]["attention"]["probabilities"][0] for n in range(len(kept))]
        return [layer[0, :, :size, :size] for layer in layers]

    return jax.jit(function)


def token_table(params) -> np.ndarray:
    """[V, E] float32, the token embeddings of the submodule `encoder`.

    Raises:
      UserError: its parameters have another layout.
    """
    try:
        return np.asarray(params["encoder"]["embeddings"]["token"]["embedding"])
    except (KeyError, TypeError):
        raise UserError("neighbours: the network keeps no table encoder/embeddings/token") from None


def nearest(vectors: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of vectors [V, D] by their cosine to a query [D], nearest first, and the cosines.

    A vector of length 0 has a cosine of 0 to all.
    """
    lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(query)
    cosines = vectors @ query / np.where(lengths > 0, lengths, 1)
    order = np.argsort(-cosines, kind="stable")
    return order, cosines[order]
