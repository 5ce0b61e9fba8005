"""What every objective promises: each file of objectives/ that has `build` is tested, as its recipe
`configs/<name>.py:tiny` sets it, made smaller."""

import importlib
import math
import operator
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from objectives import base
from pretraining.config import objective_names

NAMES = objective_names()
# Full rows, short ones, and the empty ones that fill up the last batch of an evaluation.
LENGTHS = [32, 32, 31, 20, 9, 2, 1, 0]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def config(name, make_config):
    dropout = {"model.dropout": 0.1, "model.attention_dropout": 0.1}
    return make_config(name, **dropout, **{"model.logits_chunk": 2})


@pytest.fixture(scope="module")
def objective(name, config, vocabulary):
    return importlib.import_module(f"objectives.{name}").build(config, vocabulary)


@pytest.fixture(scope="module")
def rows(config, make_rows):
    return make_rows(config, LENGTHS)


@pytest.fixture(scope="module")
def examples(objective, rows, corrupt):
    return corrupt(objective, rows)


@pytest.fixture(scope="module")
def params(objective, examples, init):
    return init(objective, examples)


def assert_same(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_some_objectives_are_found():
    assert {
        "causal_lm",
        "masked_lm",
        "permutation_lm",
        "span_boundary",
        "replaced_token_detection",
    } <= set(NAMES)


# -------------------------------------------------------------------------------------- corruption


def test_shapes_depend_on_the_config_alone(objective, rows, examples):
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
    for knobs in (objective.schedule(jnp.int32(0)), objective.evaluation_knobs):
        shape = jax.eval_shape(objective.corrupt, jax.random.key(0), row, knobs)
        expected = [(x.shape[1:], x.dtype) for x in jax.tree.leaves(examples)]
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(shape)] == expected


def test_the_same_key_and_row_give_the_same_example(objective, rows, examples, corrupt):
    assert_same(corrupt(objective, rows), examples)


def test_an_example_depends_on_its_own_row_alone(objective, rows, examples, corrupt):
    """Alone, and in another batch at another place."""
    at = lambda tree, place: jax.tree.map(lambda x: x[place : place + 1], tree)
    for place in (0, 3, 7):
        assert_same(corrupt(objective, at(rows, place)), at(examples, place))
    backwards = jax.tree.map(lambda x: x[::-1], rows)
    assert_same(corrupt(objective, backwards), jax.tree.map(lambda x: x[::-1], examples))


def test_an_example_does_not_depend_on_the_devices(objective, rows, examples):
    mesh = Mesh(np.array(jax.devices()), "data")
    assert mesh.size == 8
    sharded = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def run(rows):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), rows.index)
        knobs = objective.schedule(jnp.int32(0))
        return jax.vmap(objective.corrupt, (0, 0, None))(keys, rows, knobs)

    result = run(sharded)
    assert len(jax.tree.leaves(result)[0].sharding.device_set) == 8
    assert_same(result, examples)


def test_specials_and_padding_are_never_touched(objective, config, make_rows, corrupt, vocabulary):
    """The payload is found again in the model's input, in order, with every token that was not
    corrupted; around it are special tokens and padding, as many as `length` says."""
    rows = make_rows(config, LENGTHS * 25, seed=1)
    examples = corrupt(objective, rows, knobs=objective.evaluation_knobs)
    fields = examples._asdict()
    nothing = np.zeros(examples.tokens.shape, bool)
    corrupted = np.asarray(fields.get("corrupted", nothing))
    specials = list(vocabulary.special_ids)
    for b, n in enumerate(LENGTHS * 25):
        tokens, payload = np.asarray(examples.tokens)[b], np.asarray(rows.tokens)[b, :n]
        start = payload_start(tokens, payload, corrupted[b])
        assert start is not None
        special = np.isin(payload, specials)
        assert not corrupted[b, start : start + n][special].any()
        frame = np.delete(np.arange(len(tokens)), np.arange(start, start + n))
        assert not corrupted[b, frame].any()
        assert np.isin(tokens[frame], specials).all()
        length = int(examples.length[b])
        assert n < length <= n + 3
        assert (tokens[length:] == vocabulary.pad).all()


