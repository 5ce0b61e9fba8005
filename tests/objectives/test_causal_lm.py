"""Format, causality and loss of the causal language model."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import causal_lm
from pretraining.data.row import Row
from pretraining.errors import UserError

PAD, BOS = 0, 2


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("causal_lm", **overrides)
        return config, causal_lm.build(config, vocabulary)

    return make


def test_format_of_a_row(build, make_rows, corrupt):
    config, objective = build(**{"model.document_attention": True})
    rows = make_rows(config, [32, 9, 1, 0])
    examples = jax.tree.map(np.asarray, corrupt(objective, rows))
    for b, n in enumerate([32, 9, 1, 0]):
        payload = np.asarray(rows.tokens)[b, :n]
        assert examples.tokens[b].tolist() == [BOS, *payload, *[PAD] * (34 - n)]
        assert examples.length[b] == n + 1
        assert examples.labels[b].tolist() == [*payload, *[PAD] * (32 - n)]
        assert examples.weights[b].tolist() == [1] * n + [0] * (32 - n)
        document = np.asarray(rows.document)[b]
        assert examples.document[b, : n + 1].tolist() == [document[0], *document[:n]]


def test_every_token_is_predicted_once_separators_too(build, make_rows, corrupt):
    config, objective = build()
    rows = make_rows(config, [32, 20, 0])
    examples = corrupt(objective, rows)
    assert examples.document is None
    for b, n in enumerate([32, 20, 0]):
        used = np.asarray(examples.weights)[b] > 0
        assert (np.asarray(examples.labels)[b][used] == np.asarray(rows.tokens)[b, :n]).all()
    assert (np.asarray(rows.tokens)[:2] == 3).any()


def distinct_rows(length=32):
    """A row in which no token occurs twice."""
    row = Row(
        tokens=jnp.arange(5, 37, dtype=jnp.int32),
        length=jnp.int32(length),
        document=jnp.zeros(32, jnp.int32),
        boundary=jnp.ones(32, jnp.uint8),
        index=jnp.int32(0),
        copy=jnp.int32(0),
    )
    return jax.tree.map(lambda x: x[None], row)


def test_no_token_is_predicted_from_itself_or_later_ones(build, corrupt, init):
    """With distinct tokens and an untied head the gradient at a token's embedding says whether the
    loss at a label saw it: label t sees [bos] and the tokens before t, all of them, and no other.
    """
    _, objective = build(**{"model.tie_head": False, "model.layers": 2})
    rows = distinct_rows()
    examples = corrupt(objective, rows)

    def label_loss(params, place):
        weights = (jnp.arange(32) == place).astype(jnp.float32)[None]
        one = examples._replace(weights=weights)
        return objective.loss(objective.model.apply, params, one, {}, None, False)["causal_lm"].sum

    gradient = jax.jit(jax.vmap(jax.grad(label_loss), (None, 0)))
    table = gradient(init(objective, examples), jnp.arange(32))
    table = np.asarray(table["encoder"]["embeddings"]["token"]["embedding"])
    seen = np.abs(table).sum(axis=-1) > 0
    for place in range(32):
        assert np.flatnonzero(seen[place]).tolist() == [BOS, *range(5, 5 + place)]


def test_documents_do_not_see_each_other(build, corrupt, init):
    """Two documents of 16 tokens; label t of the second sees those of its own before t, but the
    second's first token, which follows the first's last, sees the first document."""
    _, objective = build(
        **{"model.tie_head": False, "model.layers": 2, "model.document_attention": True}
    )
    document = (jnp.arange(32) >= 16).astype(jnp.int32)[None]
    examples = corrupt(objective, distinct_rows()._replace(document=document))

    def label_loss(params, place):
        weights = (jnp.arange(32) == place).astype(jnp.float32)[None]
        one = examples._replace(weights=weights)
        return objective.loss(objective.model.apply, params, one, {}, None, False)["causal_lm"].sum

    gradient = jax.jit(jax.grad(label_loss))
    params = init(objective, examples)
    for place, expected in ((3, [BOS, 5, 6, 7]), (16, [BOS, *range(5, 21)]), (19, [21, 22, 23])):
        table = gradient(params, place)["encoder"]["embeddings"]["token"]["embedding"]
        seen = np.abs(np.asarray(table)).sum(axis=-1) > 0
        assert np.flatnonzero(seen).tolist() == expected


# -------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def trained(build, make_rows, corrupt, init):
    config, objective = build(
        **{"model.dropout": 0.5, "objective.label_smoothing": 0.1, "objective.z_loss": 0.01}
    )
    rows = make_rows(config, [32, 20, 3, 0])
    examples = corrupt(objective, rows)
    params = jax.tree.map(lambda x: 5 * x, init(objective, examples))
    logits = jax.jit(objective.model.apply)({"params": params}, examples)
    return objective, rows, examples, params, np.asarray(logits, np.float64)


def test_the_terms_by_hand(trained, terms, vocabulary):
    objective, rows, examples, params, logits = trained
    terms = terms(objective, params, examples)
    nll = correct = label_bytes = unigram = 0.0
    shares = (vocabulary.unigram_counts + 1) / (vocabulary.unigram_counts + 1).sum()
    for b, n in enumerate([32, 20, 3, 0]):
        for t in range(n):
            label, scores = int(rows.tokens[b, t]), logits[b, t]
            nll += math.log(np.exp(scores).sum()) - scores[label]
            correct += scores.argmax() == label
            label_bytes += vocabulary.bytes_per_id[label]
            unigram -= math.log(shares[label])
    assert set(terms) == {"causal_lm", "accuracy", "unigram_loss", "bits_per_byte"}
    assert float(terms["causal_lm"].sum) == pytest.approx(nll, rel=1e-5)
    assert float(terms["accuracy"].sum) == correct
    assert float(terms["unigram_loss"].sum) == pytest.approx(unigram, rel=1e-5)
    assert float(terms["bits_per_byte"].sum) == pytest.approx(nll / math.log(2), rel=1e-5)
    assert float(terms["bits_per_byte"].weight) == label_bytes
    assert {float(terms[name].weight) for name in terms if name != "bits_per_byte"} == {55.0}
    assert {name: float(term.scale) for name, term in terms.items() if term.scale} == {
        "causal_lm": 1.0
    }


def test_smoothing_and_z_loss_in_training(trained, terms, total):
    """Against the cross-entropy with the smoothed labels written out; no dropout without a key."""
    objective, rows, examples, params, logits = trained
    value = 0.0
    for b, n in enumerate([32, 20, 3, 0]):
        for t in range(n):
            log_z = math.log(np.exp(logits[b, t]).sum())
            target = np.full(64, 0.1 / 64)
            target[int(rows.tokens[b, t])] += 0.9
            value += -(target * (logits[b, t] - log_z)).sum() + 0.01 * log_z**2
    training = terms(objective, params, examples, train=True)
    assert float(total(training)) == pytest.approx(value / 55, rel=1e-5)
    plain = terms(objective, params, examples)
    assert float(training["causal_lm"].sum) == pytest.approx(float(plain["causal_lm"].sum))


def test_the_gradient_is_that_of_the_smoothed_loss(trained, total):
    """Against the same formula through JAX's own gradients of all logits."""
    objective, _, examples, params, _ = trained
    apply = objective.model.apply

    def by_terms(params):
        return total(objective.loss(apply, params, examples, {}, None, True))

    def by_formula(params):
        logits = apply({"params": params}, examples)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target = 0.9 * jax.nn.one_hot(examples.labels, 64) + 0.1 / 64
        loss = log_z - jnp.sum(target * logits, axis=-1) + 0.01 * log_z**2
        return jnp.sum(loss * examples.weights) / 55

    found, wanted = (jax.jit(jax.grad(function))(params) for function in (by_terms, by_formula))
    scale = float(optax.tree.norm(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_chunks_do_not_change_the_loss(build, make_rows, corrupt, init, terms):
    losses = []
    for chunk in (5, 128):
        config, objective = build(**{"model.logits_chunk": chunk})
        examples = corrupt(objective, make_rows(config, [32, 20, 3, 0]))
        value = terms(objective, init(objective, examples), examples)
        losses.append([float(value[name].sum) for name in ("causal_lm", "accuracy")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_no_array_of_all_logits_in_a_training_step(build, make_rows, corrupt):
    """In the compiled gradient nothing over the vocabulary (64) is larger than B x chunk x V."""
    config, objective = build(
        **{"model.logits_chunk": 8, "data.sequence_length": 131, "model.width": 8}
    )
    examples = corrupt(objective, make_rows(config, [128] * 4))
    params = jax.eval_shape(objective.model.init, jax.random.key(0), examples)["params"]

    def loss(params):
        terms = objective.loss(objective.model.apply, params, examples, {}, None, True)
        return terms["causal_lm"].sum

    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"\[([\d,]+)\]", text)]
    over_vocabulary = [math.prod(shape) for shape in shapes if 64 in shape]
    assert max(over_vocabulary) == 4 * 8 * 64


# --------------------------------------------------------------------------------------- notebooks


def test_query_predicts_tokens_from_those_before(build, trained, make_rows):
    objective, rows, examples, params, logits = trained
    ask = jax.jit(jax.vmap(objective.query, (0, None)))
    answer = jax.jit(lambda example: objective.log_probs(objective.model.apply, params, example))
    example = ask(rows, jnp.asarray([3, 0]))
    assert (example.tokens == examples.tokens).all()
    assert example.labels.tolist()[0] == [int(rows.tokens[0, 3]), int(rows.tokens[0, 0])]
    assert example.weights.tolist() == [[1, 1], [1, 1], [0, 1], [0, 0]]
    log_probs = np.asarray(answer(example))
    for slot, place in enumerate((3, 0)):
        scores = logits[:, place]
        expected = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(log_probs[:, slot], expected, atol=1e-4)
    # The token after the last: what `generate` asks for.
    later = rows._replace(tokens=rows.tokens.at[:, 3:].set(9))
    assert (np.asarray(answer(ask(later, jnp.asarray([3, 0])))) == log_probs).all()


def test_describe(build, make_rows, corrupt):
    config, objective = build()
    rows = make_rows(config, [9])
    row, example = (jax.tree.map(lambda x: x[0], t) for t in (rows, corrupt(objective, rows)))
    shown = objective.describe(None, None, row, example)
    payload = row.tokens[:9].tolist()
    assert shown.tokens["input"].tolist() == [2, *payload, *[-1] * 25]
    assert shown.tokens["predicts"].tolist() == [*payload, *[-1] * 26]
    sees = [[j <= i < 10 for j in range(35)] for i in range(35)]
    assert shown.sees["attention"].tolist() == sees


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"objective.label_smoothing": 1.5}, r"label_smoothing=1.5 is out of range: in \[0, 1\]"),
        ({"objective.z_loss": -1.0}, "z_loss=-1.0 is out of range: at least 0"),
    ],
)
def test_mistakes_are_named(overrides, message, build):
    with pytest.raises(UserError, match=message):
        build(**overrides)


