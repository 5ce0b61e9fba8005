"""Samples of a generator, their places in the row, and log-probabilities by chunks."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import sampling

V = 8
LOGITS = np.log([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])


def make_example(rows, slots, temperature=1.0, seed=0):
    """Slots at positions 1, 2, ...; the label is always token 0."""
    keys = jax.random.split(jax.random.key(seed), rows)
    return SimpleNamespace(
        positions=jnp.tile(jnp.arange(1, slots + 1), (rows, 1)),
        labels=jnp.zeros((rows, slots), jnp.int32),
        noise=jax.random.key_data(keys),
        temperature=jnp.full(rows, temperature, jnp.float32),
    )


def draw(logits, example, chunk=64, disallow_correct=False):
    """The logits are their own hidden states."""
    hidden = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (*example.positions.shape, V))
    return np.asarray(_draw(hidden, vars(example), chunk, disallow_correct))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(hidden, fields, chunk, disallow_correct):
    identity = lambda hidden: hidden
    return sampling.sample(identity, hidden, SimpleNamespace(**fields), chunk, disallow_correct)


# --------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax(temperature, assert_binomial):
    samples = draw(LOGITS, make_example(1000, 20, temperature))
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    for token in range(V):
        assert_binomial((samples == token).sum(), samples.size, expected[token])


def test_samples_of_neighbours_are_independent(assert_binomial):
    """Pairs of slots, and of rows: equal as often as chance makes them."""
    samples = draw(np.zeros(V), make_example(1000, 20))
    for one, other in ((samples[:, ::2], samples[:, 1::2]), (samples[::2], samples[1::2])):
        assert_binomial((one == other).sum(), one.size, 1 / V)


def test_disallowed_labels_are_never_drawn(assert_binomial):
    samples = draw(LOGITS, make_example(1000, 20), disallow_correct=True)
    rest = np.exp(LOGITS) * (np.arange(V) > 0)
    for token in range(V):
        assert_binomial((samples == token).sum(), samples.size, rest[token] / rest.sum())


@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
def test_a_sample_depends_on_its_row_and_position_alone(chunk):
    whole = make_example(6, 5)
    expected = draw(LOGITS, whole)
    rows, slots = np.array([4, 1]), np.array([3, 0, 4])
    part = SimpleNamespace(
        positions=whole.positions[rows][:, slots],
        labels=whole.labels[rows][:, slots],
        noise=whole.noise[rows],
        temperature=whole.temperature[rows],
    )
    assert len(np.unique(expected)) > 3
    assert (draw(LOGITS, part, chunk) == expected[rows][:, slots]).all()
    assert (draw(LOGITS, whole, chunk) == expected).all()


def test_a_position_in_two_slots_gets_two_samples(assert_binomial):
    once, twice = make_example(2000, 1), make_example(2000, 3)
    twice.positions = jnp.tile(jnp.asarray([1, 2, 1]), (2000, 1))
    samples = draw(np.zeros(V), twice)
    assert (samples[:, :1] == draw(np.zeros(V), once)).all()
    assert_binomial((samples[:, 0] == samples[:, 2]).sum(), 2000, 1 / V)


# ------------------------------------------------------------------------------------ replacement


def test_samples_stand_in_their_places():
    """The last slot of each row is unused; the second row draws position 1 twice."""
    row = [2, 10, 11, 12, 3, 0, 0]
    example = SimpleNamespace(
        original=jnp.asarray([row, row]),
        positions=jnp.asarray([[1, 3, 0], [1, 1, 4]]),
        weights=jnp.asarray([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]),
    )
    tokens, selected = sampling.replace(example, jnp.asarray([[10, 13, 9], [10, 13, 9]]))
    assert tokens.tolist() == [[2, 10, 11, 13, 3, 0, 0], [2, 11, 11, 12, 3, 0, 0]]  # 23 // 2
    assert np.argwhere(selected).tolist() == [[0, 1], [0, 3], [1, 1]]


# ------------------------------------------------------------------------------ log-probabilities


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 7, 4)), rng.normal(size=(4, 11))
    return hidden, table, rng.integers(0, 11, (2, 7))


def log_probs_of(table, hidden, labels, chunk):
    project = lambda hidden: hidden @ table
    return jax.jit(sampling.label_log_probs, static_argnums=(0, 3))(project, hidden, labels, chunk)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_label_log_probs_by_hand(states, chunk):
    hidden, table, labels = states
    logits = hidden @ table
    expected = np.empty(labels.shape)
    for place in np.ndindex(labels.shape):
        expected[place] = logits[place][labels[place]] - np.log(np.exp(logits[place]).sum())
    result = log_probs_of(*(jnp.float32(x) for x in (table, hidden)), jnp.asarray(labels), chunk)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def largest_buffer(function, *args):
    """Elements of the largest array in the jaxpr of a function, inner ones included."""
    shapes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(variable.aval.size for variable in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return max(shapes)


def test_no_buffer_of_all_logits():
    """32 positions, V = 1000 and chunks of 4; forward and backward."""
    rows, length, size, chunk = 2, 32, 1000, 4
    table, hidden = jnp.ones((8, size)), jnp.ones((rows, length, 8))
    labels = jnp.zeros((rows, length), jnp.int32)
    gradient = jax.grad(lambda *args: log_probs_of(*args, labels, chunk).sum(), argnums=(0, 1))
    example = make_example(rows, length)
    take = lambda hidden: sampling.sample(lambda h: h @ table, hidden, example, chunk)
    assert largest_buffer(gradient, table, hidden) <= max(rows * chunk * size, table.size)
    assert largest_buffer(take, hidden) <= max(rows * chunk * size, table.size)