def payload_start(tokens, payload, corrupted):
    """Where the payload stands in the model's input, corrupted tokens aside; None if nowhere."""
    for start in range(len(tokens) - len(payload) + 1):
        window = slice(start, start + len(payload))
        # An empty payload is somewhere in any case: after the first token.
        if (len(payload) or start) and ((tokens[window] == payload) | corrupted[window]).all():
            return start
    return None


def test_labels_are_tokens_of_the_row(objective, rows, examples):
    for b, n in enumerate(LENGTHS):
        labels = np.asarray(examples.labels)[b][np.asarray(examples.weights)[b] > 0]
        payload = np.asarray(rows.tokens)[b, :n].tolist()
        # Each is predicted once: nothing is left when the row's own tokens are taken away.
        assert not Counter(labels.tolist()) - Counter(payload)


# -------------------------------------------------------------------------------------------- loss


def test_weights_do_not_depend_on_parameters(objective, examples, params, terms, init):
    other = init(objective, examples, seed=1)
    ours, theirs = (terms(objective, p, examples) for p in (params, other))
    assert {name: float(t.weight) for name, t in ours.items()} == {
        name: float(t.weight) for name, t in theirs.items()
    }
    assert any(float(ours[name].sum) != float(theirs[name].sum) for name in ours)


@pytest.fixture(scope="module")
def gradient(objective, examples, params, total):
    """(examples, weights) -> the gradient of the loss, divided by these weights if given."""

    @jax.jit
    def run(examples, weights):
        def loss(params):
            terms = objective.loss(objective.model.apply, params, examples, {}, None, False)
            if weights is not None:
                terms = {name: t._replace(weight=weights[name]) for name, t in terms.items()}
            return total(terms)

        return jax.grad(loss)(params)

    return lambda examples, weights=None: run(examples, weights)


@pytest.mark.parametrize("kind", ["empty", "separators"])
def test_nothing_to_predict_is_finite(
    kind, objective, config, params, make_rows, corrupt, terms, gradient
):
    """Rows without a token, and rows of nothing but separators."""
    rows = make_rows(config, [0 if kind == "empty" else 32] * 8)
    if kind == "separators":
        rows = rows._replace(tokens=jnp.full_like(rows.tokens, 3))
    examples = corrupt(objective, rows)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(examples)))
    for term in terms(objective, params, examples).values():
        assert np.isfinite([float(term.sum), float(term.weight)]).all()
        if kind == "empty":
            assert (float(term.sum), float(term.weight)) == (0, 0)


def test_gradients_are_finite_and_reach_every_parameter(gradient, examples):
    flat = jax.tree_util.tree_flatten_with_path(gradient(examples))[0]
    for path, leaf in flat:
        where = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), where
        # The softmax does not feel a bias that is common to all keys.
        if not where.endswith("['key']['bias']"):
            assert np.abs(leaf).max() > 0, where


def plain_cross_entropy(project, hidden, labels, weights, chunk):
    """As in a textbook, with all logits at once and JAX's own gradient."""
    log_probs = jax.nn.log_softmax(project(hidden).astype(jnp.float32))
    nll = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    correct = log_probs.argmax(axis=-1) == labels
    loss = jnp.sum(nll * weights)
    return base.Sums(loss, loss, jnp.sum(jnp.where(correct, weights, 0.0)))


