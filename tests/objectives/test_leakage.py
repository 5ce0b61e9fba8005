"""Leakage: the loss at ONE predicted position against the input embedding of every position.

Who may influence whom is written here by hand, from the row alone, never read from a mask or a rank
of the model: the gradient must be exactly zero where it may not, and not zero where it may.
"""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretraining.models import attention as attention_module
from pretraining.models import two_stream
from pretraining.models.transformer import Embeddings

LENGTH, SIZE = 9, 16  # valid payload tokens, positions of the model


@pytest.fixture
def influence(make_config, vocabulary, make_rows, corrupt):
    """(objective, term, pick) -> [L] float: how the picked loss depends on each embedding.

    `pick` takes the example [1, ...] and gives it with one predicted position left.
    """

    def measure(name, term, pick, **overrides):
        config = make_config(name, **{"model.layers": 2, "data.sequence_length": SIZE, **overrides})
        objective = importlib.import_module(f"objectives.{name}").build(config, vocabulary)
        rows = make_rows(config, [LENGTH], separators=False)
        example = pick(corrupt(objective, rows))
        params = draw(jax.eval_shape(objective.model.init, jax.random.key(0), example)["params"])

        def loss(delta):
            def shifted(next_function, args, kwargs, context):
                out = next_function(*args, **kwargs)
                is_input = isinstance(context.module, Embeddings)
                return out + delta if is_input and context.method_name == "__call__" else out

            with nn.intercept_methods(shifted):
                terms = objective.loss(objective.model.apply, params, example, {}, None, False)
            assert float(terms[term].weight) == 1
            return terms[term].sum

        width = config.model.embedding_width or config.model.width
        return np.linalg.norm(jax.grad(loss)(jnp.zeros((1, SIZE, width)))[0], axis=-1)

    return measure


def draw(shapes):
    """Parameters of which none is without effect."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes
    )


def only(field, at, among="positions"):
    """The example in which of the weights `field` only that of model position `at` is left."""

    def pick(example):
        return example._replace(**{field: (getattr(example, among) == at).astype(jnp.float32)})

    return pick


def assert_influence(strength, allowed):
    assert strength.shape == (SIZE,)
    assert (strength != 0).tolist() == [position in allowed for position in range(SIZE)], strength


FRAMED = set(range(LENGTH + 2))  # [CLS] payload [SEP]


@pytest.mark.parametrize("place", [0, 4, 8])
def test_causal(influence, place):
    """[CLS] and the payload before the token."""
    strength = influence("causal_lm", "causal_lm", only("weights", place))
    assert_influence(strength, set(range(place + 1)))


def first_predicted(example):
    weights = jnp.zeros_like(example.weights).at[:, 0].set(1.0)
    return example._replace(weights=weights)


# The whole row, the padding never: (name, term, what leaves one position, overrides).
FULL = [
    ("masked_lm", "masked_lm", first_predicted, {}),
    ("span_boundary", "masked_lm", first_predicted, {}),
    ("replaced_token_detection", "generator", first_predicted, {}),
    (
        "replaced_token_detection",
        "discriminator",
        first_predicted,
        {"objective.discriminator": "masked_only"},
    ),
]


@pytest.mark.parametrize("name, term, pick, overrides", FULL)
def test_both_sides(influence, name, term, pick, overrides):
    assert_influence(influence(name, term, pick, **overrides), FRAMED)


def one_pair(example):
    """Position 5, from its boundaries 3 and 6."""
    first = jnp.zeros_like(example.boundary_weights).at[:, 0].set(1.0)
    places = {name: jnp.full_like(example.positions, at) for name, at in PAIR.items()}
    return example._replace(boundary_weights=first, **places)


PAIR = {"positions": 5, "left": 3, "right": 6, "offset": 1}


def test_span_boundary(influence):
    assert_influence(influence("span_boundary", "span_boundary", one_pair), FRAMED)


# In the order 5, [SEP] (position 9), 2, [CLS] (10), 7; all else is known from the beginning.
RANKS = {5: 1, 9: 3, 2: 4, 10: 6, 7: 8}
KNOWN = {0, 1, 3, 4, 6, 8}
ORDERED = {5: KNOWN, 2: KNOWN | {5, 9}, 7: KNOWN | {5, 9, 2, 10}}


def ordered(place):
    def pick(example):
        rank = np.full(SIZE, -1)
        rank[list(RANKS)] = list(RANKS.values())
        first = jnp.zeros_like(example.weights).at[:, 0].set(1.0)
        return example._replace(
            rank=jnp.asarray(rank[None], jnp.int32),
            positions=jnp.full_like(example.positions, place),
            weights=first,
        )

    return pick


@pytest.mark.parametrize("place", ORDERED)
def test_permutation(influence, place):
    """What is known, and what comes before it in the order; never the token itself."""
    strength = influence("permutation_lm", "permutation_lm", ordered(place))
    assert_influence(strength, ORDERED[place])


@pytest.mark.parametrize("name", ["masked_lm", "span_boundary", "replaced_token_detection"])
def test_what_is_masked_is_known_from_its_label_alone(
    name, make_config, vocabulary, make_rows, corrupt, init
):
    """Another token in the place of a masked one, under the same key: the same predictions. In the
    place of one that is not masked: others."""
    fractions = {"mask_fraction": 1.0, "random_fraction": 0.0, "keep_fraction": 0.0}
    config = make_config(name, **{f"objective.{key}": value for key, value in fractions.items()})
    objective = importlib.import_module(f"objectives.{name}").build(config, vocabulary)
    rows = make_rows(config, [32], separators=False)
    example = corrupt(objective, rows)
    params = init(objective, example)
    masked = int(example.positions[0, 0]) - 1
    visible = int(np.flatnonzero(~np.asarray(example.corrupted)[0, 1:33])[0])

    def predict(place):
        other = jnp.where(rows.tokens[0, place] == 7, 8, 7)
        changed = corrupt(objective, rows._replace(tokens=rows.tokens.at[0, place].set(other)))
        return np.asarray(objective.log_probs(objective.model.apply, params, changed))

    original = np.asarray(objective.log_probs(objective.model.apply, params, example))
    assert (predict(masked) == original).all()
    assert (predict(visible) != original).any()


SABOTAGES = {
    "everything": lambda mask: jnp.ones_like(mask),
    "one position further": lambda mask: mask | jnp.roll(mask, 1, axis=-1).at[..., 0].set(False),
    "not the first": lambda mask: mask.at[..., 0].set(False),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
@pytest.mark.parametrize(
    "name, term, pick, allowed",
    [
        ("causal_lm", "causal_lm", only("weights", 4), set(range(5))),
        ("masked_lm", "masked_lm", first_predicted, FRAMED),
        ("permutation_lm", "permutation_lm", ordered(2), ORDERED[2]),
    ],
)
def test_it_turns_red(influence, monkeypatch, sabotage, name, term, pick, allowed):
    visible = attention_module.visible

    def sabotaged(attention, length, positions=None):
        return SABOTAGES[sabotage](visible(attention, length, positions))

    for module in (attention_module, two_stream):
        monkeypatch.setattr(module, "visible", sabotaged)
    with pytest.raises(AssertionError):
        assert_influence(influence(name, term, pick), allowed)
