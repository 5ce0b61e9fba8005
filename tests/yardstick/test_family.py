"""Figures of a run's own predictions, against plain loops and the run's own evaluation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

import pretraining
from pretraining import metrics, predict
from pretraining.data import prepare
from pretraining.yardstick import family


def stores(run):
    return prepare.prepare_validation(run.config, run.vocabulary).validation


def rows(run, count):
    ((store, _),) = stores(run)
    batch = store.validation.read(range(count), run.payload)
    return [type(batch)(*(field[i] for field in batch)) for i in range(count)]


def test_positions_depend_on_the_number_of_the_row_alone(causal):
    """Another text of the same length has the same positions, another row has others."""
    skip = causal.vocabulary.special_ids
    row = rows(causal, 1)[0]
    tokens = np.full(causal.payload, 20, np.int32)
    row = row._replace(tokens=tokens, length=np.int32(causal.payload))
    chosen = [family.positions(row, (0, number), skip) for number in range(200)]
    assert {len(found) for found in chosen} == {4}  # 15 % of 29 = 4.35
    other = row._replace(tokens=tokens + 3)
    np.testing.assert_array_equal(family.positions(other, (0, 7), skip), chosen[7])
    assert len({tuple(found) for found in chosen}) > 190
    assert len({tuple(family.positions(row, (source, 7), skip)) for source in range(9)}) == 9
    counts = np.bincount(np.concatenate(chosen), minlength=causal.payload)
    assert counts.min() > 0  # of 800 draws of 29 positions, 27.6 each
    assert counts.max() < 60


def test_special_tokens_and_padding_are_never_chosen(causal):
    skip = causal.vocabulary.special_ids
    row = rows(causal, 1)[0]
    tokens = np.where(np.arange(causal.payload) % 2, 20, causal.vocabulary.eos).astype(np.int32)
    for length, count in ((29, 2), (10, 1), (2, 1), (1, 0), (0, 0)):
        some = row._replace(tokens=tokens, length=np.int32(length))
        for number in range(20):
            chosen = family.positions(some, (0, number), skip)
            assert len(chosen) == count
            assert (chosen % 2 == 1).all()
            assert (chosen < length).all()


def test_masked_loss_and_pseudo_perplexity_are_those_of_a_plain_loop(trained):
    run = pretraining.load(trained["masked_lm"])
    skip, losses, alone = run.vocabulary.special_ids, [], []
    ask = lambda row, places: predict.log_probs(run.objective, run.params, [row], places)[0]
    for number, row in enumerate(rows(run, 3)):
        chosen = family.positions(row, (0, number), skip)
        values = ask(row, chosen[None])
        losses += [-values[i, row.tokens[p]] for i, p in enumerate(chosen)]
        if number < 2:
            plain = [p for p in range(row.length) if row.tokens[p] not in skip]
            alone += [-ask(row, np.array([[p]]))[0, row.tokens[p]] for p in plain]
    figures = family.measure(run, stores(run), family.Sample(3, 2))
    assert figures == {
        "masked_loss": pytest.approx(np.mean(losses), rel=1e-5),
        "pseudo_perplexity": pytest.approx(math.exp(np.mean(alone)), rel=1e-5),
    }


def test_bits_per_byte_are_those_of_the_runs_evaluation(causal, trained):
    """Which reads the same 16 rows."""
    last = metrics.read(trained["causal_lm"] / metrics.FILE)[-1]
    figures = family.measure(causal, stores(causal), family.Sample(16, 1))
    assert figures == {"bits_per_byte": pytest.approx(last["eval/bits_per_byte"], rel=1e-5)}


def test_which_figures_a_run_has(run):
    figures = family.measure(run, stores(run), family.Sample(2, 1))
    expected = {"masked_loss", "pseudo_perplexity"}
    if run.objective.context == "left":
        expected = {"bits_per_byte"}
    if run.objective.family == "detection":
        expected = {"generator_masked_loss", "generator_pseudo_perplexity"}
    assert set(figures) == expected
    assert all(0 < value < 1000 for value in figures.values())


def test_of_no_family_no_figure():
    objective = SimpleNamespace(query=1, log_probs=1, family="", context="both", predictor="")
    assert family.measure(SimpleNamespace(objective=objective), (), family.SAMPLES["quick"]) == {}


def test_positions_are_those_of_all_versions():
    """Three rows of 20 tokens, of which every fifth is special; 15 % of 16 = 2.4."""
    tokens = np.where(np.arange(20) % 5, 9, 3).astype(np.int32)
    row = predict.make_row(tokens, np.zeros(20), 20)
    chosen = [family.positions(row, number, (3,)).tolist() for number in ((0, 0), (0, 1), (1, 0))]
    assert chosen == [[3, 14], [4, 13], [1, 7]]
