"""Dropout: its rate, and that a hash of places is random enough for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pretraining.models.dropout import dropout, hashed_bits

KEY = jax.random.key(3)


def bounds(n, p):
    """What a binomial count leaves once in 10^9 draws."""
    return stats.binom.ppf(0.5e-9, n, p), stats.binom.isf(0.5e-9, n, p)


def assert_share(hits, p):
    low, high = bounds(hits.size, p)
    assert low <= hits.sum() <= high


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.001])
@pytest.mark.parametrize("shape", [(200_500,), (400, 501), (4, 10, 50, 101)])
def test_dropout_zeroes_the_share_and_scales_the_rest(rate, shape):
    out = np.asarray(dropout(jnp.full(shape, 3.0), rate, KEY))
    assert_share(out == 0, rate)
    np.testing.assert_allclose(out[out != 0], 3 / (1 - rate), rtol=1e-6)
    for half in np.array_split(out, 2, axis=-1):
        assert_share(half == 0, rate)


def test_the_mean_stays_in_16_bits():
    """A scale rounded to 16 bits (1.109 for 1 / .9) would take .16 % off every activation."""
    x = 1 + jax.random.uniform(KEY, (2000, 1000))
    out = dropout(x.astype(jnp.bfloat16), 0.1, KEY)
    assert out.dtype == jnp.bfloat16
    assert abs(float(out.astype(jnp.float32).mean() / x.mean()) - 1) < 1e-3  # sd 2.4e-4


def test_the_gradient_is_dropped_where_the_value_is_and_nothing_of_the_mask_is_kept():
    x = jnp.ones((30, 40))
    out, back = jax.vjp(lambda x: dropout(x, 0.3, KEY), x)
    np.testing.assert_array_equal(back(x)[0], out)  # both of ones
    kept = sum(leaf.size for leaf in jax.tree.leaves(back))
    assert kept <= 2, "the words of the key alone"


def test_dropout_without_key_or_rate_changes_nothing():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, KEY), x)
    assert (np.asarray(dropout(x + 1, 0.5, KEY)) != np.asarray(x + 1)).any()


def mix(word):
    """`lowbias32` of hash-prospector, in Python's integers."""
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    return word ^ word >> 16


def test_the_masks_are_frozen():
    """A run that goes on drops what it would have dropped."""
    first, second = 0xF29A4FA7, 0xFA843692  # of threefry (key 0, counters 0 and 1), by hand too
    expected = [[mix(c ^ mix(r ^ first)) ^ mix(r ^ second) for c in range(3)] for r in range(2)]
    assert expected == [[976474711, 1669806109, 513065799], [1156355624, 1731428790, 4162741383]]
    key = jax.random.key(0)
    assert hashed_bits(key, (2, 3)).tolist() == expected
    out = dropout(jnp.ones((2, 3)), 0.25, key)  # 2^30 = 1073741824 draws of 2^32
    np.testing.assert_allclose(out, [[0, 4 / 3, 0], [4 / 3] * 3], rtol=1e-6)


@pytest.mark.parametrize("rate", [1 - 2**-34, 1 - 1e-12])
def test_a_rate_next_to_one_keeps_next_to_nothing(rate):
    np.testing.assert_array_equal(dropout(jnp.ones(1000), rate, KEY), np.zeros(1000))


def pairs():
    """Words [n] and those that must not depend on them: neighbours, and those of related keys."""
    shape = (16, 64, 256)
    words = np.asarray(hashed_bits(KEY, shape))
    for axis in range(3):
        for distance in (1, 2, 64):
            if distance < shape[axis]:
                yield f"axis {axis}, {distance} apart", words, np.roll(words, distance, axis)
    for name, key in {
        "next key": jax.random.key(4),
        "next layer": jax.random.fold_in(KEY, 1),
        "another layer": jax.random.fold_in(KEY, 2),
    }.items():
        yield name, words, np.asarray(hashed_bits(key, shape))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_is_dropped_does_not_tell_what_else_is(rate):
    dropped = lambda words: words < np.uint32(rate * 2**32)
    count = 0
    for name, words, others in pairs():
        both = dropped(words) & dropped(others)
        low, high = bounds(both.size, rate**2)
        assert low <= both.sum() <= high, name
        count += 1
    assert count == 10


def test_every_bit_is_even_and_independent_of_every_other():
    words = np.asarray(hashed_bits(KEY, (500, 400))).ravel()
    bits = (words[:, None] >> np.arange(32)) & 1
    for bit in bits.T:
        assert_share(bit, 0.5)
    together = bits.T.astype(np.float64) @ bits
    low, high = bounds(len(bits), 0.25)
    apart = together[~np.eye(32, dtype=bool)]
    assert low <= apart.min()
    assert apart.max() <= high


def test_bytes_occur_alike():
    words = np.asarray(hashed_bits(KEY, (64, 128, 128))).ravel()
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-9


def test_rows_do_not_repeat_each_other_in_other_places():
    """Two rows of 256 share a word by chance once in 2^16 pairs, three words once in 10^15."""
    words = np.asarray(hashed_bits(KEY, (65_536, 256))).ravel()
    order = np.argsort(words)
    again = words[order][1:] == words[order][:-1]
    pairs = np.sort(np.stack([order[1:][again], order[:-1][again]]) // 256, axis=0)
    shared = np.unique(pairs, axis=1, return_counts=True)[1]
    assert len(shared) > 30_000
    assert shared.max() < 3


def test_rows_drop_as_many_as_independent_draws_do():
    dropped = np.asarray(hashed_bits(KEY, (4096, 256))) < np.uint32(0.5 * 2**32)
    signs = 1.0 - 2.0 * dropped
    agree = signs @ signs.T
    np.fill_diagonal(agree, 0)
    assert np.abs(agree).max() < 256 * 0.5  # 8 sd; 8.4 M pairs
    counts = dropped.sum(axis=1)
    spread = counts.var(ddof=1) / (256 / 4) * (len(counts) - 1)
    assert 1e-9 < stats.chi2.cdf(spread, len(counts) - 1) < 1 - 1e-9


def test_a_place_draws_the_same_under_vmap_and_in_jit():
    keys = jax.random.split(KEY, 3)
    one_by_one = np.stack([hashed_bits(key, (5, 6, 7)) for key in keys])
    at_once = jax.jit(jax.vmap(lambda key: hashed_bits(key, (5, 6, 7))))(keys)
    np.testing.assert_array_equal(at_once, one_by_one)


def test_rows_are_told_apart_in_every_dimension():
    words = np.asarray(hashed_bits(KEY, (3, 4, 5, 6)))
    assert len(np.unique(words)) == words.size
    flat = np.asarray(hashed_bits(KEY, (60, 6)))
    np.testing.assert_array_equal(words.reshape(60, 6), flat)
