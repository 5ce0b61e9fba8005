"""Words, and the exact distribution of what each unit selects.

Distributions are compared with enumerations of the published algorithms in plain Python, over every
random choice that they make, by exact binomial bounds with a false alarm once in 10^9.
"""

import collections
import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import selection
from objectives.selection import Words
from pretraining.data.row import Row


def words_of(sizes):
    """A row of words with these numbers of tokens; 0 stands for a separator."""
    word, region, candidate = [], [], []
    for number, size in enumerate(sizes):
        word += [number] * max(size, 1)
        region += [sizes[:number].count(0)] * max(size, 1)
        candidate += [size > 0] * max(size, 1)
    as_ints = lambda x: jnp.asarray(x, jnp.int32)
    numbers = np.unique(np.where(candidate, word, -1), return_inverse=True)[1]
    numbers = numbers - (0 in sizes)
    start = jnp.asarray(np.diff(numbers, prepend=-1) > 0)
    return Words(jnp.asarray(candidate), as_ints(numbers), as_ints(region), start)


def draw(unit, words, budget, draws, seed=0):
    """ranks [draws, T] of a unit for `draws` keys."""
    keys = jax.random.split(jax.random.key(seed), draws)
    run = lambda key, budget: unit(key, words, words.candidate, budget)
    ranks = jax.jit(jax.vmap(run, (0, None)))(keys, jnp.int32(budget))
    return np.asarray(ranks)


def frequencies(ranks):
    size = ranks.shape[1]
    return collections.Counter(tuple(np.flatnonzero(rank < size)) for rank in ranks)


def assert_distribution(observed, expected, assert_binomial):
    """`expected`: {outcome: probability}; every outcome within its binomial bounds."""
    assert math.isclose(sum(expected.values()), 1)
    assert set(observed) <= set(expected)
    for outcome, p in expected.items():
        assert_binomial(observed[outcome], observed.total(), float(p))


# ------------------------------------------------------------------------------------------- words


def test_words_begin_at_flags_row_starts_and_after_specials():
    # A row that starts inside a word; 3 is a separator; the last two tokens are not valid.
    row = Row(
        tokens=jnp.asarray([9, 9, 8, 3, 7, 7, 6, 5, 5]),
        length=jnp.int32(7),
        document=jnp.zeros(9, jnp.int32),
        boundary=jnp.asarray([0, 0, 1, 1, 0, 2, 3, 1, 1], jnp.uint8),
        index=jnp.int32(0),
        copy=jnp.int32(0),
    )
    words = selection.find_words(row, (0, 3))
    assert words.candidate.tolist() == [True] * 3 + [False] + [True] * 3 + [False] * 2
    kept = np.flatnonzero(words.candidate)
    assert words.word[kept].tolist() == [0, 0, 1, 2, 2, 3]
    assert words.region[kept].tolist() == [0, 0, 0, 1, 1, 1]


