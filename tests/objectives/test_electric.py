"""Electric: what the two towers see, the cloze loss and the energies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import replaced_token_detection
from pretraining.errors import UserError

LENGTHS = [32, 20, 9, 0]
SIZE = {"objective.mask_rate": 0.3, "objective.generator_size": 0.25}  # towers of width 4
ELECTRIC = {"objective.generator": "two_tower", "objective.discriminator": "electric"}


@pytest.fixture(scope="module")
def electric(make_config, vocabulary, make_rows, corrupt, init):
    config = make_config("replaced_token_detection", **ELECTRIC, **SIZE)
    objective = replaced_token_detection.build(config, vocabulary)
    rows = make_rows(config, LENGTHS)
    examples = corrupt(objective, rows)
    params = jax.tree.map(lambda x: 5 * x, init(objective, examples))
    return objective, rows, examples, params


@pytest.fixture(scope="module")
def call(electric):
    """(method, argument) -> its value, jitted."""
    objective, _, _, params = electric

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, argument):
        return objective.model.apply({"params": params}, argument, method=method)

    return run


def test_each_tower_sees_one_side(electric, call):
    """What changes when token t does: the left half behind t, the right half before it, and
    neither at t itself."""
    _, _, examples, _ = electric
    before = np.asarray(call("generate", examples))
    assert before.shape == (4, 35, 2 * 4)
    for t in (1, 5, 9):
        token = examples.tokens[:, t]
        changed = examples.tokens.at[:, t].set(jnp.where(token == 7, 8, 7))
        after = np.asarray(call("generate", examples._replace(tokens=changed)))
        differs = (after != before).reshape(4, 35, 2, 4).any(axis=3)
        for row, length in enumerate(LENGTHS[:3]):
            place = np.arange(1, length + 1)  # of the payload
            assert (differs[row, place, 0] == (place > t)).all()
            assert (differs[row, place, 1] == (place < t)).all()


def test_padding_is_not_seen(electric, call):
    _, _, examples, _ = electric
    before = np.asarray(call("generate", examples))
    beyond = jnp.arange(35)[None] >= examples.length[:, None]
    noise = examples._replace(tokens=jnp.where(beyond, 9, examples.tokens))
    after = np.asarray(call("generate", noise))
    for row, length in enumerate(LENGTHS[:3]):
        assert (after[row, 1 : length + 1] == before[row, 1 : length + 1]).all()


def test_losses_by_hand(electric, call, terms, vocabulary):
    objective, rows, examples, params = electric
    shown = jax.jit(jax.vmap(functools.partial(objective.describe, objective.model.apply, params)))
    lines = shown(rows, examples)
    assert (lines.tokens["generator sees"] == lines.tokens["original"]).all()
    inside = np.arange(35) < np.asarray(examples.length)[:, None]
    seen = np.where(inside, lines.tokens["discriminator sees"], 0)
    logits = np.asarray(call("project", call("generate", examples)), np.float64)
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    at = lambda tokens: np.take_along_axis(log_q, np.asarray(tokens)[..., None], axis=2)[..., 0]
    found = terms(objective, params, examples)

    text = inside & ~np.isin(examples.original, vocabulary.special_ids)
    assert text.sum() > 40
    assert float(found["generator"].sum) == pytest.approx(-at(examples.original)[text].sum(), 1e-5)
    assert float(found["generator"].weight) == text.sum()

    hidden = call("encode", examples._replace(tokens=jnp.asarray(seen, jnp.int32)))
    energy = np.asarray(call("discriminate", hidden), np.float64)
    probability = 1 / (1 + np.exp(-(energy + at(seen) + np.log(0.3 / 0.7))))
    selected = np.asarray(examples.corrupted)
    nll = -np.log(np.where(selected, probability, 1 - probability))
    counts = inside & (np.array(LENGTHS) > 0)[:, None]
    assert float(found["discriminator"].sum) == pytest.approx(nll[counts].sum(), rel=1e-5)
    assert float(found["replaced"].sum) == selected.sum()
    score = objective.score(objective.model.apply, params, examples._replace(tokens=seen))
    assert (objective.score_kind, objective.family) == ("energy", "detection/two_tower")
    np.testing.assert_allclose(score, -energy[:, 1:33], rtol=1e-4, atol=1e-6)


def test_the_discriminator_does_not_train_the_towers(electric):
    objective, _, examples, params = electric

    @jax.jit
    @jax.jacrev
    def gradients(params):
        found = objective.loss(objective.model.apply, params, examples, {}, None, False)
        return {name: found[name].sum for name in ("generator", "discriminator")}

    found = gradients(params)
    trained = lambda tree: {name for name in tree if any(map(np.any, jax.tree.leaves(tree[name])))}
    towers = {"generator", "generator_backward", "generator_head"}
    assert trained(found["discriminator"]) == {"encoder", "head"}
    assert trained(found["generator"]) == towers | {"encoder"}  # its embeddings
    assert trained(found["generator"]["encoder"]) == {"embeddings"}
    assert set(params) == towers | {"encoder", "head"}


def test_electric_needs_two_towers(make_config, vocabulary):
    config = make_config("replaced_token_detection", **{"objective.discriminator": "electric"})
    with pytest.raises(UserError, match="electric' needs .*generator='two_tower', not 'masked_lm'"):
        replaced_token_detection.build(config, vocabulary)


def test_a_query_sees_all_tokens_but_its_own(electric, make_config, make_rows):
    """No [MASK], which two towers never read in training: each sees the other asked one."""
    objective, _, _, params = electric
    rows = make_rows(make_config("replaced_token_detection"), [20])
    ask = jax.jit(jax.vmap(objective.query, (0, None)))
    assert (
        ask(rows, jnp.asarray([4, 9])).tokens == ask(rows, jnp.zeros(0, jnp.int32)).tokens
    ).all()
    other = rows._replace(tokens=rows.tokens.at[:, 4].set(7))
    answer = lambda rows: objective.log_probs(
        objective.model.apply, params, ask(rows, jnp.asarray([4, 9]))
    )
    assert (answer(rows)[:, 0] == answer(other)[:, 0]).all()
    assert (answer(rows)[:, 1] != answer(other)[:, 1]).any()
