"""A small Transformer for every test of the models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from pretraining.models.attention import Attention
from pretraining.models.transformer import TransformerConfig

SMALL = dict(layers=2, width=16, heads=2, mlp_width=32)


@pytest.fixture(scope="session")
def make_config():
    """make_config(vocabulary_size=50, sequence_length=8, **changes of config.model)."""

    def make(vocabulary_size=50, sequence_length=8, **changes):
        return TransformerConfig.create(
            base.model() | SMALL | changes, vocabulary_size, sequence_length
        )

    return make


@pytest.fixture(scope="session")
def create():
    """create(model, std=0.5) -> (apply, params).

    Every parameter is drawn, biases and scales too, so that none is without effect.
    """

    def create(model, std=0.5):
        tokens = jnp.zeros((2, 8), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, Attention())["params"]
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            mean, sd = {"scale": (1, 0.1), "bias": (0, 0.1)}.get(path[-1].key, (0, std))
            return jnp.asarray(rng.normal(mean, sd, leaf.shape), jnp.float32)

        apply = lambda params, *a, **k: model.apply({"params": params}, *a, **k)
        return apply, jax.tree_util.tree_map_with_path(draw, shapes)

    return create


@pytest.fixture(params=["cpu", "accelerator"])
def branch(request, monkeypatch):
    """What is computed otherwise on CPUs, as there, and then as everywhere else."""
    if request.param == "accelerator":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))


@pytest.fixture(scope="session")
def tokens():
    """[2, 8] int32 below 50."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 8)), jnp.int32)


@pytest.fixture(scope="session")
def modern():
    """The changes of config.model that make a modern variant."""
    return dict(
        position="rotary",
        norm="rmsnorm",
        norm_order="pre",
        gated=True,
        bias=False,
        embedding_norm=False,
    )
