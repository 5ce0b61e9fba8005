"""The Transformer: executions that agree, and numerics against numpy."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pretraining.models import transformer as transformer_module
from pretraining.models.attention import Attention
from pretraining.models.transformer import ACTIVATIONS, Transformer, norm, normalize

# Executions agree.

EXECUTIONS = {
    "scanned": dict(execution="scanned"),
    "outputs": dict(remat="outputs"),
    "dots": dict(remat="dots"),
    "full": dict(remat="full"),
    "scanned, outputs": dict(execution="scanned", remat="outputs"),
    "scanned, dots": dict(execution="scanned", remat="dots"),
    "scanned, full": dict(execution="scanned", remat="full"),
}


@pytest.fixture(scope="module")
def run(create, tokens):
    """run(config, key) -> (all layers' outputs, flat gradient) with dropout from `key`."""
    return lambda config, key: _run(*create(Transformer(config), std=0.2), tokens, key)


def _run(apply, params, tokens, key):
    attention = Attention(causal=True, length=jnp.array([8, 5]))

    def loss(params):
        layers = apply(params, tokens, attention, key=key, all_layers=True)
        return sum(jnp.sum(jnp.sin(hidden)) for hidden in layers), layers

    quick = dict(xla_backend_optimization_level=0)  # to compile
    gradient, layers = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quick)(params)
    return np.stack(layers), np.asarray(ravel_pytree(gradient)[0])


DROPPED = dict(dropout=0.2, attention_dropout=0.2)


@pytest.fixture(scope="module")
def unrolled(run, make_config):
    return run(make_config(**DROPPED), jax.random.key(3))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_executions_agree_with_dropout_on(run, make_config, unrolled, execution):
    config = make_config(**DROPPED, **EXECUTIONS[execution])
    check_agreement(run(config, jax.random.key(3)), unrolled)


def test_executions_of_a_modern_model_agree(run, make_config, modern):
    key = jax.random.key(3)
    reference = run(make_config(**DROPPED, **modern), key)
    config = make_config(**DROPPED, **modern, execution="scanned", remat="full")
    check_agreement(run(config, key), reference)


