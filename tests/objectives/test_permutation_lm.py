"""Format, loss, queries and refusals of permutation language modelling; test_permutation.py has the
targets and their order."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import permutation_lm
from pretraining.data.row import WORD_START, Row
from pretraining.errors import UserError
from pretraining.models.attention import Attention, visible

PAD, CLS, SEP = 0, 2, 3


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("permutation_lm", **overrides)
        return config, permutation_lm.build(config, vocabulary)

    return make


# --------------------------------------------------------------------------------------- the format


def make_row(payload, size=13):
    """Two documents, of which the first ends with the second token."""
    tokens = jnp.asarray([*payload, *[60] * (size - len(payload))], jnp.int32)
    return Row(
        tokens=tokens,
        length=jnp.int32(len(payload)),
        document=jnp.minimum(jnp.arange(size, dtype=jnp.int32) // 2, 1),
        boundary=jnp.full(size, WORD_START, jnp.uint8),
        index=jnp.int32(0),
        copy=jnp.int32(0),
    )


@pytest.mark.parametrize("backward", [False, True])
def test_the_format(build, backward):
    _, objective = build(
        **{
            "data.sequence_length": 16,
            "model.document_attention": True,
            "objective.backward_fraction": 0.5,
        }
    )
    corrupt = jax.jit(objective.corrupt)
    knobs = {"backward_fraction": jnp.float32(backward)}
    payload = [11, SEP, 13, 14, 15]
    for seed in range(5):
        example = corrupt(jax.random.key(seed), make_row(payload), knobs)
        shown = payload[::-1] if backward else payload
        assert example.tokens.tolist() == [*shown, SEP, CLS, *[PAD] * 9]
        assert example.segments.tolist() == [0] * 6 + [2] + [0] * 9
        documents = [1, 1, 1, 0, 0, 0, 0] if backward else [0, 0, 1, 1, 1, 1, 1]
        assert example.document.tolist()[:7] == documents
        assert int(example.length) == 7
        assert bool(example.backward) == backward
        # round(7 / 6) = 1 of K = round(15 / 6) = 2
        assert example.weights.tolist() == [1, 0]
        place = int(example.positions[0])
        assert int(example.labels[0]) == shown[place]
        assert place in ({0, 1, 2, 4} if backward else {0, 2, 3, 4})


def test_half_of_the_rows_are_reversed_in_training_alone(
    build, make_rows, corrupt, assert_binomial
):
    config, objective = build(**{"objective.backward_fraction": 0.5})
    rows = make_rows(config, [9] * 2000)
    assert_binomial(corrupt(objective, rows).backward.sum(), 2000, 0.5)
    evaluated = corrupt(objective, rows, knobs=objective.evaluation_knobs)
    assert not evaluated.backward.any()
    config, objective = build()
    assert corrupt(objective, make_rows(config, [9])).backward is None


# -------------------------------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def trained(build, make_rows, corrupt, init):
    """An objective with random parameters, large enough that tokens differ in probability."""
    config, objective = build(**{"model.dropout": 0.5})
    rows = make_rows(config, [32, 20, 9, 0])
    examples = corrupt(objective, rows)
    params = jax.tree.map(lambda x: 5 * x, init(objective, examples))
    return objective, rows, examples, params


def test_loss_is_the_cross_entropy_of_the_tokens_themselves(trained, terms, vocabulary):
    objective, rows, examples, params = trained
    logits = np.asarray(jax.jit(objective.model.apply)({"params": params}, examples), np.float64)
    found = terms(objective, params, examples)
    shares = (vocabulary.unigram_counts + 1) / (vocabulary.unigram_counts + 1).sum()
    nll = correct = unigram = count = 0.0
    for b, k in np.argwhere(np.asarray(examples.weights) > 0):
        label = int(rows.tokens[b, examples.positions[b, k]])
        nll += math.log(np.exp(logits[b, k]).sum()) - logits[b, k, label]
        correct += logits[b, k].argmax() == label
        unigram -= math.log(shares[label])
        count += 1
    assert count == 6 + 4 + 2  # of 34, 22 and 11 positions
    assert float(found["permutation_lm"].sum) == pytest.approx(nll, rel=1e-5)
    assert float(found["accuracy"].sum) == correct
    assert float(found["unigram_loss"].sum) == pytest.approx(unigram, rel=1e-5)
    assert {float(term.weight) for term in found.values()} == {count}
    scales = {name: float(term.scale) for name, term in found.items()}
    assert scales == {"permutation_lm": 1, "accuracy": 0, "unigram_loss": 0}


def test_dropout_in_training_alone(trained, terms):
    objective, _, examples, params = trained
    keys = jax.random.split(jax.random.key(0))
    value = lambda key, train: float(
        terms(objective, params, examples, None, key, train)["permutation_lm"].sum
    )
    assert value(keys[0], True) != value(keys[1], True)
    assert value(keys[0], False) == value(keys[1], False)


def columns(mask):
    return [np.flatnonzero(row).tolist() for row in np.asarray(mask)]


def test_queries_hide_what_they_ask_for(build):
    _, objective = build(**{"data.sequence_length": 16})
    query = jax.jit(objective.query)
    example = query(make_row([11, 12, 13, 14, 15]), jnp.asarray([3, 0, 5]))
    assert example.tokens.tolist() == [11, 12, 13, 14, 15, PAD, SEP, CLS, *[PAD] * 8]
    assert int(example.length) == 8
    assert example.positions.tolist() == [3, 0, 5]
    assert example.labels.tolist() == [14, 11, PAD]
    assert example.weights.tolist() == [1, 1, 0]
    rank = example.rank[None]
    by_queries = visible(Attention(rank=rank), 16, example.positions[None])[0, 0]
    by_others = visible(Attention(rank=rank), 16)[0, 0][jnp.asarray([1, 2, 4, 6, 7])]
    assert columns(~by_queries) == [[0, 3, 5]] * 3
    assert columns(~by_others) == [[0, 3, 5]] * 5
    inside = query(make_row([11, 12, 13, 14, 15]), jnp.asarray([3]))
    assert inside.tokens.tolist() == [11, 12, 13, 14, 15, SEP, CLS, *[PAD] * 9]
    # A full row still has room for one more.
    full = query(make_row(list(range(11, 24))), jnp.asarray([13]))
    assert full.tokens.tolist() == [*range(11, 24), PAD, SEP, CLS]


def test_vectors_of_the_payload_and_logits_are_the_content_streams(trained):
    """Everybody sees everybody valid, the order of the example plays no part."""
    objective, rows, examples, params = trained
    apply = objective.model.apply
    layers = jax.jit(lambda e: objective.encode(apply, params, e))(examples)
    assert [layer.shape for layer in layers] == [(4, 32, 16)] * 2
    table = params["encoder"]["embeddings"]["token"]["embedding"]
    np.testing.assert_array_equal(layers[0][0], table[rows.tokens[0]])
    other = jax.jit(lambda e: objective.encode(apply, params, e))(
        examples._replace(rank=examples.rank[:, ::-1])
    )
    np.testing.assert_array_equal(layers[1], other[1])
    network = objective.hugging_face[""]
    logits = jax.jit(lambda e: network.logits(apply, params, e))(examples)
    assert logits.shape == (4, 35, 64)
    expected = layers[1] @ table.T + params["head"]["bias"][None, None]
    np.testing.assert_allclose(logits[:, :32], expected, rtol=1e-4, atol=1e-5)


def test_describe_shows_the_order(build):
    """Written out by hand: b is the target, the [SEP] of the row comes before it in the order."""
    _, objective = build(**{"data.sequence_length": 16, "objective.backward_fraction": 0.5})
    row = make_row([11, 12, 13])
    knobs = {"backward_fraction": jnp.float32(1)}
    example = objective.corrupt(jax.random.key(0), row, knobs)._replace(
        rank=jnp.asarray([-1, 4, -1, 1, 9, *range(11, 22)]),
        positions=jnp.asarray([1, 0]),
        labels=jnp.asarray([12, PAD]),
        weights=jnp.asarray([1.0, 0.0]),
    )
    shown = objective.describe(objective.model.apply, {}, row, example)
    rest = [-1] * 11
    assert shown.tokens["original"].tolist() == [11, 12, 13, SEP, CLS, *rest]
    assert shown.tokens["input"].tolist() == [13, 12, 11, SEP, CLS, *rest]
    assert shown.tokens["predicted"].tolist() == [-1, 12, -1, -1, -1, *rest]
    assert shown.numbers["order"].tolist() == [-1, 2, -1, 1, 3, *rest]
    content, query = (columns(mask) for mask in shown.sees.values())
    assert list(shown.sees) == ["content stream", "query stream"]
    assert content[:5] == [[0, 2], [0, 1, 2, 3], [0, 2], [0, 2, 3], [0, 1, 2, 3, 4]]
    assert query[:5] == [[], [0, 2, 3], [], [], []]
    assert content[5:] == query[5:] == [[]] * 11


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"objective.select": "first"}, "select='first' is not one of ngram, last"),
        ({"objective.ngram_unit": "spans"}, "ngram_unit='spans' is not one of words, pieces"),
        ({"objective.predict_fraction": 1.5}, "predict_fraction=1.5"),
        ({"objective.predict_fraction": 0.01}, "predict_fraction=0.01 predicts none of .*=35"),
        ({"objective.backward_fraction": -0.1}, "backward_fraction=-0.1"),
        ({"objective.ngram_longest": 0}, "ngram_longest=0"),
        ({"objective.mask_beta": 0}, "mask_beta=0"),
        ({"objective.mask_alpha": 2, "objective.mask_beta": 3}, "mask_alpha=2 .* at least 3"),
        ({"objective.permutation_size": 8}, "permutation_size=8 must divide .*length=35"),
        ({"objective.permutation_size": 70}, "permutation_size=70"),
        ({"model.position": "learned"}, "model.position='learned'"),
    ],
)
def test_a_contradictory_config_is_refused(build, overrides, message):
    def start():
        _, objective = build(**overrides)
        example = objective.query(make_row([11], 32), jnp.asarray([0]))
        example = jax.tree.map(lambda x: x[None], example)
        jax.eval_shape(objective.model.init, jax.random.key(0), example)

    with pytest.raises(UserError, match=message) as error:
        start()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, expected", [("base", 116_718_336), ("large", 360_268_800)])
def test_the_recipes_have_xlnets_sizes(vocabulary, size, expected):
    """The published counts, and the bias of the head."""
    config = importlib.import_module("configs.permutation_lm").get_config(size)
    vocabulary = type(vocabulary)(**vars(vocabulary) | dict(size=32_000))
    vocabulary.unigram_counts = np.ones(32_000)
    objective = permutation_lm.build(config, vocabulary)
    row = jax.tree.map(jnp.zeros_like, make_row([], config.data.sequence_length - 3))
    example = jax.eval_shape(
        lambda key: jax.tree.map(
            lambda x: x[None], objective.corrupt(key, row, objective.evaluation_knobs)
        ),
        jax.random.key(0),
    )
    assert example.positions.shape == (1, 85)
    params = jax.eval_shape(objective.model.init, jax.random.key(0), example)["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == expected + 32_000
