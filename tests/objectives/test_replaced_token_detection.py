"""Labels, losses, gradients, embeddings and variants of replaced token detection; test_sampling.py
has the draws themselves, test_electra.py the sizes, the checks and the original's selection."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import base, replaced_token_detection
from pretraining import state

V, PAD, CLS, SEP, MASK = 64, 0, 2, 3, 4
LENGTHS = [32, 32, 20, 9, 3, 1, 0, 32]


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("replaced_token_detection", **overrides)
        return config, replaced_token_detection.build(config, vocabulary)

    return make


@pytest.fixture(scope="module")
def trained(build, make_rows, corrupt, init):
    """(objective, rows, examples, params): random parameters, five times as large.

    `like` lends its rows and examples, which most settings leave as they are.
    """

    def make(like=None, **overrides):
        config, objective = build(**overrides)
        rows = make_rows(config, LENGTHS) if like is None else like.rows
        examples = corrupt(objective, rows) if like is None else like.examples
        params = jax.tree.map(lambda x: 5 * x, init(objective, examples))
        return SimpleNamespace(objective=objective, rows=rows, examples=examples, params=params)

    return make


@pytest.fixture(scope="module")
def describe():
    """The lines of every row of a batch, jitted: {title: [B, L]}."""

    def run(made):
        def one(row, example):
            shown = made.objective.describe(made.objective.model.apply, made.params, row, example)
            return shown.tokens | shown.numbers

        lines = jax.jit(jax.vmap(one))(made.rows, made.examples)
        return {title: np.asarray(line) for title, line in lines.items()}

    return run


def call(made, method, *args):
    apply = jax.jit(lambda *args: made.objective.model.apply(*args, method=method))
    return np.asarray(apply({"params": made.params}, *args), np.float64)


def discriminate(made, tokens):
    """The discriminator's head on everything that it computes of tokens [B, L]."""
    seen = made.examples._replace(tokens=jnp.asarray(tokens))
    return call(made, "discriminate", jnp.float32(call(made, "encode", seen)))


def binary_cross_entropy(logits, labels):
    probability = 1 / (1 + np.exp(-logits))
    return -np.log(np.where(labels, probability, 1 - probability))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def original_tokens(rows):
    """[CLS] payload [SEP] padding, by hand."""
    lines = np.zeros((len(LENGTHS), 35), int)
    for line, tokens, length in zip(lines, rows.tokens, rows.length, strict=True):
        line[: length + 2] = [CLS, *np.asarray(tokens)[:length], SEP]
    return lines


# ------------------------------------------------------------------------------------------ labels


