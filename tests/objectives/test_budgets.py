"""How many tokens each count rule corrupts, at every length up to 1,024."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from objectives import selection

SIZE = 1024
EVERY_LENGTH = np.arange(SIZE + 1)
# BERT counts [CLS] and [SEP] in its lengths, a row does not.
FRAME = 2


def counts(rule, lengths, rate, predict_rate=1.0, copies=1, seed=0, size=SIZE, candidate=None):
    """(corrupted, predicted) [N, C] for N payload lengths; the rates are traced."""
    lengths = jnp.asarray(lengths, jnp.int32)
    if candidate is None:
        candidate = jnp.arange(size)[None] < lengths[:, None]
    keys = jax.random.split(jax.random.key(seed), lengths.shape[0])
    rates = jnp.float32(rate), jnp.float32(predict_rate)
    return [np.asarray(x) for x in batched_budgets(rule, copies, keys, candidate, lengths, *rates)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def batched_budgets(rule, copies, keys, candidate, lengths, rate, predict_rate):
    one = lambda key, candidate, length: selection.budgets(
        rule, key, candidate, length, rate, predict_rate, copies
    )
    return jax.vmap(one)(keys, candidate, lengths)


def test_exact_is_bert_on_worked_numbers():
    lengths = {3: 1, 5: 1, 10: 2, 30: 4, 50: 8, 64: 10, 70: 10, 90: 14, 128: 19, 256: 38, 512: 77}
    corrupted, _ = counts("exact", np.array(list(lengths)) - FRAME, 0.15)
    assert corrupted[:, 0].tolist() == list(lengths.values())


def test_exact_is_berts_formula_at_every_length():
    corrupted, predicted = counts("exact", EVERY_LENGTH, 0.15)
    formula = [min(n, max(1, round((n + FRAME) * 0.15))) for n in EVERY_LENGTH.tolist()]
    assert corrupted[:, 0].tolist() == formula
    assert predicted[:, 0].tolist() == formula


def test_exact_is_exact_arithmetic_at_every_rate_and_length():
    for percent in range(1, 101):
        rate = Fraction(percent, 100)
        corrupted, _ = counts("exact", EVERY_LENGTH, percent / 100)
        exact = [min(n, max(1, round((n + FRAME) * rate))) for n in EVERY_LENGTH.tolist()]
        assert corrupted[:, 0].tolist() == exact


def test_ceil_is_spanbert():
    corrupted, _ = counts("ceil", [100, 126, 510], 0.15)
    assert corrupted[:, 0].tolist() == [15, 19, 77]
    for percent in (7, 15, 40):
        corrupted, _ = counts("ceil", EVERY_LENGTH, percent / 100)
        exact = [math.ceil(n * Fraction(percent, 100)) for n in EVERY_LENGTH.tolist()]
        assert corrupted[:, 0].tolist() == exact


def test_stochastic_is_roberta(assert_binomial):
    corrupted, _ = counts("stochastic", [512 - FRAME] * 100_000, 0.15, size=510)
    assert set(corrupted[:, 0]) == {76, 77}
    assert_binomial(np.sum(corrupted == 77), 100_000, 0.8)


def test_stochastic_is_unbiased_at_every_length():
    draws = 1000
    lengths = np.repeat(EVERY_LENGTH[1:], draws)
    corrupted, _ = counts(
        "stochastic", lengths, 0.15, candidate=jnp.ones((len(lengths), 200), bool)
    )
    corrupted = corrupted.reshape(SIZE, draws)
    for length, row in zip(EVERY_LENGTH[1:].tolist(), corrupted, strict=True):
        floor, fraction = divmod(Fraction(15, 100) * (length + FRAME), 1)
        assert set(row) <= ({floor, floor + 1} if fraction else {floor})
    expected = float(Fraction(15, 100) * (SIZE * (SIZE + 1) // 2 + FRAME * SIZE))
    # A sum of SIZE x draws variables of variance at most 1/4.
    assert abs(corrupted.sum() / draws - expected) < 6.1 * math.sqrt(SIZE / 4 / draws)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_bernoulli_counts_are_binomial(rate, assert_binomial):
    rows, size = 20_000, 126
    corrupted, predicted = counts("bernoulli", [size] * rows, rate, size=size)
    assert (predicted == corrupted).all()
    corrupted = corrupted[:, 0]
    assert_binomial(corrupted.sum(), rows * size, rate)
    edges = np.unique(scipy.stats.binom.ppf(np.linspace(0.02, 0.98, 12), size, rate))
    cells = np.searchsorted(edges, corrupted)
    below = scipy.stats.binom.cdf(edges, size, rate)
    expected = np.diff(np.concatenate([[0], below, [1]])) * rows
    observed = np.bincount(cells, minlength=len(expected))
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-9


@pytest.mark.parametrize("rule", selection.COUNT_RULES)
@pytest.mark.parametrize("rate,copies", [(0.15, 3), (0.5, 2)])
def test_copies_share_out_the_candidates(rule, rate, copies):
    candidate = jnp.asarray(np.random.default_rng(0).random((SIZE + 1, SIZE)) < 0.8)
    candidate &= np.arange(SIZE)[None] < EVERY_LENGTH[:, None]
    corrupted, predicted = counts(rule, EVERY_LENGTH, rate, rate / 2, copies, candidate=candidate)
    available = np.asarray(candidate.sum(axis=1))
    assert (corrupted.sum(axis=1) <= available).all()
    assert (predicted <= corrupted).all()
    assert (predicted >= 0).all()
    alone, _ = counts(rule, EVERY_LENGTH, rate, rate / 2, 1, candidate=candidate)
    assert (corrupted[:, 0] == alone[:, 0]).all()


def test_every_bernoulli_copy_is_binomial(assert_binomial):
    corrupted, predicted = counts("bernoulli", [100] * 2000, 0.5, 0.2, copies=2, size=100)
    for copy in range(2):
        assert_binomial(corrupted[:, copy].sum(), 200_000, 0.5)
        assert_binomial(predicted[:, copy].sum(), 200_000, 0.2)
    assert (corrupted.sum(axis=1) == 100).all()


@pytest.mark.parametrize("rule", selection.COUNT_RULES)
def test_slots_hold_every_count(rule):
    sizes = np.repeat([1, 7, 125, 509], 300)
    for rate in (0.0001, 0.15, 0.4, 1.0):
        corrupted, _ = counts(rule, sizes, rate, size=509)
        for size in (1, 7, 125, 509):
            slots = selection.largest_budget(rule, rate, size)
            assert corrupted[sizes == size].max() <= slots <= size


def test_slots_of_worked_numbers():
    assert selection.largest_budget("exact", 0.15, 510) == 77
    assert selection.largest_budget("stochastic", 0.15, 510) == 77
    assert selection.largest_budget("ceil", 0.15, 100) == 15
    # 509 x .15 = 76.35, 6 sd = 6 x sqrt(64.8975) = 48.34
    assert selection.largest_budget("bernoulli", 0.15, 509) == 125
