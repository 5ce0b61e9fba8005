"""Parameters: counts of published models, names, shapes, initialization."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from pretraining.models.attention import Attention
from pretraining.models.transformer import Transformer, TransformerConfig

BERT = dict(segments=2, position_rows=512)
ROBERTA = dict(segments=1, position_rows=514, position_offset=2)
ELECTRA = dict(segments=2, position_rows=512, activation="gelu_erf")
GPT2 = dict(norm_order="pre", embedding_norm=False, head_transform=False, head_bias=False)


def sized(layers, width, heads, mlp_width=None, **rest):
    return dict(layers=layers, width=width, heads=heads, mlp_width=mlp_width or 4 * width, **rest)


COUNTS = {
    "bert-tiny": (30522, 512, sized(2, 128, 2, **BERT), 4_369_408),
    "bert-mini": (30522, 512, sized(4, 256, 4, **BERT), 11_104_768),
    "bert-small": (30522, 512, sized(4, 512, 8, **BERT), 28_500_992),
    "bert-medium": (30522, 512, sized(8, 512, 8, **BERT), 41_110_528),
    "bert-base": (30522, 512, sized(12, 768, 12, **BERT), 108_891_648),
    "bert-large": (30522, 512, sized(24, 1024, 16, **BERT), 334_092_288),
    "roberta-base": (50265, 512, sized(12, 768, 12, **ROBERTA), 124_055_040),
    "roberta-large": (50265, 512, sized(24, 1024, 16, **ROBERTA), 354_310_144),
    "electra-small": (
        30522,
        512,
        sized(12, 256, 4, embedding_width=128, **ELECTRA),
        13_483_008,
    ),
    "electra-base": (30522, 512, sized(12, 768, 12, **ELECTRA), 108_891_648),
    "electra-large": (30522, 512, sized(24, 1024, 16, **ELECTRA), 334_092_288),
    "gpt2-124M": (50257, 1024, sized(12, 768, 12, **GPT2), 124_439_808),
    "gpt2-355M": (50257, 1024, sized(24, 1024, 16, **GPT2), 354_823_168),
    "gpt2-774M": (50257, 1024, sized(36, 1280, 20, **GPT2), 774_030_080),
    "gpt2-1.5B": (50257, 1024, sized(48, 1600, 25, **GPT2), 1_557_611_200),
}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shapes(config, **keys):
    tokens = jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, Attention(), **keys)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_published_ones(name):
    vocabulary_size, length, changes, expected = COUNTS[name]
    config = TransformerConfig.create(base.model() | changes, vocabulary_size, length)
    assert count(shapes(config)) == expected


def test_one_layout_of_parameters_whatever_the_execution(make_config):
    trees = [
        shapes(make_config(execution=execution, remat=remat))
        for execution in ("unrolled", "scanned")
        for remat in ("none", "outputs", "dots", "full")
    ]
    assert all(tree == trees[0] for tree in trees)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in _leaves(trees[0])
    }
    assert {
        "params/embeddings/token/embedding",
        "params/embeddings/norm/scale",
        "params/layer_1/attention/query/kernel",
        "params/layer_1/attention_norm/bias",
        "params/layer_0/mlp/down/kernel",
    } < names
    layer = trees[0]["params"]["layer_1"]
    assert layer["attention"]["query"]["kernel"].shape == (16, 2, 8)
    assert layer["attention"]["out"]["kernel"].shape == (2, 8, 16)


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_parameters_without_bias(make_config, modern):
    names = [str(path[-1].key) for path, _ in _leaves(shapes(make_config(**modern)))]
    assert set(names) == {"embedding", "kernel", "scale"}
    assert len(names) == 1 + 2 * (4 + 3 + 2) + 1


def test_initialization_is_a_normal_cut_at_two_sd(make_config):
    config = make_config(
        vocabulary_size=4000,
        width=64,
        layers=1,
        init_std=0.02,
        position_init_std=0.01,
        sequence_length=1000,
    )
    initialize = jax.jit(Transformer(config).init)
    params = initialize(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), Attention())["params"]
    # The sd of a standard normal cut at 2 is sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = .8796.
    for table, std in (("token", 0.02), ("position", 0.01)):
        values = np.asarray(params["embeddings"][table]["embedding"])
        assert np.abs(values).max() <= 2 * std
        np.testing.assert_allclose(values.std(), 0.8796 * std, rtol=0.01)
    kernel = np.asarray(params["layer_0"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(kernel.std(), 0.8796 * 0.02, rtol=0.05)
    assert not params["layer_0"]["mlp"]["up"]["bias"].any()
    np.testing.assert_array_equal(params["layer_0"]["mlp_norm"]["scale"], 1)
