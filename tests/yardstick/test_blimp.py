"""Accuracies by hand, and of real scores one by one."""

import dataclasses

import numpy as np
import pytest

from pretraining.yardstick import blimp, tasks
from pretraining.yardstick.tasks import Paradigm


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
        paradigm.name: np.mean([np.greater(*run.score(list(pair))) for pair in paradigm.pairs])
        for paradigm in paradigms
    }
    assert cut == 0
    assert figures["binding"] == pytest.approx(right["c"])
    assert figures["agreement"] == pytest.approx((right["a"] + right["b"]) / 2)
    assert figures["accuracy"] == pytest.approx(np.mean(list(right.values())))


def test_an_objective_without_queries_has_no_figures(causal):
    blind = dataclasses.replace(causal, objective=causal.objective._replace(query=None))
    assert blimp.measure(blind, [Paradigm("a", "agreement", [("a", "b")])]) == ({}, 0)
