"""ELECTRA's two networks: a generator, and a discriminator whose embeddings it may read.

Letters: B rows, L positions, K slots of a row, D width of the discriminator, G of the generator, E
of the embeddings, V vocabulary. An example is one of objectives/replaced_token_detection.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from objectives import base
from objectives.base import Network
from pretraining.errors import UserError
from pretraining.models.attention import Attention
from pretraining.models.heads import LanguageModelHead, gather_positions
from pretraining.models.transformer import (
    ACTIVATIONS,
    Transformer,
    TransformerConfig,
    dense,
    fold,
)

SHARING = ("all", "token", "none")


def shrink(config: TransformerConfig, size: float, layers: float) -> TransformerConfig:
    """The generator's config: width, feed-forward and heads times `size`, layers times `layers`.

    Heads stay as wide as the discriminator's, or get wider until they divide the width; so for
    every published size these are the numbers of electra/run_pretraining.py, get_generator_config,
    which makes heads of 64 and a feed-forward of 4 times the width. The embeddings keep E.

    Raises:
      UserError: such a network cannot be; names both keys.
    """
    width = max(1, round(size * config.width))
    most = max(1, width // config.head_width)
    try:
        return dataclasses.replace(
            config,
            layers=max(1, round(layers * config.layers)),
            width=width,
            mlp_width=max(1, round(size * config.mlp_width)),
            heads=next(heads for heads in range(most, 0, -1) if width % heads == 0),
        )
    except UserError as error:
        raise UserError(
            f"config.objective.generator_size={size} and config.objective.generator_layers="
            f"{layers} make a generator that cannot be: {error}"
        ) from error


class Networks(nn.Module):
    """The discriminator `encoder` with its `head`, and a generator that may read its embeddings.

    Attributes:
      config: of the discriminator.
      generator_config: None = the uniform distribution, without parameters.
      sharing: what the generator takes from the discriminator: "all" embeddings, then it has none;
        the "token" table, then it has positions, segments and norm of its own; "none".
      two_towers: the generator is Electric's cloze model: `generator` reads from the left,
        `generator_backward` from the right, so that nothing needs to be masked.
      predicts_tokens: the discriminator predicts tokens instead of telling true from replaced.
      copies: and mixes its prediction with a copy of the input by the gate `copy_head`.
    """

    config: TransformerConfig
    generator_config: TransformerConfig | None
    sharing: str = "all"
    two_towers: bool = False
    predicts_tokens: bool = False
    copies: bool = False

    def setup(self):
        self.encoder = Transformer(self.config)
        head = LanguageModelHead if self.predicts_tokens else DetectionHead
        self.head = head(self.config)
        if self.copies:
            self.copy_head = dense(self.config, 1, dtype="float32")
        if self.generator_config is not None:
            self.generator = Transformer(self.generator_config)
            width = self.generator_config.width
            if self.two_towers:
                self.generator_backward = Transformer(self.generator_config)
                width *= 2
            self.generator_head = LanguageModelHead(
                dataclasses.replace(self.generator_config, width=width)
            )

    def __call__(self, example, key: jax.Array | None = None) -> jax.Array:
        """The generator's logits [B, K, V] at the positions of the example."""
        if self.is_initializing():
            hidden = self.encode(example)
            self.discriminate(hidden)
            if self.copies:
                self.gate(hidden)
        return self.project(gather_positions(self.generate(example, key), example.positions))

    # The generator.

    def generate(self, example, key: jax.Array | None = None) -> jax.Array:
        """The generator's hidden states [B, L, G]; 2 G of two towers, 1 of the uniform one."""
        if self.generator_config is None:
            return jnp.zeros((*example.tokens.shape, 1))
        if self.two_towers:
            return self._generate_both_ways(example, key)
        embedded = self._embed(self.generator, example.tokens, fold(key, 0))
        return self.generator.encode(embedded, _attention(example), key)

    def _generate_both_ways(self, example, key):
        """At each position what the towers know from its left and its right neighbour on.

        The second tower reads the valid part backwards. [CLS] and [SEP], which lack a neighbour,
        get what means nothing.
        """
        left, right = fold(key, 0), fold(key, 1)
        embedded = self._embed(self.generator, example.tokens, fold(left, 0))
        attention = _attention(example, causal=True)
        forward = self.generator.encode(embedded, attention, left)
        place = jnp.arange(example.tokens.shape[1])[None]
        last = example.length[:, None] - 1
        turned = jnp.where(place <= last, last - place, place)
        embedded = self._embed(self.generator_backward, example.tokens, fold(right, 0))
        if example.document is not None:
            document = jnp.take_along_axis(example.document, turned, axis=1)
            attention = attention.replace(document=document)
        embedded = gather_positions(embedded, turned)
        backward = self.generator_backward.encode(embedded, attention, right)
        backward = gather_positions(backward, turned)
        parts = jnp.roll(forward, 1, axis=1), jnp.roll(backward, -1, axis=1)
        return jnp.concatenate(parts, axis=-1)

    def project(self, hidden: jax.Array) -> jax.Array:
        """The generator's logits [..., V] float32 of its hidden states [..., G]."""
        if self.generator_config is None:
            return jnp.zeros((*hidden.shape[:-1], self.config.vocabulary_size))
        owner = self.generator if self.sharing == "none" else self.encoder
        return self.generator_head(hidden, owner.embeddings.table())

    def _embed(self, tower, tokens, key):
        if self.sharing == "all":
            return self.encoder.embeddings(tokens, None, key)
        if self.sharing == "token":
            return tower.embeddings.add(self.encoder.embeddings.token(tokens), None, key)
        return tower.embeddings(tokens, None, key)

    # The discriminator.

    def encode(self, example, key: jax.Array | None = None, all_layers: bool = False) -> Any:
        """Hidden states [B, L, D] of `example.tokens`, or those of embeddings and every block."""
        return self.encoder(example.tokens, _attention(example), key=key, all_layers=all_layers)

    def discriminate(self, hidden: jax.Array) -> jax.Array:
        """Of hidden states [..., D]: logits of "replaced" [...], or of tokens [..., V]; float32."""
        if self.predicts_tokens:
            return self.head(hidden, self.encoder.embeddings.table())
        return self.head(hidden)

    def gate(self, hidden: jax.Array) -> jax.Array:
        """Logits [...] float32 of copying the input token, of hidden states [..., D]."""
        return self.copy_head(hidden)[..., 0]