def test_runs_merge_overlapping_and_adjacent_spans():
    # SpanBERT's example: [2, 3], [4, 5], [7, 7] of 10 become [2, 5], [7, 7].
    chosen = jnp.asarray([0, 0, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    starts = selection.run_starts(chosen)
    assert starts[jnp.asarray([2, 3, 4, 5, 7])].tolist() == [2, 2, 2, 2, 7]
    assert selection.run_starts(jnp.asarray([1, 1, 0, 1], bool))[:2].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------- units


def test_every_set_of_tokens_is_equally_likely(assert_binomial):
    words = words_of([1, 1, 0, 1, 1, 1])
    ranks = draw(selection.tokens, words, 2, 50_000)
    sets = list(itertools.combinations([0, 1, 3, 4, 5], 2))
    expected = dict.fromkeys(sets, Fraction(1, len(sets)))
    assert_distribution(frequencies(ranks), expected, assert_binomial)
    for position in (0, 1, 3, 4, 5):
        assert_binomial(np.sum(ranks[:, position] == 0), 50_000, 1 / 5)


def test_every_position_of_a_long_row_is_as_likely(assert_binomial):
    ranks = draw(selection.tokens, words_of([1] * 509), 77, 4000)
    assert ((ranks < 509).sum(axis=1) == 77).all()
    for position in range(509):
        assert_binomial(np.sum(ranks[:, position] < 509), 4000, 77 / 509, alarm=1e-11)


def whole_word_outcomes(sizes, budget):
    """BERT's algorithm for every order of the words."""
    outcomes = collections.Counter()
    for order in itertools.permutations(range(len(sizes))):
        left, taken = budget, set()
        for word in order:
            if sizes[word] <= left:
                left -= sizes[word]
                taken.add(word)
        outcomes[tokens_in(sizes, taken)] += Fraction(1, math.factorial(len(sizes)))
    return outcomes


def tokens_in(sizes, taken):
    """The positions of the words `taken`."""
    starts = np.cumsum([0, *sizes])
    return tuple(itertools.chain(*(range(starts[w], starts[w + 1]) for w in sorted(taken))))


@pytest.mark.parametrize("sizes,budget", [([1, 2, 3, 1], 3), ([2, 2, 3], 3), ([4, 1, 1], 2)])
def test_whole_words_have_berts_distribution(sizes, budget, assert_binomial):
    ranks = draw(selection.whole_words, words_of(sizes), budget, 40_000)
    assert_distribution(frequencies(ranks), whole_word_outcomes(sizes, budget), assert_binomial)


def test_a_word_that_overflows_is_passed_over():
    # Of 8 and 1 tokens with a budget of 5, only the second fits, whatever the order.
    ranks = draw(selection.whole_words, words_of([8, 1]), 5, 50)
    assert frequencies(ranks) == {(8,): 50}


def ngram_outcomes(sizes, budget, longest=3):
    """ALBERT's algorithm for every order of the words and every n drawn."""
    law = [Fraction(1, n) for n in range(1, longest + 1)]
    law = [p / sum(law) for p in law]
    outcomes = collections.Counter()
    words = range(len(sizes))
    for order in itertools.permutations(words):
        for drawn in itertools.product(range(1, longest + 1), repeat=len(sizes)):
            p = math.prod(law[n - 1] for n in drawn) / math.factorial(len(sizes))
            outcomes[tokens_in(sizes, place_ngrams(sizes, order, drawn, budget))] += p
    return outcomes


def place_ngrams(sizes, order, drawn, budget):
    taken, used = set(), 0
    for word in order:
        gram = [w for w in range(word, word + drawn[word]) if w < len(sizes)]
        while gram and used + sum(sizes[w] for w in gram) > budget:
            gram.pop()
        if gram and not taken & set(gram):
            taken |= set(gram)
            used += sum(sizes[w] for w in gram)
    return taken


@pytest.mark.parametrize("sizes,budget", [([1, 1, 1, 1], 2), ([1, 2, 1, 2], 4), ([3, 1, 1], 3)])
def test_ngrams_have_alberts_distribution(sizes, budget, assert_binomial):
    ranks = draw(selection.ngrams, words_of(sizes), budget, 40_000)
    assert_distribution(frequencies(ranks), ngram_outcomes(sizes, budget), assert_binomial)


def test_first_ngrams_follow_the_published_law(assert_binomial):
    # One-token words and no budget to speak of: the first n-gram is as long as drawn.
    unit = functools.partial(selection.ngrams, longest=3)
    draws, size = 20_000, 200
    ranks = draw(unit, words_of([1] * size), 3, draws)
    lengths = first_run_lengths(ranks, size - 3)
    for n, p in enumerate((0.54545, 0.27273, 0.18182), start=1):
        # A second n-gram that happens to continue the first is a matter of 1 / size.
        low, high = p * (1 - 3 / size), p + 3 / size
        within(np.sum(lengths == n), len(lengths), low, high, assert_binomial)


def within(successes, trials, low, high, assert_binomial):
    rate = successes / trials
    assert_binomial(successes, trials, min(max(rate, low), high))


def first_run_lengths(ranks, last_start):
    """For rows whose first span starts at or before `last_start`: its length in one-token words."""
    lengths = []
    for rank in ranks:
        start = int(np.flatnonzero(rank == 0)[0])
        if start <= last_start:
            run = rank[start:] - np.arange(len(rank) - start)
            lengths.append(int(np.argmax(run != 0)))
    return np.array(lengths)


def span_outcomes(sizes, budget, probability, longest):
    """SpanBERT's algorithm, every anchor and length: {masked positions: probability}."""
    starts = np.cumsum([0, *(max(size, 1) for size in sizes)]).tolist()
    word_of = [w for w, size in enumerate(sizes) for _ in range(max(size, 1))]
    law = [Fraction(probability) * (1 - Fraction(probability)) ** n for n in range(longest)]
    law = [p / sum(law) for p in law]
    usable = [p for p in range(starts[-1]) if sizes[word_of[p]]]
    outcomes, open_ = collections.Counter(), {frozenset(): Fraction(1)}
    while open_:
        masked, p = open_.popitem()
        if len(masked) == budget:
            outcomes[tuple(sorted(masked))] += p
            continue
        free = [position for position in usable if position not in masked]
        for anchor, (ahead, p_length) in itertools.product(free, enumerate(law)):
            grown = set(masked)
            for word in range(word_of[anchor], word_of[anchor] + ahead + 1):
                if word == len(sizes) or not sizes[word]:
                    break
                for position in range(starts[word], starts[word + 1]):
                    if len(grown) < budget:
                        grown.add(position)
            key = frozenset(grown)
            open_[key] = open_.get(key, 0) + p * p_length / len(free)
    return outcomes


@pytest.mark.parametrize(
    "sizes,budget", [([1] * 5, 2), ([2, 1, 3], 3), ([1, 2, 0, 2, 1], 3), ([1, 3, 1, 1], 5)]
)
def test_spans_have_spanberts_distribution(sizes, budget, assert_binomial):
    unit = functools.partial(selection.spans, probability=0.25, longest=3)
    ranks = draw(unit, words_of(sizes), budget, 40_000)
    expected = span_outcomes(sizes, budget, 0.25, 3)
    assert_distribution(frequencies(ranks), expected, assert_binomial)


def test_realised_span_lengths_follow_the_renormalised_law(assert_binomial):
    law = (0.22406, 0.17925, 0.14340, 0.11472, 0.09177, 0.07342, 0.05874, 0.04699, 0.03759, 0.03007)
    size, draws = 1000, 8000
    lengths = first_run_lengths(draw(selection.spans, words_of([1] * size), 10, draws), size - 10)
    for n, p in enumerate(law, start=1):
        # A second span that happens to continue the first is a matter of 1 / size.
        within(
            np.sum(lengths == n), len(lengths), p * (1 - 2 / size), p + 2 / size, assert_binomial
        )
    assert abs(lengths.mean() - 3.797) < 5 * 2.65 / math.sqrt(len(lengths)) + 0.01


def test_merged_spans_as_in_the_published_simulation():
    """n = 510 one-piece words: always 77 masked, 19.6 merged spans of 4.00, 99.0 % inside."""
    chosen = draw(selection.spans, words_of([1] * 510), 77, 2000) < 510
    assert (chosen.sum(axis=1) == 77).all()
    starts = chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
    spans = starts.sum(axis=1)
    assert abs(spans.mean() - 19.6) < 0.05 + 4 * spans.std() / math.sqrt(2000)
    assert abs((77 / spans).mean() - 4.00) < 0.005 + 4 * (77 / spans).std() / math.sqrt(2000)
    inside = 1 - (chosen[:, 0].sum() + chosen[:, -1].sum()) / starts.sum()
    assert abs(inside - 0.990) < 0.003


# ------------------------------------------------------------------------------------------ copies

UNITS = {
    "token": selection.tokens,
    "whole_word": selection.whole_words,
    "span": selection.spans,
    "ngram": selection.ngrams,
}


@pytest.mark.parametrize("name", UNITS)
def test_copies_take_disjoint_tokens(name):
    words = words_of([1, 2, 0, 3, 1, 1, 2, 0, 4, 1, 1, 1, 2] * 4)
    budget = jnp.asarray([9, 9, 9], jnp.int32)
    select = functools.partial(selection.select, UNITS[name])
    for_copies = jax.vmap(select, (None, None, None, 0))
    run = jax.jit(jax.vmap(for_copies, (0, None, None, None)))
    ranks = np.asarray(run(jax.random.split(jax.random.key(0), 20), words, budget, jnp.arange(3)))
    chosen = ranks < ranks.shape[2]
    assert (chosen.sum(axis=1) <= 1).all()
    assert not (chosen & ~np.asarray(words.candidate)).any()
    taken = chosen.sum(axis=2)
    assert (taken == 9).all() if name in ("token", "span") else (taken <= 9).all()
    for rank, number in zip(ranks.reshape(60, -1), taken.reshape(60), strict=True):
        assert sorted(rank)[:number] == list(range(number))
    alone = draw(UNITS[name], words, 9, 20)
    assert (ranks[:, 0] == alone).all()


def test_copies_are_slices_of_one_permutation():
    words = words_of([1] * 50)
    key = jax.random.key(3)
    whole = np.asarray(selection.tokens(key, words, words.candidate, jnp.int32(30)))
    for copy in range(3):
        budget = jnp.full(3, 10, jnp.int32)
        rank = np.asarray(selection.select(selection.tokens, key, words, budget, jnp.int32(copy)))
        expected = np.where(whole // 10 == copy, whole % 10, 50)
        assert (rank == np.where(whole < 30, expected, 50)).all()


@pytest.mark.parametrize("name", UNITS)
def test_nothing_is_taken_without_budget_or_candidates(name):
    words = words_of([1, 2, 1])
    unit, key = UNITS[name], jax.random.key(0)
    assert (np.asarray(unit(key, words, words.candidate, jnp.int32(0))) == 4).all()
    nothing = words._replace(candidate=jnp.zeros(4, bool))
    assert (np.asarray(unit(key, nothing, nothing.candidate, jnp.int32(0))) == 4).all()
