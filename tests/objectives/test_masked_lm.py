"""Loss, leakage, queries and recipes of the masked language model; test_masking.py has the rest."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import masked_lm
from pretraining.data.row import Row
from pretraining.errors import UserError

PAD, CLS, SEP, MASK = 0, 2, 3, 4


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("masked_lm", **overrides)
        return config, masked_lm.build(config, vocabulary)

    return make


# -------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def trained(build, make_rows, corrupt, init):
    """An objective with random parameters, large enough that tokens differ in probability."""
    config, objective = build(**{"model.dropout": 0.5, "objective.smooth": 2.0})
    rows = make_rows(config, [32, 20, 3, 0])
    examples = corrupt(objective, rows)
    params = jax.tree.map(lambda x: 5 * x, init(objective, examples))
    return objective, rows, examples, params


def logits_of(objective, params, examples):
    apply = jax.jit(objective.model.apply)
    return np.asarray(apply({"params": params}, examples), np.float64)


def test_loss_is_the_cross_entropy_of_the_labels(trained, terms, vocabulary):
    objective, rows, examples, params = trained
    logits = logits_of(objective, params, examples)
    terms = terms(objective, params, examples)
    nll = correct = unigram = 0.0
    shares = (vocabulary.unigram_counts + 1) / (vocabulary.unigram_counts + 1).sum()
    for b, slots in enumerate(np.asarray(examples.positions)):
        for k, position in enumerate(slots):
            if position:
                label = int(rows.tokens[b, position - 1])
                scores = logits[b, k]
                nll += math.log(np.exp(scores).sum()) - scores[label]
                correct += scores.argmax() == label
                unigram -= math.log(shares[label])
    count = float(np.asarray(examples.corrupted).sum())
    assert float(terms["masked_lm"].sum) == pytest.approx(nll, rel=1e-5)
    assert float(terms["accuracy"].sum) == correct
    assert float(terms["unigram_loss"].sum) == pytest.approx(unigram, rel=1e-5)
    assert {float(terms[name].weight) for name in terms} == {count}
    assert (terms["masked_lm"].scale, terms["masked_lm"].smooth) == (1.0, 2.0)
    assert all(terms[name].scale == 0 for name in terms if name != "masked_lm")


def test_dropout_in_training_alone(trained, terms):
    objective, _, examples, params = trained

    def value(key, train):
        return float(terms(objective, params, examples, None, key, train)["masked_lm"].sum)

    keys = jax.random.split(jax.random.key(0))
    assert value(keys[0], True) != value(keys[1], True)
    assert value(keys[0], False) == value(keys[1], False)


def test_what_is_masked_does_not_leak(make_config, vocabulary, corrupt, init):
    """Each token of the row is unlike all others, and the head has a table of its own: then the
    gradient at a token's embedding says whether the model saw it."""
    config = make_config(
        "masked_lm",
        **{
            "model.tie_head": False,
            "objective.mask_fraction": 1.0,
            "objective.random_fraction": 0.0,
            "objective.keep_fraction": 0.0,
            "objective.mask_rate": 0.3,
        },
    )
    objective = masked_lm.build(config, vocabulary)
    rows = _distinct_rows(config)
    examples = corrupt(objective, rows)

    @jax.jit
    @jax.grad
    def gradient(params):
        terms = objective.loss(objective.model.apply, params, examples, {}, None, False)
        return terms["masked_lm"].sum

    table = gradient(init(objective, examples))["encoder"]["embeddings"]["token"]["embedding"]
    seen = np.abs(np.asarray(table)).sum(axis=1) > 0
    hidden = np.asarray(examples.corrupted)[0, 1:33]
    assert (seen[np.asarray(rows.tokens)[0]] == ~hidden).all()
    assert hidden.sum() == 10


def _distinct_rows(config):
    row = Row(
        tokens=jnp.arange(5, 37, dtype=jnp.int32),
        length=jnp.int32(32),
        document=jnp.zeros(32, jnp.int32),
        boundary=jnp.ones(32, jnp.uint8),
        index=jnp.int32(0),
        copy=jnp.int32(0),
    )
    return jax.tree.map(lambda x: x[None], row)


# --------------------------------------------------------------------------------------- notebooks


