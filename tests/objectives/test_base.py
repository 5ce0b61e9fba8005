"""The chunked cross-entropy and the framing that objectives share."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import base
from pretraining.data.row import Row

B, K, D, V = 3, 10, 8, 50


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, K, D))
    table = jax.random.normal(keys[1], (V, D))
    labels = jax.random.randint(keys[2], (B, K), 0, V)
    weights = jax.random.bernoulli(keys[3], 0.7, (B, K)).astype(jnp.float32).at[:, -1].set(1)
    return hidden, table, labels, weights


REGULARISED = {"label_smoothing": 0.1, "z_loss": 0.01}


@functools.partial(jax.jit, static_argnums=4)
def sums(hidden, table, labels, weights, chunk):
    project = lambda h: h @ table.T
    return base.cross_entropy(project, hidden, labels, weights, chunk, **REGULARISED)


def by_hand(hidden, table, labels, weights):
    """The regularised loss, then its parts and hits, each position by itself in 64 bits."""
    hidden, table, labels, weights = (np.asarray(x) for x in (hidden, table, labels, weights))
    totals = np.zeros(5)
    for b in range(B):
        for k in range(K):
            logits = table.astype(np.float64) @ hidden[b, k].astype(np.float64)
            log_z = math.log(np.exp(logits).sum())
            nll, uniform = log_z - logits[labels[b, k]], np.mean(log_z - logits)
            values = (
                0.9 * nll + 0.1 * uniform + 0.01 * log_z**2,
                nll,
                logits.argmax() == labels[b, k],
                uniform,
                log_z**2,
            )
            totals += weights[b, k] * np.array(values, np.float64)
    return totals


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 128])
def test_any_chunk_gives_the_sums_by_hand(inputs, chunk):
    np.testing.assert_allclose(np.array(sums(*inputs, chunk)), by_hand(*inputs), rtol=1e-5)


def test_a_label_that_is_the_best_counts_as_correct(inputs):
    hidden, table, _, weights = inputs
    labels = jnp.argmax(hidden @ table.T, axis=-1).astype(jnp.int32)
    assert float(sums(hidden, table, labels, weights, 3).correct) == float(weights.sum())


def test_what_is_not_asked_for_is_not_there(inputs):
    hidden, table, labels, weights = inputs
    total = base.cross_entropy(lambda h: h @ table.T, hidden, labels, weights, 3)
    assert total.uniform is None
    assert total.squared_log_z is None
    np.testing.assert_allclose(np.array(total[1:3]), by_hand(*inputs)[1:3], rtol=1e-5)
    assert total.loss == total.nll


def loss(hidden, table, labels, weights, chunk):
    return sums(hidden, table, labels, weights, chunk).loss


@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_gradients_are_those_of_differences_by_hand(inputs, chunk, scale):
    """Of one entry at a time in 64 bits; the scale stands for what comes from above."""
    gradient = jax.jit(jax.grad(lambda *args: scale * loss(*args), (0, 1)), static_argnums=4)(
        *inputs, chunk
    )
    rng = np.random.default_rng(0)
    for argument, found in enumerate(gradient):
        for place in rng.permutation(found.size)[:12]:
            index = np.unravel_index(place, found.shape)
            values = []
            for step in (1e-5, -1e-5):
                moved = [np.asarray(x, np.float64) for x in inputs]
                moved[argument][index] += step
                moved[2] = np.asarray(inputs[2])
                values.append(scale * by_hand(*moved)[0])
            np.testing.assert_allclose(found[index], (values[0] - values[1]) / 2e-5, atol=1e-5)


def test_a_gradient_comes_from_the_loss_alone_and_none_flows_into_the_weights(inputs):
    hidden, table, labels, weights = inputs
    for field in ("nll", "correct", "uniform", "squared_log_z"):
        found = jax.grad(lambda h, field=field: getattr(sums(h, *inputs[1:], 3), field))(inputs[0])
        assert not np.any(found)
    assert not np.any(jax.grad(loss, 3)(*inputs, 3))
    project = lambda h: h @ table.T
    both = lambda h: base.cross_entropy(project, h, labels, weights, 3)  # then nll is the loss
    found = [jax.grad(lambda h, i=i: both(h)[i])(hidden) for i in (0, 1)]
    assert np.any(found[0])
    np.testing.assert_array_equal(*found)


def test_gradients_of_16_bit_states_are_those_in_32_bits(inputs):
    """To two roundings of 2^-8 each; the factor is not one that leaves the second out."""
    hidden, table, labels, weights = inputs
    hidden = hidden.astype(jnp.bfloat16)
    project = lambda h, table: (h.astype(jnp.float32) @ table.T).astype(jnp.float32)

    def loss(hidden, table):
        chunk = lambda h: project(h, table)
        return 0.3 * base.cross_entropy(chunk, hidden, labels, weights, 3, **REGULARISED).loss

    short = jax.grad(loss, (0, 1))(hidden, table)
    exact = jax.grad(loss, (0, 1))(hidden.astype(jnp.float32), table)
    assert [gradient.dtype for gradient in short] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(short[0].astype(jnp.float32), exact[0], rtol=2 * 2**-8 + 2**-16)
    np.testing.assert_allclose(short[1], exact[1], rtol=1e-5, atol=1e-6)


def test_no_positions_give_sums_of_0():
    empty = jnp.zeros((2, 0, 4)), jnp.ones((5, 4)), jnp.zeros((2, 0), jnp.int32), jnp.ones((2, 0))
    assert float(plain_loss(*empty, 3)) == 0
    np.testing.assert_array_equal(jax.grad(plain_loss, 1)(*empty, 3), np.zeros((5, 4)))


def test_gradients_flow_into_all_that_the_projection_reads(inputs):
    """Also through `jit`, `vmap` and inside of a scan, as members and microbatches are."""
    hidden, table, labels, weights = inputs
    parameters = {"table": table, "bias": jnp.arange(V) / V}

    def loss(parameters, hidden):
        project = lambda h: h @ parameters["table"].T + parameters["bias"][None, None]
        return base.cross_entropy(project, hidden, labels, weights, 3).loss

    def plain(parameters, hidden):
        logits = hidden @ parameters["table"].T + parameters["bias"][None, None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        return jnp.sum(nll * weights)

    several = jnp.stack([hidden, hidden[::-1]])
    want = jax.vmap(jax.grad(plain), (None, 0))(parameters, several)
    at_once = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(parameters, several)
    in_turn = jax.lax.map(lambda h: jax.grad(loss)(parameters, h), several)
    for found in (at_once, in_turn):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, want)


@pytest.mark.parametrize("function", ["plain_loss", "loss"])
def test_no_logits_are_computed_twice(function):
    """Forward and backward together hold three products with the table, as one without chunks."""
    args = (jnp.ones((2, 8, 4)), jnp.ones((5, 4)), jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8)))
    gradient = jax.grad(globals()[function], (0, 1))
    text = str(jax.make_jaxpr(gradient, static_argnums=4)(*args, 2))
    assert text.count("dot_general[") == 3


def plain_loss(hidden, table, labels, weights, chunk):
    return base.cross_entropy(lambda h: h @ table.T, hidden, labels, weights, chunk).loss


def largest_buffer(function, *args):
    """Elements of the largest array in the compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"(?:f32|f16|bf16|s32|u32|pred)\[([\d,]+)\]", text)
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize("step", ["loss", "gradient"])
def test_no_buffer_of_all_logits(step):
    batch, positions, width, size = 4, 64, 8, 4096
    args = (
        jnp.ones((batch, positions, width)),
        jnp.ones((size, width)),
        jnp.zeros((batch, positions), jnp.int32),
        jnp.ones((batch, positions)),
    )
    function = loss if step == "loss" else jax.grad(loss, (0, 1))
    chunked = functools.partial(function, chunk=8)
    assert largest_buffer(chunked, *args) <= batch * 8 * size
    assert largest_buffer(functools.partial(function, chunk=64), *args) >= batch * 64 * size