class DetectionHead(nn.Module):
    """dense D -> D, activation, dense D -> 1 (electra/run_pretraining.py).

    Departure: the second kernel is initialized like all others; TensorFlow's default is Glorot's.
    """

    config: TransformerConfig

    def setup(self):
        self.dense = dense(self.config, self.config.width)
        self.output = dense(self.config, 1, dtype="float32")

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> logits [...] float32."""
        hidden = ACTIVATIONS[self.config.activation](self.dense(hidden))
        return self.output(hidden)[..., 0]


def _attention(example, causal=False):
    return Attention(causal=causal, length=example.length, document=example.document)


# ----------------------------------------------------------------------------------- transformers


def hugging_face(networks: Networks) -> dict[str, Network]:
    """Both networks in the layout of `transformers`, each with the embeddings that it reads.

    Where they share embeddings, a generator that is put back leaves the discriminator's as they
    are. A discriminator that predicts tokens, and a uniform or two-tower generator, have no class.
    """
    found = {}
    if not networks.predicts_tokens:
        binary = base.network(networks.config, "ElectraForPreTraining")
        left_out = "the generator's two towers" if networks.two_towers else ""
        found["discriminator"] = binary._replace(logits=detection_logits, left_out=left_out)
    if networks.generator_config is not None and not networks.two_towers:
        found["generator"] = Network(
            ("ElectraForMaskedLM",),
            networks.generator_config,
            take=functools.partial(_take, networks.sharing),
            put=_put,
            logits=base.logits,
        )
    return found


def detection_logits(apply: Callable, params: Any, example: Any) -> jax.Array:
    """Logits [B, L] of "replaced", of `example.tokens`."""
    hidden = apply({"params": params}, example, method="encode")
    return apply({"params": params}, hidden, method="discriminate")


def _take(sharing, params):
    theirs = params["encoder"]["embeddings"]
    shared = {"all": theirs, "token": {"token": theirs["token"]}, "none": {}}[sharing]
    embeddings = _own_embeddings(params) | shared
    encoder = params["generator"] | {"embeddings": embeddings}
    return {"encoder": encoder, "head": params["generator_head"]}


def _put(params, network):
    generator = dict(network["encoder"])
    embeddings = generator.pop("embeddings")
    if own := _own_embeddings(params):
        generator["embeddings"] = {name: embeddings[name] for name in own}
    return params | {"generator": generator, "generator_head": network["head"]}


def _own_embeddings(params):
    return params["generator"].get("embeddings", {})
