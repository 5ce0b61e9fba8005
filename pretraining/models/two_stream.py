"""The two-stream Transformer-XL of XLNet (Yang et al. 2019, section 2.3; xlnet/modeling.py).

Both streams have the same weights. The content stream knows every token; the query stream, which
runs at K positions only, knows the position it must guess and the content that comes before it in
the order, `Attention.rank`.

Letters: B rows, L positions, K positions of the query stream, D width, H heads, d = D / H.

Departures from modeling.py: there is no memory of the previous row; keys and values come from one
array, so that it would be put in front of that. Dropout is not applied between the two products of
the feed-forward block, and rows share that of the distances. Weights are drawn as in transformer.py
(cut at 2 sd), the mask embedding too. A query that sees nothing gets 0, not the mean of what is
hidden from it.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pretraining.errors import UserError
from pretraining.models.attention import Attention, mix, softmax, visible
from pretraining.models.config import TransformerConfig
from pretraining.models.dropout import dropout
from pretraining.models.linear import joint
from pretraining.models.transformer import (
    WATCHED,
    Block,
    Embeddings,
    dense,
    fold,
    run_blocks,
)


class TwoStream(nn.Module):
    """Embeddings and N blocks with relative positions and relative segments.

    In the role of `Transformer` it is the content stream alone. Segment types have no table: it
    only counts whether two positions have the same one.
    """

    config: TransformerConfig

    def setup(self):
        _check(self.config)
        self.embeddings = Embeddings(self.config)
        self.mask_embedding = self.param(
            "mask_embedding", _normal(self.config), (self.config.width,)
        )
        self.layer = [RelativeBlock(self.config) for _ in range(self.config.layers)]

    def __call__(
        self,
        tokens: jax.Array,
        attention: Attention,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        all_layers: bool = False,
        backward: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """The content stream of `tokens`.

        Args:
          tokens: [B, L] int32.
          attention: who sees whom; without a rank, everybody valid.
          segments: [B, L] int32; None = all the same.
          key: of the dropout; None = no dropout.
          all_layers: return N + 1 arrays: after the embeddings and after each block.
          backward: [B] bool, rows that stand in reverse order: their distances are negated. None:
            no row does.

        Returns:
          [B, L, D] in the compute dtype, or the tuple of all layers.
        """
        embedded = self.embeddings(tokens, key=fold(key, 0))
        return self.encode(embedded, attention, segments, key, all_layers, backward)

    def encode(
        self,
        embedded: jax.Array,
        attention: Attention,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        all_layers: bool = False,
        backward: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """The content stream of embeddings [B, L, D]; the rest as in `__call__`."""
        relations = self._relations(embedded, attention, segments, backward, key)
        layers = [content for (content,) in self._run((embedded,), relations, key, all_layers)]
        return (embedded, *layers) if all_layers else layers[-1]

    def two_streams(
        self,
        embedded: jax.Array,
        attention: Attention,
        positions: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        backward: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Both streams of embeddings [B, L, D]; the rest as in `__call__`.

        Args:
          attention: has a rank; without one the query stream would see what it must guess.
          positions: [B, K] int32, where the query stream runs.

        Returns:
          Content [B, L, D] and query [B, K, D].
        """
        relations = self._relations(embedded, attention, segments, backward, key, positions)
        masked = jnp.broadcast_to(self.mask_embedding, (*positions.shape, self.config.width))
        query = self.embeddings.add(masked, key=fold(key, self.config.layers + 1))
        return self._run((embedded, query), relations, key)[-1]

    def _relations(self, embedded, attention, segments, backward, key, positions=None):
        encoding = distance_encoding(embedded.shape[1], self.config.width)
        encoding = dropout(
            jnp.asarray(encoding, self.config.dtype),
            self.config.dropout,
            fold(key, self.config.layers + 2),
        )
        return Relations(attention, encoding, segments, backward, positions)

    def _run(self, streams, relations, key, all_layers=False):
        layers = run_blocks(self.layer, streams, relations, key, all_layers)
        keys = [fold(key, self.config.layers + 3 + number) for number in range(len(streams))]
        last = [
            dropout(x, self.config.dropout, key) for x, key in zip(layers[-1], keys, strict=True)
        ]
        return [*layers[:-1], tuple(last)]