def test_the_gradient_is_that_of_a_plain_cross_entropy(
    objective, examples, params, gradient, total, monkeypatch
):
    found = gradient(examples)
    monkeypatch.setattr(base, "cross_entropy", plain_cross_entropy)

    @jax.jit
    def run(params, examples):
        return total(objective.loss(objective.model.apply, params, examples, {}, None, False))

    wanted = jax.grad(run)(params, examples)
    scale = float(optax.tree.norm(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_microbatches_add_up_to_the_batch(objective, examples, params, gradient, terms):
    """Gradients of 4 microbatches, each divided by the summed weights of all."""
    whole = gradient(examples)
    pieces = [jax.tree.map(lambda x, m=m: x[m::4], examples) for m in range(4)]
    by_piece = [terms(objective, params, piece) for piece in pieces]
    weights = {name: sum(t[name].weight for t in by_piece) for name in by_piece[0]}
    summed = jax.tree.map(lambda *g: sum(g), *(gradient(piece, weights) for piece in pieces))
    scale = float(optax.tree.norm(whole))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_dropout_follows_the_key(objective, params, examples, terms, total):

    def loss(seed):
        return float(total(terms(objective, params, examples, None, jax.random.key(seed), True)))

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)


def test_a_learnable_language_is_learnt_from_its_context(objective, config, make_rows, init, total):
    """A Markov chain: a token follows itself .956 of the time. Its 8 tokens are equally frequent,
    so that without their context no more than an eighth can be guessed."""
    batch, steps = 16, 300
    optimizer = optax.adam(1e-2)

    def chain(seed):
        rng = np.random.default_rng(seed)
        tokens = np.empty((batch, 32), np.int32)
        state = rng.integers(0, 8, batch)
        for t in range(32):
            tokens[:, t] = state + 5
            state = np.where(rng.random(batch) < 0.95, state, rng.integers(0, 8, batch))
        rows = make_rows(config, [32] * batch, separators=False)
        return rows._replace(tokens=jnp.asarray(tokens))

    @jax.jit
    def step(params, state, number, rows):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(number), rows.index)
        knobs = objective.schedule(number)
        examples = jax.vmap(objective.corrupt, (0, 0, None))(keys, rows, knobs)

        def loss(params):
            terms = objective.loss(objective.model.apply, params, examples, knobs, None, True)
            return total(terms), terms["accuracy"]

        (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, (value, accuracy)

    corrupted = jax.vmap(objective.corrupt, (None, 0, None))(
        jax.random.key(0), chain(0), objective.evaluation_knobs
    )
    params = init(objective, corrupted)
    state, losses, accuracies = optimizer.init(params), [], []
    for number in range(steps):
        params, state, (loss, accuracy) = step(params, state, jnp.int32(number), chain(number))
        losses.append(float(loss))
        accuracies.append(float(accuracy.sum / accuracy.weight))
    assert np.mean(losses[-20:]) < 0.6 * losses[0]
    assert np.mean(accuracies[-20:]) > 0.25


# ----------------------------------------------------------------------------------------- network


def test_the_encoder_is_there_once_and_owns_the_embeddings(config, params):
    """The encoder has the parameters of its config, counted by hand; the rest has no further
    embedding of the vocabulary."""
    sizes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    count = sum(math.prod(shape) for shape in sizes(params["encoder"]))
    assert count == encoder_count(config.model, 64, config.data.sequence_length)
    tables = [s for s in sizes(params) if len(s) == 2 and s[0] == 64]
    assert len(tables) == 1
    assert params["encoder"]["embeddings"]["token"]["embedding"].shape == tables[0]


def encoder_count(model, vocabulary_size, length):
    """Parameters of BERT's encoder, or of XLNet's where positions are relative."""
    width, inner = model.width, model.mlp_width
    mlp = 2 * width * inner + inner + width
    norms = 4 * width
    if model.position == "relative":
        # q, k, v, r, o without biases; r_w, r_r, r_s and two segment embeddings; the mask embedding
        layer = 5 * width**2 + 3 * width + 2 * width + mlp + norms
        return model.layers * layer + vocabulary_size * width + width
    narrow = model.embedding_width or width
    positions = length if model.position == "learned" else 0
    embeddings = (vocabulary_size + positions + model.segments + 2) * narrow
    projection = 0 if narrow == width else narrow * width + width
    layer = 4 * (width**2 + width) + mlp + norms
    return model.layers * layer + embeddings + projection


def test_the_example_initialises_every_parameter(objective, rows, params, init, corrupt):
    """Empty rows, as before a run, give the same parameters as real ones."""
    nothing = jax.tree.map(jnp.zeros_like, rows)
    knobs = jax.tree.map(jnp.float32, objective.evaluation_knobs)
    again = init(objective, corrupt(objective, nothing, knobs=knobs))
    assert_same(again, params)


# --------------------------------------------------------------------------------------- notebooks


def test_queries_give_log_probabilities(objective, rows, params):
    if objective.query is None:
        pytest.skip("this objective answers no queries")
    examples = jax.vmap(objective.query, (0, None))(rows, jnp.asarray([5, 0]))
    answer = jax.jit(lambda params, e: objective.log_probs(objective.model.apply, params, e))
    log_probs = np.asarray(answer(params, examples))
    assert log_probs.shape == (len(LENGTHS), 2, 64)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-4)