def test_a_vocabulary_without_bos(make_config, vocabulary):
    lacking = type(vocabulary)(**{**vars(vocabulary), "bos": None})
    with pytest.raises(UserError, match="'causal_lm' needs a 'bos' token"):
        causal_lm.build(make_config("causal_lm"), lacking)


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("size,parameters", [("base", 124_439_808), ("large", 354_823_168)])
def test_sizes_are_gpt2s(size, parameters, vocabulary):
    config = importlib.import_module("configs.causal_lm").get_config(size)
    sized = {
        **vars(vocabulary),
        "size": 50_257,
        "unigram_counts": np.ones(50_257),
        "bytes_per_id": np.ones(50_257),
    }
    objective = causal_lm.build(config, type(vocabulary)(**sized))
    example = causal_lm.Example(
        tokens=jax.ShapeDtypeStruct((1, 1024), jnp.int32),
        length=jax.ShapeDtypeStruct((1,), jnp.int32),
        document=None,
        positions=jax.ShapeDtypeStruct((1, 4), jnp.int32),
        labels=None,
        weights=None,
    )
    params = jax.eval_shape(objective.model.init, jax.random.key(0), example)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match="huge: no such size, there are tiny, small, base, large"):
        importlib.import_module("configs.causal_lm").get_config("huge")


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_small_sizes_differ_from_masked_lm_in_the_objective_alone(size):
    causal, masked = (
        importlib.import_module(f"configs.{name}").get_config(size).to_dict()
        for name in ("causal_lm", "masked_lm")
    )
    assert causal.pop("objective") != masked.pop("objective")
    assert causal == masked
