"""Heads: counts, what they compute, what they share with the encoder."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from pretraining.errors import UserError
from pretraining.models.attention import Attention
from pretraining.models.heads import LanguageModelHead, gather_positions
from pretraining.models.transformer import Transformer, TransformerConfig


class Tied(nn.Module):
    """An encoder and a head that reads its embeddings."""

    config: TransformerConfig

    def setup(self):
        self.encoder = Transformer(self.config)
        self.head = LanguageModelHead(self.config)

    def __call__(self, tokens):
        hidden = self.encoder(tokens, Attention())
        return self.head(hidden, self.encoder.embeddings.table())


class Electra(nn.Module):
    """An encoder and a generator that shares its embeddings, without the discriminator's head."""

    config: TransformerConfig
    generator_config: TransformerConfig

    def setup(self):
        self.encoder = Transformer(self.config)
        self.generator = Transformer(self.generator_config)
        self.head = LanguageModelHead(self.generator_config)

    def __call__(self, tokens):
        hidden = self.generator.encode(self.encoder.embeddings(tokens), Attention())
        logits = self.head(hidden, self.encoder.embeddings.table())
        return self.encoder(logits.argmax(-1).astype(jnp.int32), Attention())


TOKENS = jnp.zeros((1, 8), jnp.int32)


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def config_of(vocabulary_size, length, layers, width, heads, **changes):
    sizes = dict(layers=layers, width=width, heads=heads, mlp_width=4 * width)
    return TransformerConfig.create(base.model() | sizes | changes, vocabulary_size, length)


BERT = dict(segments=2, position_rows=512)
ROBERTA = dict(segments=1, position_rows=514, position_offset=2)
GPT2 = dict(norm_order="pre", embedding_norm=False, head_transform=False, head_bias=False)


@pytest.mark.parametrize(
    "config, expected",
    [
        # Published with pooler (H^2 + H) and the next-sentence head (2H + 2), taken off here.
        (config_of(30522, 512, 2, 128, 2, **BERT), 4_433_468 - (128**2 + 128) - 258),
        (config_of(30522, 512, 4, 256, 4, **BERT), 11_267_900 - (256**2 + 256) - 514),
        (config_of(30522, 512, 4, 512, 8, **BERT), 29_058_876 - (512**2 + 512) - 1026),
        (config_of(30522, 512, 12, 768, 12, **BERT), 110_106_428 - (768**2 + 768) - 1538),
        (config_of(30522, 512, 24, 1024, 16, **BERT), 336_226_108 - (1024**2 + 1024) - 2050),
        (config_of(50265, 512, 12, 768, 12, **ROBERTA), 124_697_433),
        (config_of(50265, 512, 24, 1024, 16, **ROBERTA), 355_412_057),
        (config_of(50257, 1024, 12, 768, 12, **GPT2), 124_439_808),
    ],
    ids=["tiny", "mini", "small", "base", "large", "roberta-base", "roberta-large", "gpt2"],
)
def test_parameter_counts_with_the_head_equal_the_published_ones(config, expected):
    assert count(shapes(Tied(config))) == expected


@pytest.mark.parametrize(
    "sizes, generator, embedding_width, expected",
    [
        ((12, 256, 4), (12, 64, 1), 128, 14_196_219),
        ((12, 768, 12), (12, 256, 4), 768, 119_386_427),
        ((24, 1024, 16), (24, 256, 4), 1024, 354_655_291),
    ],
    ids=["small", "base", "large"],
)
def test_electra_shares_the_embeddings_once(sizes, generator, embedding_width, expected):
    changes = BERT | dict(embedding_width=embedding_width)
    model = Electra(
        config_of(30522, 512, *sizes, **changes), config_of(30522, 512, *generator, **changes)
    )
    params = shapes(model)
    assert "embeddings" not in params["generator"]
    width = sizes[1]
    discriminator_head = width**2 + width + width + 1  # dense and one logit
    assert count(params) + discriminator_head == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(), {"transform", "norm", "bias"}),
        (dict(head_bias=False), {"transform", "norm"}),
        (dict(head_transform=False), {"bias"}),
        (dict(tie_head=False, head_transform=False, head_bias=False), {"output"}),
    ],
)
def test_parameters_of_the_head(make_config, changes, expected):
    params = shapes(Tied(make_config(**changes)))
    assert set(params.get("head", {})) == expected
    assert set(params["encoder"]["embeddings"]) == {"token", "position", "norm"}


