"""Which tokens of a row are corrupted: how many (the count rules), and which (the units).

Everything here is for ONE row and has static shapes. Letters: T payload tokens of a row, C copies
of it (`data.copies`).

A unit is a function `(key, words, free [T] bool, budget) -> rank [T]`: it takes at most `budget` of
the free tokens, and says in which order: rank 0 was taken first, rank T means not taken. All its
draws are made ahead, one or two uniforms for every position, so that none depends on the budget.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pretraining.data.row import WORD_START, Row

# [CLS] and [SEP], which BERT and RoBERTa count in the length that the rate multiplies.
FRAME = 2
# Rates are taken to the nearest 1 / GRID, so that counting is done in integers: in float32,
# .15 x 100 is above 15.
GRID = 10_000


class Words(NamedTuple):
    """Where the words of a row are.

    Attributes:
      candidate: [T] bool, may be corrupted: valid and not special.
      word: [T] int32, number of the token's word in the row; of no meaning where not a candidate.
      region: [T] int32, equal for candidates with no special token between them.
      start: [T] bool, a word begins here; of no meaning where not a candidate.
    """

    candidate: jax.Array
    word: jax.Array
    region: jax.Array
    start: jax.Array


def find_words(row: Row, special_ids: tuple[int, ...]) -> Words:
    """A word begins at a token with the WORD_START bit, at the row's first, and after a special."""
    valid = jnp.arange(row.tokens.shape[0]) < row.length
    special = jnp.isin(row.tokens, jnp.asarray(special_ids, jnp.int32))
    candidate = valid & ~special
    begins = ((row.boundary & WORD_START) > 0) | _shift(special, True)
    word = jnp.cumsum(candidate & begins) - 1
    return Words(candidate, word.astype(jnp.int32), jnp.cumsum(~candidate), begins)


def run_starts(chosen: jax.Array) -> jax.Array:
    """[T] int32: for each position of a run of consecutive True, the position of the run's first.

    Overlapping and adjacent spans are one run, as in SpanBERT's merge_intervals.
    """
    first = chosen & ~_shift(chosen, False)
    return jax.lax.cummax(jnp.where(first, jnp.arange(chosen.shape[0]), 0))


def _shift(x, first):
    """[first, x_0, ..., x_(T-2)]."""
    return jnp.roll(x, 1).at[0].set(first)


# ---------------------------------------------------------------------------------------- how many


def _half_even(product):
    """product / GRID, rounded to the nearest integer, halves to the even one."""
    whole, rest = product // GRID, product % GRID
    return whole + (2 * rest + whole % 2 + GRID - 1) // (2 * GRID)


# (rate x GRID, payload length, integer draw from [0, GRID)) -> count
_RULES = {
    "exact": lambda rate, length, draw: _half_even(rate * (length + FRAME)),
    "ceil": lambda rate, length, draw: (rate * length + GRID - 1) // GRID,
    "stochastic": lambda rate, length, draw: (rate * (length + FRAME) + draw) // GRID,
}
COUNT_RULES = (*_RULES, "bernoulli")