def test_the_loss_is_float32_for_bfloat16_logits(inputs):
    hidden, table, labels, weights = inputs
    project = lambda h: (h @ table.T).astype(jnp.bfloat16)
    total = base.cross_entropy(project, hidden, labels, weights, 3)
    assert {leaf.dtype for leaf in total[:3]} == {jnp.dtype("float32")}
    np.testing.assert_allclose(total.loss, by_hand(*inputs)[1], rtol=1e-2)


def test_unigram_nll_is_add_one_smoothed():
    vocabulary = SimpleNamespace(unigram_counts=np.array([0, 1, 2, 3]))
    expected = [-math.log(n / 10) for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(base.unigram_nll(vocabulary), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "length,expected",
    [
        (5, [9, 1, 2, 3, 4, 5, 8, 0]),
        (2, [9, 1, 2, 8, 0, 0, 0, 0]),
        (0, [9, 8, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_frame(length, expected):
    framed = base.frame(jnp.arange(1, 6), jnp.int32(length), 8, first=9, last=8, fill=0)
    assert framed.tolist() == expected


@pytest.mark.parametrize("length,expected", [(5, [4, 4, 4, 5, 5, 6, 6]), (3, [4, 4, 4, 5, 5])])
def test_documents_of_a_frame(length, expected):
    row = Row(None, jnp.int32(length), jnp.asarray([4, 4, 5, 5, 6]), None, None, None)
    assert base.frame_document(row, 8)[: length + 2].tolist() == expected