def test_query_masks_what_it_asks_for(build, make_rows):
    config, objective = build()
    query = jax.jit(objective.query)
    rows = make_rows(config, [32, 9])
    row = jax.tree.map(lambda x: x[1], rows)
    example = query(row, jnp.asarray([4, 0, 9]))
    payload = np.asarray(row.tokens)[:9]
    expected = [CLS, MASK, *payload[1:4], MASK, *payload[5:], MASK, SEP, *[PAD] * 23]
    assert example.tokens.tolist() == expected
    assert int(example.length) == 12
    assert example.positions.tolist() == [5, 1, 10]
    assert example.weights.tolist() == [1, 1, 0]
    assert example.labels.tolist()[:2] == [payload[4], payload[0]]
    assert np.flatnonzero(example.corrupted).tolist() == [1, 5, 10]
    inside = query(row, jnp.asarray([4, 0]))
    assert inside.tokens[10] == SEP
    assert int(inside.length) == 11
    # A full row still has room for one more.
    full = query(jax.tree.map(lambda x: x[0], rows), jnp.asarray([32]))
    assert full.tokens[-2:].tolist() == [MASK, SEP]


def test_log_probs_are_the_models(trained):
    objective, rows, _, params = trained
    ask = jax.jit(jax.vmap(objective.query, (0, None)))
    answer = jax.jit(lambda example: objective.log_probs(objective.model.apply, params, example))
    example = ask(rows, jnp.asarray([0, 2]))
    log_probs = np.asarray(answer(example))
    logits = logits_of(objective, params, example)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)
    # The answer does not depend on the token that it is about.
    other = rows._replace(tokens=rows.tokens.at[:, 0].set(7).at[:, 2].set(9))
    again = answer(ask(other, jnp.asarray([0, 2])))
    assert (np.asarray(again) == log_probs).all()


def test_describe_puts_targets_in_their_places(build, make_rows, corrupt):
    config, objective = build(**{"objective.mask_rate": 0.4, "objective.predict_rate": 0.1})
    rows = make_rows(config, [20], separators=False)
    example = jax.tree.map(lambda x: x[0], corrupt(objective, rows))
    row = jax.tree.map(lambda x: x[0], rows)
    shown = objective.describe(None, None, row, example)
    original, seen, predicted = (np.asarray(shown.tokens[k]) for k in shown.tokens)
    assert list(shown.tokens) == ["original", "input", "predicted"]
    assert original.tolist() == [2, *row.tokens[:20].tolist(), 3, *[-1] * 13]
    assert (seen[:22] == np.asarray(example.tokens)[:22]).all()
    at = np.flatnonzero(predicted >= 0)
    assert len(at) == 2  # .1 x 22 = 2.2
    assert (predicted[at] == original[at]).all()
    inside = np.arange(35) < 22
    assert (np.asarray(shown.sees["attention"]) == inside[:, None] & inside).all()


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "size,encoder,total",
    # The published BERT without pooler: 108,891,648 and 334,092,288. The head is D^2 + 3 D + V.
    [("base", 108_891_648, 109_514_298), ("large", 334_092_288, 335_174_458)],
)
def test_sizes_are_the_papers(size, encoder, total, vocabulary):
    config = importlib.import_module("configs.masked_lm").get_config(size)
    sized = {
        **vars(vocabulary),
        "size": config.tokenizer.size,
        "unigram_counts": np.ones(config.tokenizer.size),
    }
    objective = masked_lm.build(config, type(vocabulary)(**sized))
    length = config.data.sequence_length - 3
    row = Row(
        *[jax.ShapeDtypeStruct((length,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)],
        *[jax.ShapeDtypeStruct((length,), jnp.int32), jax.ShapeDtypeStruct((length,), jnp.uint8)],
        *[jax.ShapeDtypeStruct((), jnp.int32)] * 2,
    )

    def init(key, row):
        example = objective.corrupt(key, row, objective.evaluation_knobs)
        return objective.model.init(key, jax.tree.map(lambda x: x[None], example))["params"]

    params = jax.eval_shape(init, jax.random.key(0), row)
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert count(params["encoder"]) == encoder
    assert count(params) == total


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match="huge: no such size, there are tiny, small, base, large"):
        importlib.import_module("configs.masked_lm").get_config("huge")


def test_quickstart_is_a_small_masked_lm():
    config = importlib.import_module("configs.quickstart").get_config()
    assert (config.objective.name, config.model.layers, config.model.width) == ("masked_lm", 4, 128)
    assert (config.train.batch_size, config.data.sequence_length) == (64, 128)
    assert config.tokenizer.size == 4096
