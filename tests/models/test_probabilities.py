"""Attention probabilities, which a network keeps for people to look at when it is asked to."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretraining.models import transformer as transformer_module
from pretraining.models.attention import Attention, probabilities
from pretraining.models.transformer import Transformer
from pretraining.models.two_stream import TwoStream


@pytest.mark.parametrize("causal", [False, True])
def test_probabilities_against_a_double_loop(causal):
    document = [[0, 0, 0, 0, 1, 1, 2, 2], [4, 4, 7, 7, 7, 7, 7, 7]]
    query, key = np.random.default_rng(0).normal(size=(2, 2, 8, 3, 4))
    expected = np.zeros((2, 3, 8, 8))
    for b, h, i in np.ndindex(2, 3, 8):
        for j in range(i + 1 if causal else 8):
            if document[b][i] == document[b][j]:
                expected[b, h, i, j] = np.exp(query[b, i, h] @ key[b, j, h] / 2)
    expected /= expected.sum(axis=-1, keepdims=True)
    attention = Attention(causal, document=jnp.array(document))
    found = probabilities(*(jnp.asarray(x, jnp.float32) for x in (query, key)), attention)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def watched(model, params, tokens, attention):
    _, kept = model.apply({"params": params}, tokens, attention, mutable=["intermediates"])
    return kept["intermediates"]


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
@pytest.mark.parametrize("network", [Transformer, TwoStream])
def test_every_layer_keeps_its_probabilities_when_asked(
    network, execution, make_config, create, tokens
):
    """A block in numpy that averages by what was kept gives what the network's own block gives."""
    position = "relative" if network is TwoStream else "learned"
    model = network(make_config(position=position, execution=execution))
    apply, params = create(model)
    attention = Attention(length=jnp.array([8, 5]))
    kept = watched(model, params, tokens, attention)
    assert list(kept) == ["layer_0", "layer_1"]
    layers = apply(params, tokens, attention, all_layers=True)
    for number in range(2):
        (found,) = kept[f"layer_{number}"]["attention"]["probabilities"]
        assert found.shape == (2, 2, 8, 8)
        weights = jax.tree.map(np.asarray, params[f"layer_{number}"])
        expected = block_by_hand(weights, np.asarray(layers[number]), np.asarray(found))
        for row, length in enumerate((8, 5)):
            np.testing.assert_allclose(
                layers[number + 1][row, :length], expected[row, :length], rtol=1e-4, atol=1e-4
            )


def block_by_hand(weights, hidden, averaging):
    """BERT's block of hidden states [B, L, D] with given probabilities [B, H, L, L]."""
    own, mlp = weights["attention"], weights["mlp"]
    value = np.einsum("bld,dhe->blhe", hidden, own["value"]["kernel"])
    value = value + own["value"].get("bias", 0)
    mixed = np.einsum("bhlm,bmhe->blhe", averaging, value)
    update = np.einsum("blhe,hed->bld", mixed, own["out"]["kernel"]) + own["out"].get("bias", 0)
    hidden = _norm(hidden + update, weights["attention_norm"])
    inner = hidden @ mlp["up"]["kernel"] + mlp["up"]["bias"]
    inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    update = inner @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    return _norm(hidden + update, weights["mlp_norm"])


def _norm(x, weights):
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
    return scaled * weights["scale"] + weights["bias"]


def test_the_first_layer_by_hand(make_config, create, tokens):
    """softmax(q k / sqrt(d)) in float64 from the parameters, in a network of one layer."""
    model = Transformer(make_config(layers=1))
    _, params = create(model)
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table, place = own["embeddings"]["token"], own["embeddings"]["position"]
    hidden = table["embedding"][tokens] + place["embedding"][None, :8]
    hidden = _norm(hidden, own["embeddings"]["norm"])
    query, key = (
        np.einsum("bld,dhe->bhle", hidden, part["kernel"]) + part["bias"][None, :, None]
        for part in (own["layer_0"]["attention"]["query"], own["layer_0"]["attention"]["key"])
    )
    scores = np.exp(np.einsum("bhle,bhme->bhlm", query, key) / np.sqrt(8))
    for causal, allowed in ((False, np.ones((8, 8))), (True, np.tri(8))):
        kept = watched(model, params, tokens, Attention(causal=causal))
        (found,) = kept["layer_0"]["attention"]["probabilities"]
        expected = scores * allowed
        expected /= expected.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", [Transformer, TwoStream])
def test_nothing_is_kept_unless_asked(network, make_config, create, tokens, monkeypatch):
    position = "relative" if network is TwoStream else "learned"
    model = network(make_config(position=position, remat="full"))
    apply, params = create(model)
    watched(model, params, tokens, Attention())

    def kept(*_, **__):
        raise AssertionError("it keeps what nobody asked for")

    monkeypatch.setattr(nn.Module, "sow", kept)
    monkeypatch.setattr(transformer_module, "probabilities", kept)
    assert list(model.init(jax.random.key(0), tokens, Attention())) == ["params"]
    total = lambda params: jnp.sum(apply(params, tokens, Attention()))
    jax.make_jaxpr(jax.grad(total))(params)
    with pytest.raises(AssertionError, match="nobody asked for"):
        watched(model, params, tokens, Attention())


def test_of_two_streams_the_content_stream_is_kept(make_config, create, tokens):
    model = TwoStream(make_config(position="relative"))
    _, params = create(model)
    rank = jnp.tile(jnp.arange(8), (2, 1))
    embedded = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
    _, kept = model.apply(
        {"params": params},
        embedded,
        Attention(rank=rank),
        jnp.array([[1, 3, 6], [0, 2, 5]]),
        method="two_streams",
        mutable=["intermediates"],
    )
    for layer in kept["intermediates"].values():
        (found,) = layer["attention"]["probabilities"]  # one stream
        assert found.shape == (2, 2, 8, 8)
        assert (found[..., ~np.tri(8, dtype=bool)] == 0).all()
        assert (np.diagonal(found, axis1=-2, axis2=-1) > 0).all()  # which sees itself