def budgets(
    rule: str,
    key: jax.Array,
    candidate: jax.Array,
    length: jax.Array,
    rate: jax.Array,
    predict_rate: jax.Array,
    copies: int,
) -> tuple[jax.Array, jax.Array]:
    """How many tokens each copy of a row corrupts, and how many of those it predicts: [C] each.

    All copies together never exceed the candidates; the first ones are served first.

    Rules:
      exact: max(1, rate x length with [CLS] and [SEP], halves to even) (BERT,
        create_pretraining_data.py). Departure: in integers, so a half is a half; Python's float
        product, which BERT rounds, misses some (.07 x 150), but none of .15's.
      ceil: the payload's length alone, rounded up (SpanBERT, masking.py).
      stochastic: rounded up with the probability of the fraction, length with [CLS] and [SEP]
        (RoBERTa, fairseq/data/mask_tokens_dataset.py).
      bernoulli: one draw for each candidate (DataCollatorForLanguageModeling of transformers); the
        count is binomial. With a unit larger than a token it is the budget of the units.

    Args:
      candidate: [T] bool.
      length: [] int32, valid tokens of the payload, its separators included.
      rate: [] share of the tokens that is corrupted; may be traced.
      predict_rate: [] share that is predicted; `rate` or more means all that is corrupted.
      copies: C.
    """
    rate = _on_grid(rate)
    predict_rate = jnp.minimum(_on_grid(predict_rate), rate)
    number = jnp.arange(copies)
    if rule == "bernoulli":
        draw = jax.random.randint(key, (1, candidate.shape[0]), 0, GRID)
        above = candidate[None] & (draw >= (rate * number)[:, None])
        within = lambda width: jnp.sum(above & (draw < (rate * number + width)[:, None]), axis=1)
        return within(rate), within(predict_rate)
    draw = jax.random.randint(key, (), 0, GRID)
    least = 1 if rule == "exact" else 0
    count = lambda rate: jnp.maximum(least, _RULES[rule](rate, length, draw))
    corrupted = jnp.clip(candidate.sum() - number * count(rate), 0, count(rate))
    return corrupted, jnp.minimum(corrupted, count(predict_rate))


def largest_budget(rule: str, rate: float, size: int) -> int:
    """The static number of slots for the targets of rows of at most `size` tokens.

    A binomial count has no bound below `size`: it gets its mean and 6 standard deviations.
    """
    if rule == "bernoulli":
        return min(size, int(np.ceil(rate * size + 6 * np.sqrt(rate * (1 - rate) * size))))
    count = _RULES[rule](round(rate * GRID), size, GRID - 1)
    return min(size, max(1, count))


def _on_grid(rate):
    return jnp.round(rate * GRID).astype(jnp.int32)


# ------------------------------------------------------------------------------------------- which


def select(unit: Callable, key: jax.Array, words: Words, budget, copy) -> jax.Array:
    """The tokens that one copy of a row takes.

    The copies share the key and hence one order; each continues where the one before has stopped,
    so that their tokens are disjoint.

    Args:
      unit: one of the functions below.
      budget: [C] int32, of every copy.
      copy: [] int32, which copy this is.

    Returns:
      rank [T] int32, see the top of this file.
    """
    size = words.word.shape[0]
    free, chosen = words.candidate, jnp.full(size, size, jnp.int32)
    for number in range(budget.shape[0]):
        rank = unit(key, words, free, budget[number])
        chosen = jnp.where(copy == number, rank, chosen)
        free &= rank == size
    return chosen


def tokens(key: jax.Array, words: Words, free: jax.Array, budget: jax.Array) -> jax.Array:
    """Single tokens, each set of them equally likely."""
    size = free.shape[0]
    order = jnp.argsort(jnp.where(free, jax.random.uniform(key, (size,)), jnp.inf))
    rank = jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size, dtype=jnp.int32))
    return jnp.where(rank < budget, rank, size)


def spans(
    key: jax.Array,
    words: Words,
    free: jax.Array,
    budget: jax.Array,
    probability: float = 0.2,
    longest: int = 10,
) -> jax.Array:
    """Spans of whole words with geometric lengths (Joshi et al. 2020, section 3.1; masking.py).

    Again and again: a free token drawn uniformly is the anchor (walking through one random order of
    all tokens and passing over those taken since is the same as drawing and rejecting). The span
    begins where the anchor's word does and covers as many words as were drawn; tokens taken before
    count as words of it, but not in the budget. The last span is cut where the budget ends, even
    inside a word. A span ends with its document: SpanBERT's blocks hold only one.

    Args:
      probability: p of the law p (1 - p)^(n - 1), renormalised over n = 1..longest.
    """
    size = free.shape[0]
    order_key, length_key = jax.random.split(key)
    order = jax.random.uniform(order_key, (size,))
    law = (1 - probability) ** np.arange(longest)
    length = 1 + draw(length_key, size, law)

    def place(state):
        count, rank = state
        open_ = free & (rank == size)
        anchor = jnp.argmin(jnp.where(open_, order, jnp.inf))
        ahead = words.word - words.word[anchor]
        covered = (words.region == words.region[anchor]) & (ahead >= 0) & (ahead < length[anchor])
        new = open_ & covered
        turn = count - 1 + jnp.cumsum(new)
        new &= turn < budget
        return count + new.sum(), jnp.where(new, turn, rank)

    start = jnp.zeros((), jnp.int32), jnp.full(size, size, jnp.int32)
    return jax.lax.while_loop(lambda state: state[0] < budget, place, start)[1]


