"""One Transformer: BERT, RoBERTa, ELECTRA, GPT-2 and modern variants, by config.

Letters: B rows, L positions, D width, E width of the embeddings, F inner width of the feed-forward
block, H heads, d = D / H, N layers, V vocabulary.

Parameters are float32 and have one layout, `layer_0`, `layer_1`, ..., whether layers run unrolled
or scanned; compute is in `config.dtype`, norms and softmax in float32.
"""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pretraining.errors import UserError
from pretraining.models.attention import Attention, attend, probabilities, rotary
from pretraining.models.config import TransformerConfig
from pretraining.models.dropout import dropout
from pretraining.models.linear import Dense, Table, joint
from pretraining.models.partition import ROWS, TENSOR, constrain

ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
_OUTPUT = "output"  # of a sub-layer, as `config.model.remat` knows it
WATCHED = "intermediates"  # collection of attention probabilities, where a caller makes it mutable


class Transformer(nn.Module):
    """Embeddings and N blocks.

    A network that reads another one's embeddings (ELECTRA's generator) calls
    `encode(other.embeddings(tokens), ...)`: its own embeddings are then never created.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        if config.position == "relative":
            raise UserError(
                "config.model.position='relative' is of two-stream networks alone; this objective "
                "takes learned, rotary or none"
            )
        self.embeddings = Embeddings(config)
        if config.embedding_width != config.width:
            self.embeddings_project = dense(config, config.width)
        self.layer = [Block(config) for _ in range(config.layers)]
        if config.norm_order == "pre":
            self.final_norm = norm(config)

    def __call__(
        self,
        tokens: jax.Array,
        attention: Attention,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        all_layers: bool = False,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """The hidden states of `tokens`.

        Args:
          tokens: [B, L] int32.
          attention: who sees whom.
          segments: [B, L] int32, segment types; None = all 0.
          key: of the dropout; None = no dropout.
          all_layers: return N + 1 arrays: after the embeddings and after each block, the last of
            them after the final norm.

        Returns:
          [B, L, D] in the compute dtype, or the tuple of all layers.

        Raises:
          UserError: segments are given but `config.model.segments` is 0, or the attention kernel
            cannot serve `attention`.
        """
        embedded = self.embeddings(tokens, segments, fold(key, 0))
        return self.encode(embedded, attention, key, all_layers)

    def encode(
        self,
        embedded: jax.Array,
        attention: Attention,
        key: jax.Array | None = None,
        all_layers: bool = False,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """The hidden states of embeddings [B, L, E]; the rest as in `__call__`."""
        config = self.config
        if config.embedding_width != config.width:
            embedded = self.embeddings_project(embedded)
        hidden = run_blocks(self.layer, embedded, attention, key, all_layers)
        if config.norm_order == "pre":
            hidden[-1] = normalize(self.final_norm, hidden[-1])
        return (embedded, *hidden) if all_layers else hidden[-1]


def run_blocks(blocks, hidden, attention, key=None, all_layers: bool = False) -> list:
    """The outputs of blocks that follow each other: at least the last, or `all_layers`.

    Where the collection WATCHED is mutable, each block's attention keeps its probabilities
    [B, H, L, L] there (`probabilities`), in the same layout whatever `config.execution` is.

    Args:
      blocks: submodules of one class, whose `config` says how they are executed; called as
        `block(hidden, attention, key)`.
      hidden: an array, or a tuple of them, that a block maps to its like.
      attention: what all blocks read.
      key: of the dropout; None = no dropout.
    """
    if blocks[0].is_initializing():
        return [block(hidden, attention, None) for block in blocks]
    # The same keys in every execution, so that the dropout is the same too.
    keys = None if key is None else jax.vmap(fold, (None, 0))(key, 1 + jnp.arange(len(blocks)))
    if blocks[0].is_mutable_collection(WATCHED):  # what they keep there needs them in their place
        steps = [lambda hidden, key, b=block: b(hidden, attention, key) for block in blocks]
        return _unrolled(steps, hidden, keys)
    config = blocks[0].config
    block = type(blocks[0])(config, parent=None)
    layers = [block.variables["params"] for block in blocks]
    step = _rematerialized(
        config,
        lambda params, hidden, key: block.apply({"params": params}, hidden, attention, key),
    )
    if config.execution == "scanned":
        return _scanned(step, layers, hidden, keys, all_layers)
    return _unrolled([functools.partial(step, params) for params in layers], hidden, keys)


def _unrolled(steps, hidden, keys):
    outputs = []
    for index, step in enumerate(steps):
        hidden = step(hidden, None if keys is None else keys[index])
        outputs.append(hidden)
    return outputs


def _rematerialized(config, step):
    """The step, of which the backward pass is given what `config.remat` says, and its arguments.

    "outputs" keeps those of attention and feed-forward; "dots" the products with weights, while
    those of attention, L x L, are computed again.
    """
    if config.remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = {
        "outputs": policies.save_only_these_names(_OUTPUT),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[config.remat]
    return jax.checkpoint(step, policy=policy, prevent_cse=config.execution == "unrolled")


def _scanned(step, layers, hidden, keys, all_layers):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def body(hidden, layer):
        hidden = step(layer[0], hidden, layer[1])
        return hidden, hidden if all_layers else None

    last, outputs = jax.lax.scan(body, hidden, (stacked, keys))
    if not all_layers:
        return [last]
    return [jax.tree.map(operator.itemgetter(index), outputs) for index in range(len(layers))]


class Embeddings(nn.Module):
    """Sum of token, position and segment embeddings, then norm and dropout."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.token = embed(config, config.vocabulary_size)
        if config.position == "learned":
            self.position = embed(config, config.position_rows, config.position_init_std)
        if config.segments:
            self.segment = embed(config, config.segments)
        if config.embedding_norm:
            self.norm = norm(config)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, L, E] in the compute dtype; arguments and errors as in `Transformer`."""
        return self.add(self.token(tokens), segments, key)

    def add(
        self,
        vectors: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The same of token vectors [B, L, E] float32, which may be another network's: the own
        token table is then never created."""
        config = self.config
        total = vectors
        if config.position == "learned":
            total = total + self._positions(vectors.shape[1])
        if config.segments:
            none = jnp.zeros(vectors.shape[:2], jnp.int32)
            total = total + self.segment(none if segments is None else segments)
        elif segments is not None:
            raise UserError("config.model.segments=0, but the objective gives segment types")
        if config.embedding_norm:
            total = self.norm(total)
        return constrain(dropout(total.astype(config.dtype), config.dropout, key), ROWS)

    def table(self) -> jax.Array:
        """[V, E] float32, the token embeddings, which a tied head reads."""
        return self.token.embedding

    def _positions(self, length):
        offset = self.config.position_offset
        if offset + length > self.config.position_rows:
            raise UserError(
                f"config.model.position_rows={self.config.position_rows} is too small for {length} "
                f"positions from config.model.position_offset={offset}"
            )
        return self.position.embedding[None, offset : offset + length]


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and a norm.

    The norm follows the sum in BERT's order ("post") and precedes the sub-layer in GPT-2's ("pre").
    """

    config: TransformerConfig

    def setup(self):
        self.attention_norm = norm(self.config)
        self.attention = self.make_attention()
        self.mlp_norm = norm(self.config)
        self.mlp = MLP(self.config)

    def __call__(
        self, hidden: jax.Array, attention: Attention, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        keys = [fold(key, place) for place in range(3)]
        attend_all = lambda x: self.attention(x, attention, keys[0])
        hidden = self._residual(attend_all, self.attention_norm, hidden, keys[1])
        return self._residual(self.mlp, self.mlp_norm, hidden, keys[2])

    def make_attention(self) -> nn.Module:
        """The sub-layer that other blocks have in its place."""
        return SelfAttention(self.config)

    def _residual(self, layer, norm, hidden, key):
        pre = self.config.norm_order == "pre"
        update = constrain(layer(normalize(norm, hidden) if pre else hidden), ROWS)
        update = dropout(checkpoint_name(update, _OUTPUT), self.config.dropout, key)
        total = hidden + update
        return total if pre else normalize(norm, total)


class SelfAttention(nn.Module):
    """Kernels: query, key, value [D, H, d]; out [H, d, D]."""

    config: TransformerConfig

    def setup(self):
        heads = (self.config.heads, self.config.head_width)
        self.query = dense(self.config, heads)
        self.key = dense(self.config, heads)
        self.value = dense(self.config, heads)
        self.out = dense(self.config, self.config.width, axis=(-2, -1))

    def __call__(
        self, hidden: jax.Array, attention: Attention, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, L, D] -> [B, L, D]; `key` drops attention probabilities."""
        turn = rotary if self.config.position == "rotary" else lambda x: x
        queries, keys, values = joint([self.query, self.key, self.value], hidden)
        projected = turn(queries), turn(keys), values
        if self.is_mutable_collection(WATCHED):
            self.sow(WATCHED, "probabilities", probabilities(*projected[:2], attention))
        out = attend(
            *(constrain(x, ROWS, None, TENSOR) for x in projected),
            attention,
            kernel=self.config.attention,
            dropout_rate=self.config.attention_dropout,
            dropout_key=key,
        )
        return self.out(out)