def random_arrays(*shapes_):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes_]


@pytest.mark.parametrize("tie_head", [True, False])
def test_logits_against_numpy(make_config, tie_head):
    config = make_config(
        embedding_width=12, tie_head=tie_head, activation="relu", norm_epsilon=1e-3
    )
    hidden, embedding, output, kernel = random_arrays((2, 3, 16), (50, 12), (50, 12), (16, 12))
    bias, scale, shift, out_bias = random_arrays((12,), (12,), (12,), (50,))
    params = {
        "transform": {"kernel": kernel, "bias": bias},
        "norm": {"scale": scale, "bias": shift},
        "bias": out_bias,
    }
    if not tie_head:
        params["output"] = {"embedding": output}
    logits = LanguageModelHead(config).apply({"params": params}, hidden, embedding)
    table = embedding if tie_head else output
    hidden, table, kernel, bias, scale, shift, out_bias = (
        np.asarray(x, np.float64) for x in (hidden, table, kernel, bias, scale, shift, out_bias)
    )
    x = np.maximum(hidden @ kernel + bias, 0)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale + shift
    np.testing.assert_allclose(logits, x @ table.T + out_bias, rtol=1e-4, atol=1e-4)


def test_logits_are_float32_sums_in_16_bit_compute(make_config):
    config = make_config(dtype="bfloat16", head_transform=False, width=64, vocabulary_size=500)
    hidden, embedding, bias = random_arrays((7, 64), (500, 64), (500,))
    hidden = hidden.astype(jnp.bfloat16)
    logits = LanguageModelHead(config).apply({"params": {"bias": bias}}, hidden, embedding)
    assert logits.dtype == jnp.float32
    rounded = np.asarray(embedding.astype(jnp.bfloat16), np.float64)
    exact = np.asarray(hidden, np.float64) @ rounded.T + np.asarray(bias)
    # Rounded operands, but no rounding of the sum: that alone would cost up to 2^-9 of it.
    assert np.abs(logits - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.usefixtures("branch")
def test_a_tied_head_sends_its_gradient_to_the_embeddings(make_config):
    head = LanguageModelHead(make_config(head_transform=False, head_bias=False))
    hidden, embedding = random_arrays((3, 16), (50, 16))
    gradient = jax.grad(lambda table: jnp.sum(head.apply({}, hidden, table)[:, 7]))(embedding)
    np.testing.assert_allclose(gradient[7], hidden.sum(0), rtol=1e-5)
    assert (np.flatnonzero(np.abs(gradient).max(-1)) == [7]).all()


@pytest.mark.usefixtures("branch")
def test_the_gradient_of_the_bias_is_the_sum_over_all_rows(make_config):
    config = make_config(vocabulary_size=7, width=4, heads=1, head_transform=False)
    x, table, weights = random_arrays((2, 3, 4), (7, 4), (2, 3, 7))
    head = LanguageModelHead(config)

    def loss(bias, x):
        return jnp.sum(head.apply({"params": {"bias": bias}}, x, table) * weights)

    of_bias, of_x = jax.grad(loss, (0, 1))(jnp.ones(7), x)
    np.testing.assert_allclose(of_bias, np.asarray(weights).sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(of_x, np.einsum("bkv,vd->bkd", weights, table), rtol=1e-5)


def test_widths_that_do_not_fit_are_refused(make_config):
    config = make_config(embedding_width=8, head_transform=False)
    with pytest.raises(UserError) as error:
        jax.eval_shape(Tied(config).init, jax.random.key(0), TOKENS)
    for part in ("head_transform=False", "config.model.width=16", "config.model.embedding_width=8"):
        assert part in str(error.value)


def test_gather_positions():
    hidden = jnp.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    out = gather_positions(hidden, jnp.array([[3, 0], [1, 1]]))
    expected = [[[9, 10, 11], [0, 1, 2]], [[15, 16, 17], [15, 16, 17]]]
    np.testing.assert_array_equal(out, expected)
