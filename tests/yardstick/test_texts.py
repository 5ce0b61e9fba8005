"""Texts through shorter rows, against the run's own rows, one text at a time."""

import dataclasses
import functools

import jax
import numpy as np

import pretraining
from pretraining import predict
from pretraining.yardstick import texts

TEXTS = ["the value", "document 3. the value of it", "an object", "number", "is the value?"]


def test_scores_are_those_of_whole_rows(run):
    """Of log-likelihoods each token is asked for alone, in a row of the full length."""
    skip = run.vocabulary.special_ids
    encoded = texts.tokenize(run, TEXTS)
    sizes = set()

    def scores(objective, rows, numbers):
        sizes.update(row.tokens.shape[0] for row in rows)
        return predict.scores(objective, run.params, rows, skip)

    found = texts.apply(run, encoded, scores, "test")
    assert len(sizes) > 1
    assert max(sizes) < run.payload
    for text, values in zip(TEXTS, found, strict=True):
        row = predict.text_row(run.vocabulary, text, run.payload)
        np.testing.assert_allclose(values, plain(run, row), rtol=1e-4, atol=1e-5)


def plain(run, row):
    """[length] by the objective's own functions."""
    if run.objective.score is not None:
        score = functools.partial(run.objective.score, run.objective.model.apply)
        return np.asarray(jax.jit(score)(run.params, intact(run, row)))[0, : row.length]
    values = [
        predict.log_probs(run.objective, run.params, [row], np.array([[position]]))[0, 0]
        for position in range(row.length)
    ]
    return [value[token] for value, token in zip(values, row.tokens, strict=False)]


def intact(run, row):
    """The batch of one row of which nothing is asked."""
    example = run.objective.query(row, np.zeros(0, np.int32))
    return jax.tree.map(lambda x: np.asarray(x)[None], example)


def test_vectors_are_those_of_whole_rows(run):
    encoded = texts.tokenize(run, TEXTS)

    def pooled(objective, rows, numbers):
        found = predict.pooled(objective, run.params, rows)
        return list(zip(found["mean"], found["cls"], strict=True))

    function = jax.jit(functools.partial(run.objective.summary, run.objective.model.apply))
    for text, (mean, summary) in zip(TEXTS, texts.apply(run, encoded, pooled, "test"), strict=True):
        (vectors,) = run.encode([text])
        np.testing.assert_allclose(mean, vectors.mean(axis=0), rtol=1e-4, atol=1e-5)
        row = predict.text_row(run.vocabulary, text, run.payload)
        whole = function(run.params, intact(run, row))[0]
        np.testing.assert_allclose(summary, whole, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_and_counted(causal):
    encoded = texts.tokenize(causal, ["object " * 60, "the", "the"])
    assert encoded.cut == [True, False, False]
    assert len(encoded.tokens[0]) == len(encoded.boundary[0]) == causal.payload
    sizes = lambda objective, rows, numbers: [row.tokens.shape[0] for row in rows]
    assert texts.apply(causal, encoded, sizes, "test") == [causal.payload, 5, 5]


def test_an_objective_that_cannot_be_shorter_is_the_runs_own(causal, trained):
    run = pretraining.load(trained["permutation_lm"])
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.objective.permutation_size = 16
    assert texts.shorten(dataclasses.replace(run, config=config), 9) == (
        run.objective,
        run.payload,
    )
    shorter, payload = texts.shorten(run, 9)
    assert payload == 9
    assert shorter is not run.objective


def test_progress_is_told_line_by_line(causal, capsys, monkeypatch):
    monkeypatch.setattr(texts, "AT_ONCE", 2)
    encoded = texts.tokenize(causal, ["the"] * 5)
    order = texts.apply(causal, encoded, lambda objective, rows, numbers: list(numbers), "title")
    assert order == [0, 1, 2, 3, 4]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"title: {count} of 5 texts" for count in (2, 4, 5)]
