"""Accuracies by hand, and of real scores one by one."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretraining import predict
from pretraining.yardstick import blimp, tasks, texts
from pretraining.yardstick.tasks import Paradigm

Model = collections.namedtuple("Model", "apply")


def test_means_of_pairs_of_paradigms_of_phenomena(causal, monkeypatch):
    """a: 2 of 2 right, b: a tie and a wrong one, c: 1 of 4: (1 + .25) / 2 of the term of a and b,
    (1 + .25 + .25) / 3 of all."""
    pairs = lambda count: [("the value", "value the")] * count
    paradigms = [
        Paradigm("a", "agreement", pairs(2)),
        Paradigm("b", "agreement", pairs(2)),
        Paradigm("c", "binding", pairs(4)),
    ]
    scores = [-1.0, -2.0, -5.0, -9.0, -3.0, -3.0, -4.0, -3.5]
    scores += [-1.0, -2.0, -2.0, -1.0, -2.0, -1.0, -2.0, -1.0]
    monkeypatch.setattr(blimp, "_scores", lambda run, sentences: scores)
    assert blimp.measure(causal, paradigms) == (
        {"accuracy": 0.5, "agreement": 0.625, "binding": 0.25},
        0,
    )


def test_the_sentence_that_the_run_scores_higher(run, folder):
    paradigms = tasks.read(folder, tasks.Sample(3, (1, 1), (1, 1))).blimp
    figures, cut = blimp.measure(run, paradigms)
    right = {
        paradigm.name: np.mean([total(run, good) > total(run, bad) for good, bad in paradigm.pairs])
        for paradigm in paradigms
    }
    assert cut == 0
    assert figures["binding"] == pytest.approx(right["c"])
    assert figures["agreement"] == pytest.approx((right["a"] + right["b"]) / 2)
    assert figures["accuracy"] == pytest.approx(np.mean(list(right.values())))


def total(run, text):
    """The score of one text, token by token; what is masked is masked alone."""
    objective, row = run.objective, predict.text_row(run.vocabulary, text, run.payload)
    if objective.score is not None:
        example = objective.query(row, jnp.zeros(0, jnp.int32))
        example = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
        values = objective.score(objective.model.apply, run.params, example)
        return np.float64(values[0, : row.length]).sum()
    ask = lambda place: predict.log_probs(objective, run.params, [row], np.array([[place]]))[0, 0]
    return sum(float(ask(place)[row.tokens[place]]) for place in range(row.length))


def test_unknown_tokens_are_no_certain_ones(monkeypatch):
    """Each token scores -1: of three, unknown (1) or not, -3."""
    objective = SimpleNamespace(
        query=lambda row, positions: row,
        score=lambda apply, params, rows: -jnp.ones(rows.tokens.shape),
        model=Model(None),
    )
    monkeypatch.setattr(texts, "shorten", lambda run, payload: (objective, payload))
    run = SimpleNamespace(params={}, vocabulary=SimpleNamespace(special_ids=(0, 1, 2)))
    tokens = [np.array([5, 6, 7]), np.array([1, 6, 1])]
    found = blimp._scores(run, texts.Texts(tokens, [np.zeros(3)] * 2, [False] * 2))
    assert found == [-3, -3]


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"query": None}, ""),
        ({"log_probs": None, "score": None}, ""),
        ({"score": None, "context": "left"}, "likelihood"),
        ({"score": None, "context": "both"}, "pseudo-likelihood"),
        ({"score": None, "predictor": "generator"}, ""),
        ({"score": None, "family": ""}, ""),
        ({"predictor": "generator"}, "detection"),
    ],
)
def test_what_sentences_are_scored_by(changes, kind):
    whole = {"query": 1, "log_probs": 1, "score": 1, "score_kind": "detection", "context": "both"}
    whole |= {"predictor": "", "family": "masked"}
    assert blimp.kind(SimpleNamespace(**whole | changes)) == kind


def test_an_objective_without_queries_has_no_figures(causal):
    blind = dataclasses.replace(causal, objective=causal.objective._replace(query=None))
    assert blimp.measure(blind, [Paradigm("a", "agreement", [("a", "b")])]) == ({}, 0)
