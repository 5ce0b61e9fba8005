"""Output heads. They run on the positions that are predicted, never on all of them.

Letters: B rows, L positions, K predicted positions of a row, D width, E width of the embeddings,
V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pretraining.errors import UserError
from pretraining.models.config import TransformerConfig
from pretraining.models.linear import product
from pretraining.models.partition import ROWS, TENSOR, constrain
from pretraining.models.transformer import ACTIVATIONS, dense, embed, norm, normalize


class LanguageModelHead(nn.Module):
    """Logits over the vocabulary: [transform], then the token embeddings (tied) or an own table.

    The transform, dense D -> E, activation and norm, is that of BERT (bert/run_pretraining.py,
    get_masked_lm_output) and of ELECTRA's generator; GPT-2 has none.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        if config.head_transform:
            self.transform = dense(config, config.embedding_width)
            self.norm = norm(config)
        elif config.embedding_width != config.width:
            raise UserError(
                f"config.model.head_transform=False leaves hidden states of config.model.width="
                f"{config.width} that do not fit config.model.embedding_width="
                f"{config.embedding_width}"
            )
        if not config.tie_head:
            self.output = embed(config, config.vocabulary_size)
        if config.head_bias:
            self.bias = self.param("bias", nn.initializers.zeros, (config.vocabulary_size,))

    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """Logits of hidden states.

        Args:
          hidden: [..., D].
          embedding: [V, E] float32, `encoder.embeddings.table()`; read if `config.tie_head`.

        Returns:
          [..., V] float32; the product has operands of the compute dtype and a float32 sum.

        Raises:
          UserError: E differs from D and there is no transform between them.
        """
        config = self.config
        if config.head_transform:
            hidden = ACTIVATIONS[config.activation](self.transform(hidden))
            hidden = normalize(self.norm, hidden)
        table = embedding if config.tie_head else self.output.embedding
        hidden = hidden.astype(config.dtype)
        logits = product(hidden, table, ((hidden.ndim - 1,), (1,)), jnp.float32)
        if config.head_bias:
            logits = _add_bias(logits, self.bias)
        return constrain(logits, ROWS, *[None] * (logits.ndim - 2), TENSOR)


@jax.custom_vjp
def _add_bias(logits: jax.Array, bias: jax.Array) -> jax.Array:
    """logits [..., V] + bias [V]."""
    return logits + jnp.expand_dims(bias, range(logits.ndim - 1))


def _bias_gradient(_, gradient):
    rows = gradient.shape[:-1]
    over = tuple(range(len(rows)))
    total = jax.lax.platform_dependent(
        gradient,
        # XLA's sum over so many columns takes a CPU ten times as long as a product.
        cpu=lambda g: jax.lax.dot_general(jnp.ones(rows, g.dtype), g, ((over, over), ((), ()))),
        default=lambda g: g.sum(over),
    )
    return gradient, total


_add_bias.defvjp(lambda logits, bias: (_add_bias(logits, bias), None), _bias_gradient)


def gather_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden states [B, L, D] at positions [B, K] of their row: [B, K, D]."""
    return constrain(jax.vmap(lambda row, at: row[at])(hidden, positions), ROWS)