def test_labels_and_loss_by_hand(build, init, terms, total):
    """[CLS] a b c [SEP], positions 1 and 3 selected, samples a and d: replaced is 0 0 0 1 0."""
    a, b, c, d = 10, 11, 12, 13
    config, objective = build(**{"model.dropout": 0.0})
    rows = state.empty_rows(config, 16)
    rows = rows._replace(tokens=rows.tokens.at[:, :3].set(jnp.asarray([[a, b, c]])))
    rows = rows._replace(length=jnp.full(16, 3, jnp.int32))
    examples = jax.vmap(objective.query, (0, None))(rows, jnp.asarray([0, 2]))
    noise = jax.random.key_data(jax.random.split(jax.random.key(0), 16))
    examples = examples._replace(noise=noise)
    params = init(objective, examples)
    bias = params["generator_head"]["bias"].at[jnp.asarray([a, d])].set(50)  # only these are drawn
    params["generator_head"]["bias"] = bias
    made = SimpleNamespace(objective=objective, rows=rows, examples=examples, params=params)

    def one(row, example):
        return objective.describe(objective.model.apply, params, row, example)

    shown = jax.jit(jax.vmap(one))(rows, examples)
    drawn = np.asarray(shown.tokens["sample"])[:, [1, 3]]
    assert np.isin(drawn, [a, d]).all()
    wanted = np.flatnonzero((drawn == [a, d]).all(axis=1))[0]
    assert shown.tokens["generator sees"][wanted, :6].tolist() == [CLS, MASK, b, MASK, SEP, -1]
    assert shown.tokens["discriminator sees"][wanted, :6].tolist() == [CLS, a, b, d, SEP, -1]
    assert shown.numbers["replaced"][wanted, :6].tolist() == [0, 0, 0, 1, 0, -1]

    made.examples = jax.tree.map(lambda x: x[wanted : wanted + 1], examples)
    seen = np.array([[CLS, a, b, d, SEP, *[PAD] * 30]], np.int32)
    logits = discriminate(made, seen)[0, :5]
    detection = binary_cross_entropy(logits, np.array([0, 0, 0, 1, 0]))
    generator = -log_softmax(call(made, "__call__", made.examples))[0, [0, 1], [a, c]]
    found = terms(objective, params, made.examples)
    assert float(found["discriminator"].sum) == pytest.approx(detection.sum(), rel=1e-5)
    assert float(found["discriminator"].weight) == 5
    expected = generator.mean() + 50 * detection.mean()
    assert float(total(found)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def electra(trained):
    return trained(**{"objective.mask_rate": 0.4})


def test_figures_of_the_discriminator_by_hand(electra, describe, terms):
    """All tokens with [CLS] and [SEP]; a row without any counts nothing."""
    lines = describe(electra)
    found = terms(electra.objective, electra.params, electra.examples)
    original = original_tokens(electra.rows)
    inside = np.arange(35) < (np.array(LENGTHS) + 2)[:, None]
    assert (lines["original"] == np.where(inside, original, -1)).all()
    seen = np.where(inside, lines["discriminator sees"], PAD).astype(np.int32)
    replaced = (seen != original) & inside
    assert (lines["replaced"] == np.where(inside, replaced, -1)).all()
    assert 15 < replaced.sum() < np.asarray(electra.examples.weights).sum()  # some samples are true
    counts = inside & (np.array(LENGTHS) > 0)[:, None]
    logits = discriminate(electra, seen)
    figures = {
        "discriminator": binary_cross_entropy(logits, replaced),
        "discriminator_accuracy": (logits > 0) == replaced,
        "majority_accuracy": ~replaced,
        "replaced": replaced,
        "true_positives": (logits > 0) & replaced,
        "false_positives": (logits > 0) & ~replaced,
    }
    for name, values in figures.items():
        assert float(found[name].sum) == pytest.approx(values[counts].sum(), rel=1e-5), name
        assert float(found[name].weight) == counts.sum() == 129 + 2 * 7
    scales = {name: term.scale for name, term in found.items() if term.scale}
    assert scales == {"generator": 1, "discriminator": 50}


def test_samples_stand_at_every_selected_position(electra, describe):
    """Also where the generator sees the token; elsewhere the discriminator sees the original."""
    lines = describe(electra)
    selected = np.asarray(electra.examples.corrupted)
    assert ((lines["sample"] >= 0) == selected).all()
    seen = lines["discriminator sees"]
    assert (seen == np.where(selected, lines["sample"], lines["original"])).all()
    visible = selected & (lines["generator sees"] == lines["original"])
    assert (lines["generator sees"][selected & ~visible] == MASK).all()
    assert (lines["replaced"][visible] == 1).any()


def test_unpredicted_masks_are_restored(trained, describe):
    """With predict_rate below mask_rate the discriminator still sees no [MASK] of the masking."""
    made = trained(**{"objective.mask_rate": 0.4, "objective.predict_rate": 0.1})
    lines = describe(made)
    unpredicted = np.asarray(made.examples.corrupted) & (lines["sample"] < 0)
    assert unpredicted.sum() > 20
    assert (lines["discriminator sees"] == original_tokens(made.rows))[unpredicted].all()


def test_samples_do_not_depend_on_the_batch(electra, describe):
    """One batch, its halves as accumulation makes them, and another order."""
    whole = describe(electra)["discriminator sees"]
    for rows in ([0, 2, 4, 6], [1, 3, 5, 7], [7, 3]):
        part = jax.tree.map(lambda x, rows=rows: x[jnp.asarray(rows)], electra.examples)
        of = jax.tree.map(lambda x, rows=rows: x[jnp.asarray(rows)], electra.rows)
        made = SimpleNamespace(**(vars(electra) | {"examples": part, "rows": of}))
        assert (describe(made)["discriminator sees"] == whole[rows]).all()


# ------------------------------------------------------------------------------ gradients, sharing


def nonzero(tree):
    """The paths, two names deep, under which some leaf is not exactly 0."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path[:2], simple=True, separator="/")
        for path, leaf in flat
        if np.any(np.asarray(leaf))
    }


ENCODER = {"encoder/embeddings", "encoder/layer_0", "head/dense", "head/output"}
GENERATOR = {"generator/embeddings_project", "generator/layer_0"} | {
    f"generator_head/{name}" for name in ("bias", "norm", "transform")
}


@pytest.mark.parametrize(
    "sharing,of_the_generator",
    [
        ("all", GENERATOR | {"encoder/embeddings"}),
        ("token", GENERATOR | {"encoder/embeddings", "generator/embeddings"}),
        ("none", GENERATOR | {"generator/embeddings"}),
    ],
)
def test_each_loss_trains_its_own_network(sharing, of_the_generator, electra, trained):
    """And both the shared embeddings, which exist once, under `encoder`."""
    made = trained(electra, **{"objective.sharing": sharing})

    @jax.jit
    @jax.jacrev
    def gradients(params):
        terms = made.objective.loss(
            made.objective.model.apply, params, made.examples, {}, None, False
        )
        return {name: terms[name].sum for name in ("generator", "discriminator")}

    found = gradients(made.params)
    assert nonzero(found["discriminator"]) == ENCODER
    assert nonzero(found["generator"]) == of_the_generator
    assert nonzero(jax.tree.map(jnp.ones_like, made.params)) == ENCODER | of_the_generator
    own = made.params["generator"].get("embeddings", {})
    parts = {"all": set(), "token": {"position", "norm"}, "none": {"token", "position", "norm"}}
    assert set(own) == parts[sharing]
    tables = [x.shape for x in jax.tree.leaves(made.params) if x.ndim == 2 and x.shape[0] == V]
    assert tables == [(V, 16)] * (2 if sharing == "none" else 1)
    if sharing == "token":
        embeddings = found["generator"]["encoder"]["embeddings"]
        assert nonzero({"": embeddings}) == {"/token"}


@pytest.mark.parametrize("sharing", ["all", "token", "none"])
def test_networks_can_be_taken_out_and_put_back(sharing, electra, trained):
    """Each is then an ordinary encoder with a head, of the same logits."""
    made = trained(electra, **{"objective.sharing": sharing, "model.embedding_width": 12})
    network = made.objective.hugging_face["generator"]
    taken = network.take(made.params)
    alone = base.LanguageModel(network.config, causal=False)
    expected = jax.jit(alone.apply)({"params": taken}, made.examples)
    np.testing.assert_allclose(call(made, "__call__", made.examples), expected, atol=1e-5)
    changed = jax.tree.map(lambda x: x + 1, taken)
    back = network.put(made.params, changed)
    again = network.take(back)
    assert jax.tree.structure(back) == jax.tree.structure(made.params)
    assert (again["head"]["bias"] == changed["head"]["bias"]).all()
    table = lambda tree: tree["encoder"]["embeddings"]["token"]["embedding"]
    assert (table(back) == table(made.params)).all()
    assert bool((table(again) == table(changed)).all()) == (sharing == "none")
    detector = made.objective.hugging_face["discriminator"]
    taken = detector.take(made.params)
    assert set(taken) == {"encoder", "head"}
    assert jax.tree.structure(detector.put(made.params, taken)) == jax.tree.structure(made.params)


def test_logits_of_the_networks_at_every_position(electra):
    row = jax.vmap(electra.objective.query, (0, None))(electra.rows, jnp.zeros(0, jnp.int32))
    apply, networks = electra.objective.model.apply, electra.objective.hugging_face
    binary = networks["discriminator"].logits(apply, electra.params, row)
    np.testing.assert_allclose(binary, discriminate(electra, row.tokens), atol=1e-5)
    tokens = networks["generator"].logits(apply, electra.params, row)
    at = row._replace(positions=jnp.full((8, 1), 4))
    np.testing.assert_allclose(tokens[:, 4:5], call(electra, "__call__", at), atol=1e-5)
    score = electra.objective.score(apply, electra.params, row)
    assert score.shape == (8, 32)
    np.testing.assert_allclose(np.exp(score[2, 5]), 1 / (1 + np.exp(binary[2, 6])), rtol=1e-5)


# ---------------------------------------------------------------------------------------- variants


def places(made, describe):
    """What the discriminator saw [B, L], which of it was replaced, and what counts."""
    lines, original = describe(made), original_tokens(made.rows)
    seen = np.where(lines["original"] >= 0, lines["discriminator sees"], PAD).astype(np.int32)
    counts = (lines["original"] >= 0) & (np.array(LENGTHS) > 0)[:, None]
    return seen, original, seen != original, counts


def intact(made):
    return jax.vmap(made.objective.query, (0, None))(made.rows, jnp.zeros(0, jnp.int32))


def scores(made):
    """[B, T]: of the discriminator, whatever the generator is."""
    objective = made.objective
    assert (objective.score_kind, objective.predictor) == ("reconstruction", "generator")
    return objective.score(objective.model.apply, made.params, intact(made))


def of_labels(values, labels):
    return np.take_along_axis(values, labels[..., None], axis=2)[..., 0]


def test_masked_only_counts_the_selected_tokens(electra, trained, describe, terms):
    made = trained(
        electra, **{"objective.mask_rate": 0.4, "objective.discriminator": "masked_only"}
    )
    seen, _, replaced, _ = places(made, describe)
    assert made.objective.score_kind == "detection"
    selected = np.asarray(made.examples.corrupted)
    logits = discriminate(made, seen)
    found = terms(made.objective, made.params, made.examples)
    nll = binary_cross_entropy(logits, replaced)[selected].sum()
    assert float(found["discriminator"].sum) == pytest.approx(nll, rel=1e-5)
    assert float(found["discriminator"].weight) == selected.sum()
    assert float(found["discriminator_accuracy"].sum) == ((logits > 0) == replaced)[selected].sum()
    assert float(found["majority_accuracy"].sum) == replaced.sum()


def test_replace_mlm_predicts_the_selected_tokens(electra, trained, describe, terms):
    """With half of a position's slots at a time: chunks of 4."""
    made = trained(
        electra,
        **{
            "objective.mask_rate": 0.4,
            "objective.discriminator": "replace_mlm",
            "objective.discriminator_weight": 2.0,
            "model.logits_chunk": 4,
        },
    )
    seen, original, _, _ = places(made, describe)
    log_probs = log_softmax(discriminate(made, seen))
    at = np.nonzero(np.asarray(made.examples.corrupted))
    found = terms(made.objective, made.params, made.examples)["discriminator"]
    nll = -log_probs[at][np.arange(len(at[0])), original[at]].sum()
    assert float(found.sum) == pytest.approx(nll, rel=1e-5)
    assert (float(found.weight), found.scale) == (len(at[0]), 2)
    expected = of_labels(log_softmax(discriminate(made, intact(made).tokens)), original)
    np.testing.assert_allclose(scores(made), expected[:, 1:-2], rtol=1e-4, atol=1e-5)
    assert set(made.objective.hugging_face) == {"generator"}


def test_all_tokens_mlm_mixes_a_copy_with_a_prediction(electra, trained, describe, terms):
    made = trained(
        electra, **{"objective.mask_rate": 0.4, "objective.discriminator": "all_tokens_mlm"}
    )
    seen, original, replaced, counts = places(made, describe)
    probability = np.exp(log_softmax(discriminate(made, seen)))
    hidden = jnp.float32(call(made, "encode", made.examples._replace(tokens=jnp.asarray(seen))))
    gate = 1 / (1 + np.exp(-call(made, "gate", hidden)))
    assert gate.std() > 0.01
    predicted = of_labels(probability, original)
    mixture = gate * ~replaced + (1 - gate) * predicted
    found = terms(made.objective, made.params, made.examples)
    assert float(found["discriminator"].sum) == pytest.approx(
        -np.log(mixture[counts]).sum(), rel=1e-5
    )
    assert float(found["discriminator"].weight) == counts.sum()
    assert float(found["replaced"].sum) == replaced.sum()
    row = intact(made)
    gate = 1 / (1 + np.exp(-call(made, "gate", jnp.float32(call(made, "encode", row)))))
    read = of_labels(np.exp(log_softmax(discriminate(made, row.tokens))), original)
    expected = np.log(gate + (1 - gate) * read)
    np.testing.assert_allclose(scores(made), expected[:, 1:-2], rtol=1e-4, atol=1e-5)

    @jax.jit
    @jax.grad
    def gradient(params):
        apply = made.objective.model.apply
        return made.objective.loss(apply, params, made.examples, {}, None, False)[
            "discriminator"
        ].sum

    found = gradient(made.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    trained_parts = {name for name in found if nonzero({"": found[name]})}
    assert trained_parts == {"encoder", "head", "copy_head"}


def test_a_uniform_generator_has_no_parameters(electra, trained, describe, terms, assert_binomial):
    made = trained(electra, **{"objective.mask_rate": 0.4, "objective.generator": "uniform"})
    assert set(made.params) == {"encoder", "head"}
    assert set(made.objective.hugging_face) == {"discriminator"}
    found = terms(made.objective, made.params, made.examples)
    assert not {"accuracy", "unigram_loss"} & set(found)
    assert made.objective.family == made.objective.token_term == ""
    found = found["generator"]
    assert float(found.sum) == pytest.approx(float(found.weight) * math.log(V), rel=1e-5)
    samples = describe(made)["sample"]
    samples = samples[samples >= 0]
    assert_binomial((samples < V // 4).sum(), samples.size, 1 / 4)


def test_disallowed_corrections_leave_every_sample_false(electra, trained, describe):
    made = trained(electra, **{"objective.mask_rate": 0.4, "objective.disallow_correct": True})
    assert ((describe(made)["replaced"] == 1) == np.asarray(made.examples.corrupted)).all()