def check_agreement(ours, reference):
    np.testing.assert_allclose(ours[0], reference[0], rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(ours[1] - reference[1]) < 1e-5 * np.linalg.norm(reference[1])


def test_the_key_switches_dropout_on(create, tokens, make_config, unrolled):
    apply, params = create(Transformer(make_config(**DROPPED)), std=0.2)
    attention = Attention(causal=True, length=jnp.array([8, 5]))
    for key, same in ((jax.random.key(3), True), (jax.random.key(4), False), (None, False)):
        out = apply(params, tokens, attention, key=key)
        assert (np.abs(out - unrolled[0][-1]).max() < 1e-5) == same


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
def test_the_last_of_all_layers_is_the_output(create, tokens, make_config, execution):
    for norm_order in ("pre", "post"):
        config = make_config(norm_order=norm_order, execution=execution, layers=3)
        apply, params = create(Transformer(config))
        layers = apply(params, tokens, Attention(), all_layers=True)
        assert len(layers) == 4
        np.testing.assert_allclose(
            layers[-1], apply(params, tokens, Attention()), rtol=1e-5, atol=1e-5
        )
        differences = [np.abs(a - b).max() for a, b in itertools.pairwise(layers)]
        assert min(differences) > 0.01


def test_rematerialization_repeats_the_products_it_says(create, tokens, make_config):
    def products(remat):
        """How many matrix products stand in the gradient."""
        apply, params = create(Transformer(make_config(layers=1, norm_order="pre", remat=remat)))
        gradient = jax.grad(lambda params: jnp.sum(apply(params, tokens, Attention()) ** 2))
        return jax.jit(gradient).lower(params).as_text().count("stablehlo.dot_general")

    # One forward and two backward each: scores, values, query-key-value, out, up, down.
    once = 6 * 3
    assert products("none") == once
    assert products("full") == once + 5  # the output of `down` need not be known again
    assert products("dots") == once + 2  # scores and values
    assert products("outputs") == once + 4  # nor that of `out`


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
def test_a_loop_needs_no_barriers_between_forward_and_backward(
    create, tokens, make_config, execution
):
    """They keep the compiler from what it cannot do there: to merge the two computations."""
    config = make_config(execution=execution, remat="full")
    apply, params = create(Transformer(config))
    gradient = jax.grad(lambda params: jnp.sum(apply(params, tokens, Attention()) ** 2))
    found = re.findall(r"prevent_cse=(\w+)", str(jax.make_jaxpr(gradient)(params)))
    assert len(found) >= 2  # of a layer, and of the activation in it
    assert set(found) == {str(execution == "unrolled")}


def test_every_place_of_every_layer_has_its_own_dropout_key(
    create, tokens, make_config, monkeypatch
):
    apply, params = create(Transformer(make_config(layers=3)))
    keys = []
    record = lambda key: keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
    drop, attend = transformer_module.dropout, transformer_module.attend

    def recorded_dropout(x, rate, key):
        record(key)
        return drop(x, rate, key)

    def recorded_attend(*arguments, dropout_key, **rest):
        record(dropout_key)
        return attend(*arguments, **rest)

    monkeypatch.setattr(transformer_module, "dropout", recorded_dropout)
    monkeypatch.setattr(transformer_module, "attend", recorded_attend)
    apply(params, tokens, Attention(), key=jax.random.key(0))
    assert len(keys) == len(set(keys)) == 1 + 3 * 3


# Numerics.


def reference(params, tokens, config, segments):
    """The hidden states of a model with learned positions, segments and E < D, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    embeddings = params["embeddings"]
    start = config.position_offset
    x = embeddings["token"]["embedding"][np.asarray(tokens)]
    x = x + embeddings["position"]["embedding"][start : start + tokens.shape[1]]
    x = x + embeddings["segment"]["embedding"][np.asarray(segments)]
    x = reference_norm(embeddings["norm"], x, config)
    x = x @ params["embeddings_project"]["kernel"] + params["embeddings_project"]["bias"]
    for index in range(config.layers):
        layer = params[f"layer_{index}"]
        for part, name in ((reference_attention, "attention"), (reference_mlp, "mlp")):
            if config.norm_order == "pre":
                x = x + part(layer[name], reference_norm(layer[f"{name}_norm"], x, config))
            else:
                x = reference_norm(layer[f"{name}_norm"], x + part(layer[name], x), config)
    return x if config.norm_order == "post" else reference_norm(params["final_norm"], x, config)


def reference_norm(params, x, config):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * params["scale"] + params["bias"]


def reference_attention(params, x):
    query, key, value = (
        np.tensordot(x, params[name]["kernel"], 1) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = np.einsum("blhd,bmhd->bhlm", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores)
    weights = weights / weights.sum(-1, keepdims=True)
    out = np.einsum("bhlm,bmhd->blhd", weights, value)
    return np.tensordot(out, params["out"]["kernel"], 2) + params["out"]["bias"]


def reference_mlp(params, x):
    x = x @ params["up"]["kernel"] + params["up"]["bias"]
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    return x @ params["down"]["kernel"] + params["down"]["bias"]


@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_hidden_states_against_numpy(create, tokens, make_config, norm_order):
    config = make_config(
        norm_order=norm_order,
        norm_epsilon=1e-3,
        activation="gelu_erf",
        segments=3,
        embedding_width=12,
        position_rows=20,
        position_offset=2,
    )
    segments = tokens % 3
    apply, params = create(Transformer(config))
    out = apply(params, tokens, Attention(), segments)
    expected = reference(params, tokens, config, segments)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_segments_default_to_type_zero(create, tokens, make_config):
    apply, params = create(Transformer(make_config(segments=2)))
    out = [apply(params, tokens, Attention(), jnp.full((2, 8), type_)) for type_ in (0, 1)]
    np.testing.assert_array_equal(apply(params, tokens, Attention()), out[0])
    assert np.abs(out[0] - out[1]).max() > 0.1


@pytest.mark.parametrize("position", ["learned", "rotary", "none"])
def test_positions_are_told_apart(create, tokens, make_config, position):
    apply, params = create(Transformer(make_config(position=position)))
    reversed_twice = apply(params, tokens[:, ::-1], Attention())[:, ::-1]
    difference = np.abs(apply(params, tokens, Attention()) - reversed_twice).max()
    assert difference < 1e-4 if position == "none" else difference > 0.1


def test_the_two_gelus_are_kept_apart():
    x = np.linspace(-6, 6, 20_001)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ours = {
        name: np.asarray(ACTIVATIONS[name](jnp.asarray(x, jnp.float32))) for name in ACTIVATIONS
    }
    np.testing.assert_allclose(ours["gelu_erf"], erf, atol=2e-6)
    np.testing.assert_allclose(ours["gelu_tanh"], tanh, atol=2e-6)
    np.testing.assert_allclose(
        np.abs(ours["gelu_erf"] - ours["gelu_tanh"]).max(), 4.73e-4, atol=2e-6
    )
    np.testing.assert_allclose(ours["silu"], x / (1 + np.exp(-x)), atol=2e-6)
    np.testing.assert_allclose(ours["relu"], np.maximum(x, 0), atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated_feed_forward_by_hand(make_config, activation):
    mlp = transformer_module.MLP(
        make_config(width=2, mlp_width=1, bias=False, gated=True, activation=activation)
    )
    params = {
        "up": {"kernel": jnp.array([[3.0], [0.0]])},
        "gate": {"kernel": jnp.array([[0.0], [1.0]])},
        "down": {"kernel": jnp.array([[1.0, 10.0]])},
    }
    out = mlp.apply({"params": params}, jnp.array([[[2.0, 1.0]]]))
    # up = 3 * 2, gate = 1; silu(1) = 1 / (1 + 1/e), gelu_tanh(1) = .841192.
    gate = {"silu": 0.731059, "gelu_tanh": 0.841192}[activation]
    np.testing.assert_allclose(out, [[[6 * gate, 60 * gate]]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_against_numpy(make_config, kind):
    # A mean far from zero: the variance as a difference of squares would lose every digit.
    x = 1000 + np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    scale = np.linspace(0.5, 2, 256, dtype=np.float32)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(scale / 2)}
    if kind == "rmsnorm":
        del params["bias"]
    module = norm(make_config(norm=kind, norm_epsilon=1e-6)).bind({"params": params})
    out = normalize(module, jnp.asarray(x))
    x = x.astype(np.float64)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    expected = expected + (scale / 2 if kind == "layernorm" else 0)
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["bert", "modern"])
def test_bfloat16_is_the_dtype_of_compute(create, tokens, make_config, modern, kind):
    variant = modern if kind == "modern" else {}
    model = Transformer(make_config(**variant, dtype="bfloat16"))
    apply, params = create(model, std=0.1)
    layers = apply(params, tokens, Attention(), all_layers=True)
    assert {hidden.dtype for hidden in layers} == {jnp.dtype("bfloat16")}
    exact, _ = create(Transformer(make_config(**variant)))
    exact = np.asarray(exact(params, tokens, Attention()))
    difference = np.abs(np.asarray(layers[-1], np.float32) - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["bert", "modern"])
def test_parameters_and_gradients_stay_float32(tokens, make_config, modern, kind):
    variant = modern if kind == "modern" else {}
    model = Transformer(make_config(**variant, dtype="bfloat16"))

    def loss(params):
        hidden = model.apply(params, tokens, Attention(), key=jax.random.key(0))
        return jnp.sum(hidden.astype(jnp.float32))

    params = jax.eval_shape(model.init, jax.random.key(0), tokens, Attention())
    gradient = jax.eval_shape(jax.grad(loss), params)
    for tree in (params, gradient):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