@struct.dataclass
class Relations:
    """What a block reads beside its streams.

    Attributes:
      attention: who sees whom.
      encoding: [2 L - 1, D], see `distance_encoding`.
      segments: [B, L] int32 or None.
      backward: [B] bool or None.
      positions: [B, K] int32, where the query stream runs, or None.
    """

    attention: Attention
    encoding: jax.Array
    segments: jax.Array | None = None
    backward: jax.Array | None = None
    positions: jax.Array | None = None


class RelativeBlock(Block):
    """Attention and feed-forward of one stream or two, with a norm after each sum."""

    def __call__(
        self,
        streams: tuple[jax.Array, ...],
        relations: Relations,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Content [B, L, D] and, where there is one, query [B, K, D] -> the same."""
        keys = [fold(key, place) for place in range(len(streams) + 1)]
        attended = self.attention(streams, relations, keys[0])
        return tuple(
            self._finish(stream, update, key)
            for stream, update, key in zip(streams, attended, keys[1:], strict=True)
        )

    def make_attention(self) -> nn.Module:
        return RelativeAttention(self.config)

    def _finish(self, hidden, update, key):
        hidden = self._residual(lambda _: update, self.attention_norm, hidden, fold(key, 0))
        return self._residual(self.mlp, self.mlp_norm, hidden, fold(key, 1))


class RelativeAttention(nn.Module):
    """Attention whose scores are of contents, of distances, and of being in the same segment.

    For a query at position i and a key at position j, with R the encoding of the distance i - j:
    score = ((q + r_w) k + (q + r_r) W R + (q + r_s) s) / sqrt(d), where s is one vector for the
    same segment and another one for different segments.

    Kernels without bias: query, key, value, position (W) [D, H, d]; out [H, d, D]. Further
    parameters: content_bias (r_w), position_bias (r_r), segment_bias (r_s) [H, d] and
    segment_embedding [2, H, d], the same and different.
    """

    config: TransformerConfig

    def setup(self):
        heads = (self.config.heads, self.config.head_width)
        plain = dataclasses.replace(self.config, bias=False)
        self.query, self.key, self.value, self.position = (dense(plain, heads) for _ in range(4))
        self.out = dense(plain, plain.width, axis=(-2, -1))
        normal = _normal(self.config)
        self.content_bias = self.param("content_bias", normal, heads)
        self.position_bias = self.param("position_bias", normal, heads)
        self.segment_bias = self.param("segment_bias", normal, heads)
        self.segment_embedding = self.param("segment_embedding", normal, (2, *heads))

    def __call__(
        self,
        streams: tuple[jax.Array, ...],
        relations: Relations,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """Content [B, L, D] and, where there is one, query [B, K, D] -> the same; `key` drops
        attention probabilities."""
        projected = joint([self.query, self.key, self.value], streams[0])
        queries, keys, values = (x.transpose(0, 2, 1, 3) for x in projected)
        queries = [queries, *(self.query(x).transpose(0, 2, 1, 3) for x in streams[1:])]
        distances = self._distances(relations)
        places = (None, relations.positions)
        return tuple(
            self._attend(query, keys, values, distances, relations, places[n], fold(key, n))
            for n, query in enumerate(queries)
        )

    def _distances(self, relations):
        """Keys of the distances, [H, 2 L - 1, d], or [B, H, 2 L - 1, d] where rows differ."""
        distances = self.position(relations.encoding).transpose(1, 0, 2)
        if relations.backward is None:
            return distances
        backward = relations.backward[:, None, None, None]
        exact = distances.astype(jnp.float32)  # so that their gradients are summed over rows
        return jnp.where(backward, exact[None, :, ::-1], exact[None]).astype(distances.dtype)

    def _attend(self, query, keys, values, distances, relations, positions, key):
        """One stream; positions None = the content stream, which is everywhere."""
        scores = self._score(query, self.content_bias, keys)
        scores += self._by_distance(query, distances, positions)
        if relations.segments is not None:
            scores += self._by_segment(query, relations.segments, positions)
        mask = _mask(relations.attention, keys.shape[2], positions)
        if positions is None and self.is_mutable_collection(WATCHED):  # of the content stream
            self.sow(WATCHED, "probabilities", softmax(scores, mask))
        out = mix(scores, mask, values, self.config.attention_dropout, key)
        if mask is not None:
            out = jnp.where(mask.any(axis=-1, keepdims=True), out, 0)
        return self.out(out.transpose(0, 2, 1, 3))

    def _score(self, query, bias, keys):
        """Scores in float32 of queries [B, H, L or K, d] and keys [B, H, M, d]: [B, H, L or K, M].

        Keys without rows, [H, M, d], leave the heads outside, [H, B, L or K, M]: a CPU multiplies
        them three times as fast.
        """
        # In float32, in which the gradient of the bias is summed then.
        exact = (query.astype(jnp.float32) + bias[None, :, None]) * query.shape[-1] ** -0.5
        query = exact.astype(query.dtype)
        form = "bhld,bhmd->bhlm" if keys.ndim == 4 else "bhld,hmd->hblm"
        return jnp.einsum(form, query, keys, preferred_element_type=jnp.float32)

    def _by_distance(self, query, distances, positions):
        scores = self._score(query, self.position_bias, distances)
        outside = distances.ndim == 3  # the heads
        if positions is None:
            scores = shift(scores)
            return scores.swapaxes(0, 1) if outside else scores
        return pick(scores.swapaxes(0, 1) if outside else scores, positions)

    def _by_segment(self, query, segments, positions):
        embedding = self.segment_embedding.astype(query.dtype).transpose(1, 0, 2)
        scores = self._score(query, self.segment_bias, embedding).swapaxes(0, 1)
        own = segments if positions is None else jnp.take_along_axis(segments, positions, axis=1)
        different = own[:, None, :, None] != segments[:, None, None]
        return jnp.where(different, scores[..., 1:], scores[..., :1])


def distance_encoding(length: int, width: int) -> np.ndarray:
    """[2 L - 1, D] float32: sines, then cosines, of the distances L - 1, ..., 0, ..., 1 - L."""
    distance = np.arange(length - 1, -length, -1)
    angle = np.outer(distance, 10_000.0 ** (-np.arange(0, width, 2) / width))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


@jax.custom_vjp
def shift(scores: jax.Array) -> jax.Array:
    """From scores by distance, [..., L, 2 L - 1], to scores by key, [..., L, L].

    Row i wants the entries from L - 1 - i on. Read as one line, the rows' beginnings are then
    2 L - 2 apart, so that no entry is looked up (Dai et al. 2019, appendix B).
    """
    *outer, length, width = scores.shape
    line = scores.reshape(*outer, length * width)[..., length - 1 : -1]
    return line.reshape(*outer, length, width - 1)[..., :length]


def _shift_back(_, gradient):
    """The same steps back; as one `pad` of all they take a CPU half as long again."""
    *outer, length, _ = gradient.shape
    zeros = lambda *shape: jnp.zeros((*outer, *shape), gradient.dtype)
    rows = jnp.concatenate([gradient, zeros(length, length - 2)], axis=-1)
    line = jax.lax.optimization_barrier(rows).reshape(*outer, -1)
    line = jnp.concatenate([zeros(length - 1), line, zeros(1)], axis=-1)
    return (line.reshape(*outer, length, 2 * length - 1),)


shift.defvjp(lambda scores: (shift(scores), None), _shift_back)


def pick(scores: jax.Array, positions: jax.Array) -> jax.Array:
    """The same of the rows at some positions [B, K]: [B, H, K, 2 L - 1] -> [B, H, K, L]."""
    length = (scores.shape[-1] + 1) // 2
    place = (length - 1 - positions)[:, :, None] + jnp.arange(length)[None, None]
    return jnp.take_along_axis(scores, place[:, None], axis=-1)


def _mask(attention, length, positions):
    """As `visible`, but what stands at or beyond `attention.length` sees nothing."""
    mask = visible(attention, length, positions)
    if attention.length is None:
        return mask
    own = jnp.arange(length)[None] if positions is None else positions
    return mask & (own < attention.length[:, None])[:, None, :, None]


def _normal(config):
    return nn.initializers.truncated_normal(config.init_std)


def _check(config):
    """Refuses what this network has no place for."""
    for refused, value, allowed in (
        (config.position != "relative", f"position={config.position!r}", "'relative'"),
        (config.norm_order != "post", f"norm_order={config.norm_order!r}", "'post'"),
        (config.segments > 0, f"segments={config.segments}", "0: its segments are relative"),
        (config.width % 2, f"width={config.width}", "even: half sines, half cosines"),
        (
            config.embedding_width != config.width,
            f"embedding_width={config.embedding_width}",
            f"config.model.width={config.width}",
        ),
    ):
        if refused:
            raise UserError(f"config.model.{value}: in a two-stream network it must be {allowed}")