class MLP(nn.Module):
    """Kernels: up, gate [D, F]; down [F, D]. The gated form is Shazeer's (2020)."""

    config: TransformerConfig

    def setup(self):
        self.up = dense(self.config, self.config.mlp_width)
        if self.config.gated:
            self.gate = dense(self.config, self.config.mlp_width)
        self.down = dense(self.config, self.config.width)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        # Its inner values are computed again in the backward pass, which takes less time than to
        # write and read them.
        activation = jax.checkpoint(
            ACTIVATIONS[self.config.activation], prevent_cse=self.config.execution == "unrolled"
        )
        if self.config.gated:
            inner = activation(self.gate(hidden)) * self.up(hidden)
        else:
            inner = activation(self.up(hidden))
        return self.down(constrain(inner, ROWS, None, TENSOR))


def dense(
    config: TransformerConfig,
    features: int | tuple[int, ...],
    axis: int | tuple[int, ...] = -1,
    dtype: str | None = None,
) -> nn.Module:
    """A projection of `axis` to `features`, with the dtypes, bias and initialization of `config`.

    A `dtype` overrides the one of `config`: outputs of a head want float32.

    The normal is cut at 2 sd and not widened to make up for it, as in BERT's code
    (bert/modeling.py, create_initializer): the sd of the weights is .88 of `init_std`.
    """
    return Dense(
        features,
        axis=axis,
        use_bias=config.bias,
        dtype=dtype or config.dtype,
        kernel_init=nn.initializers.truncated_normal(config.init_std),
    )


def embed(config: TransformerConfig, rows: int, init_std: float | None = None) -> nn.Module:
    """A table [rows, E], initialized as in `dense`; read in float32."""
    std = config.init_std if init_std is None else init_std
    return Table(rows, config.embedding_width, embedding_init=nn.initializers.truncated_normal(std))


def norm(config: TransformerConfig) -> nn.Module:
    """LayerNorm or RMSNorm in float32; see `normalize`."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=jnp.float32)
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        dtype=jnp.float32,
        use_bias=config.bias,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
    )


def normalize(norm: nn.Module, x: jax.Array) -> jax.Array:
    """`norm` in float32, the result in the dtype of x."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def fold(key: jax.Array | None, place: int | jax.Array) -> jax.Array | None:
    """The dropout key of one place; None (no dropout) stays None."""
    return None if key is None else jax.random.fold_in(key, place)