def test_context_is_what_a_queried_position_sees(objective, rows, params):
    """Token 5 is queried: changing token 5 itself never changes the answer, changing token 9 does
    where the context is "both", changing token 2 always."""
    if objective.query is None:
        pytest.skip("this objective answers no queries")

    @jax.jit
    def answer(tokens):
        row = jax.tree.map(lambda x: x[0], rows)._replace(tokens=tokens)
        example = jax.tree.map(lambda x: x[None], objective.query(row, jnp.asarray([5])))
        return objective.log_probs(objective.model.apply, params, example)[0, 0]

    tokens = jnp.where(rows.tokens[0] == 3, 8, rows.tokens[0])
    change = lambda place: tokens.at[place].set(jnp.where(tokens[place] == 7, 6, 7))
    original = answer(tokens)
    differs = {place: bool((answer(change(place)) != original).any()) for place in (2, 5, 9)}
    assert differs == {2: True, 5: False, 9: objective.context == "both"}


def test_the_family_is_that_of_objectives_whose_predictions_compare(name, objective):
    assert {
        "causal_lm": "causal",
        "masked_lm": "masked",
        "span_boundary": "masked",
        "permutation_lm": "permutation",
        "replaced_token_detection": "detection",
    }.get(name, objective.family) == objective.family


def test_the_term_that_the_unigram_loss_belongs_to(objective, params, examples):
    """Of as many tokens, and a part of the loss; one kind of score, where there is one."""
    knobs = objective.evaluation_knobs
    found = jax.eval_shape(
        lambda: objective.loss(objective.model.apply, params, examples, knobs, None, False)
    )
    assert bool(objective.token_term) == ("unigram_loss" in found)
    assert bool(objective.score_kind) == (objective.score is not None)
    if objective.token_term:
        terms = objective.loss(objective.model.apply, params, examples, knobs, None, False)
        assert terms[objective.token_term].weight == terms["unigram_loss"].weight
        assert terms[objective.token_term].scale > 0 == terms["unigram_loss"].scale


def test_the_summary_is_the_last_blocks_vector_of_cls_or_of_the_last_token(
    objective, rows, params, vocabulary
):
    """And it knows of every token of the text, and of no padding."""
    if objective.summary is None:
        pytest.skip("this objective has no summary of a text")
    apply = objective.model.apply
    summary = jax.jit(lambda rows: objective.summary(apply, params, intact(rows)))
    intact = lambda rows: jax.vmap(objective.query, (0, None))(rows, jnp.zeros(0, jnp.int32))
    found, examples = np.asarray(summary(rows)), intact(rows)
    hidden = np.asarray(apply({"params": params}, examples, method="encode"))
    for b in range(len(LENGTHS)):
        place = int(examples.length[b]) - 1
        if objective.context == "both":
            (place,) = np.flatnonzero(np.asarray(examples.tokens)[b] == vocabulary.cls)
        np.testing.assert_allclose(found[b], hidden[b, place], rtol=1e-5, atol=1e-6)
    for place in (0, 8, 9, 31):
        tokens = rows.tokens.at[:, place].set(jnp.where(rows.tokens[:, place] == 7, 6, 7))
        changed = (summary(rows._replace(tokens=tokens)) != found).any(axis=1)
        assert changed.tolist() == [length > place for length in LENGTHS]


def test_describe_shows_lines_of_the_row(objective, rows, examples, params):
    """What was corrupted, as much as it was, is told from the rest by the first line alone."""
    if objective.describe is None:
        pytest.skip("this objective shows nothing")
    for b in (0, 3, 7):
        row, example = jax.tree.map(operator.itemgetter(b), (rows, examples))
        shown = objective.describe(objective.model.apply, params, row, example)
        lines = [np.asarray(line) for line in (*shown.tokens.values(), *shown.numbers.values())]
        assert all(line.shape == (35,) for line in lines)
        assert all(np.asarray(matrix).shape == (35, 35) for matrix in shown.sees.values())
        payload = np.asarray(rows.tokens)[b, : LENGTHS[b]]
        assert payload_start(lines[0], payload, np.zeros(35, bool)) is not None