def ngrams(
    key: jax.Array, words: Words, free: jax.Array, budget: jax.Array, longest: int = 3
) -> jax.Array:
    """N-grams of whole words, n = 1..longest with probability proportional to 1 / n (Lan et al.
    2020, section 3.1; albert/create_pretraining_data.py).

    The words of the row are tried as beginnings in random order. An n-gram larger than what is left
    of the budget is shortened word by word, and given up if one word is still too large; one that
    meets a word already taken is given up. So fewer tokens than the budget may be taken. N-grams
    may span a separator, as ALBERT's do. Departure: n comes from the same seed as all else.
    """
    size = free.shape[0]
    order_key, n_key = jax.random.split(key)
    number = jnp.arange(size)
    lengths = jnp.zeros(size, jnp.int32).at[words.word].add(words.candidate.astype(jnp.int32))
    # Tokens before each word; the words past the last one are empty.
    before = jnp.pad(jnp.pad(jnp.cumsum(lengths), (1, 0)), (0, longest), mode="edge")
    order = jnp.argsort(jnp.where(lengths > 0, jax.random.uniform(order_key, (size,)), jnp.inf))
    drawn = 1 + draw(n_key, size, 1 / np.arange(1, longest + 1))
    taken = jnp.zeros(size, bool).at[words.word].max(words.candidate & ~free)
    n = jnp.arange(1, longest + 1)

    def place(state):
        tried, count, offset = state
        first = order[tried]
        sizes = jax.lax.dynamic_slice(before, (first + 1,), (longest,)) - before[first]
        fitting = jnp.max(jnp.where((n <= drawn[first]) & (sizes <= budget - count), n, 0))
        new = (number >= first) & (number < first + fitting)
        new &= ~jnp.any(new & (taken | (offset < size)))
        offset = jnp.where(new, count - before[first], offset)
        return tried + 1, count + jnp.sum(jnp.where(new, lengths, 0)), offset

    last = jnp.sum(lengths > 0)
    unfinished = lambda state: (state[1] < budget) & (state[0] < last)
    zero = jnp.zeros((), jnp.int32)
    offset = jax.lax.while_loop(unfinished, place, (zero, zero, jnp.full(size, size, jnp.int32)))[2]
    rank = offset[words.word] + jnp.cumsum(words.candidate, dtype=jnp.int32) - 1
    return jnp.where(words.candidate & (offset[words.word] < size), rank, size)


def whole_words(key: jax.Array, words: Words, free: jax.Array, budget: jax.Array) -> jax.Array:
    """Whole words in random order (BERT, create_pretraining_data.py, do_whole_word_mask).

    A word larger than what is left of the budget is passed over, so that fewer tokens than the
    budget may be taken.
    """
    return ngrams(key, words, free, budget, longest=1)


def draw(key, size, law):
    """[size] int32, independent draws from 0..len(law)-1 with probabilities proportional to law."""
    edges = np.cumsum(law / np.sum(law))[:-1].astype(np.float32)
    uniform = jax.random.uniform(key, (size, 1))
    return jnp.sum(uniform >= edges[None], axis=1, dtype=jnp.int32)
