"""Which tokens are targets, and the order of a row; test_permutation_lm.py has the rest.

originals/xlnet.npz holds what XLNet's own functions did, see originals/xlnet.py.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import permutation, permutation_lm
from pretraining.models.attention import Attention, visible

SEP = 3
XLNET = {
    "data.sequence_length": 512,
    "objective.permutation_size": 256,
    "objective.backward_fraction": 0.5,
}


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("permutation_lm", **overrides)
        return config, permutation_lm.build(config, vocabulary)

    return make


@pytest.fixture(scope="module")
def original():
    return np.load(pathlib.Path(__file__).parent / "originals" / "xlnet.npz")


# ------------------------------------------------------------------------------------ who sees whom


def blocked(rank, positions=None):
    """[L or K, L] bool of one row, from the description that attention gets."""
    rank = jnp.asarray(rank)[None]
    positions = None if positions is None else jnp.asarray(positions)[None]
    return ~np.asarray(visible(Attention(rank=rank), rank.shape[1], positions))[0, 0]


def columns(mask):
    return [np.flatnonzero(row).tolist() for row in mask]


def test_a_permutation_worked_out_by_hand():
    """6 tokens, of which 2 and 4 are targets and 5 is functional."""
    place = jnp.asarray([[3, 0, 4, 1, 2, 5]])
    target = jnp.asarray([[False, False, True, False, True, False]])
    candidate = jnp.asarray([[True] * 5 + [False]])
    rank = permutation.ranks(place, target, candidate)[0]
    assert rank.tolist() == [-1, -1, 4, -1, 2, 5]
    # Of the original's perm_mask: rows 0, 1, 3 -> 2 4 5; 2 -> 2 5; 4 -> 2 4 5; 5 -> none.
    assert columns(blocked(rank, [2, 4])) == [[2, 5], [2, 4, 5]]
    everyone = [2, 4, 5]
    assert columns(blocked(rank)) == [everyone, everyone, [5], everyone, [2, 5], []]


def test_perm_masks_equal_the_original_ones(original):
    """Two halves, the first of which sees nothing of the second, which sees all of the first."""
    seen = set()
    for row in range(len(original["inputs"])):
        functional = np.isin(original["inputs"][row], [3, 4])
        target = original["is_masked"][row] & ~functional
        np.testing.assert_array_equal(target, original["target_mask"][row])
        place = jnp.asarray(original["index"][row], jnp.int32)
        rank = permutation.ranks(place, jnp.asarray(target), jnp.asarray(~functional))
        first, second = original["perm_mask"][row].astype(bool)
        whole = np.block([[first, np.ones_like(first)], [np.zeros_like(first), second]])
        content = whole & ~np.eye(16, dtype=bool)
        np.testing.assert_array_equal(blocked(rank.reshape(-1)), content)
        at = np.flatnonzero(target)
        np.testing.assert_array_equal(blocked(rank.reshape(-1), at), whole[at])
        seen |= set(zip(target.reshape(-1), functional.reshape(-1), strict=True))
    assert len(seen) == 3
    # The target is the token itself.
    np.testing.assert_array_equal(original["new_targets"], original["inputs"])


# -------------------------------------------------------------------------------------- the targets


def draws(config, starts, runs, backward=False, goal=None):
    """[runs, P] bool: targets of a row in which every token may be one."""
    starts, size = jnp.asarray(starts), len(starts)
    everyone = jnp.ones(size, bool)

    def one(key):
        if goal is not None:
            return permutation.ngrams(config.objective, key, starts, everyone, size, goal)
        valid, turned = jnp.int32(size), jnp.asarray(backward)
        return permutation.draw(config, key, starts, everyone, valid, turned)[0]

    keys = jax.random.split(jax.random.key(1), runs)
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def run_lengths(masks, longest=10):
    """[runs, longest]: how many runs of 1, 2, ... there are, the last one of all longer ones."""
    edges = np.diff(np.pad(masks.astype(int), ((0, 0), (1, 1))))
    row, begin = np.nonzero(edges == 1)
    length = np.minimum(np.nonzero(edges == -1)[1] - begin, longest)
    return np.stack([np.bincount(row[length == n], minlength=len(masks)) for n in range(1, 11)], 1)


@pytest.mark.parametrize("case", ["pieces", "reversed", "dense", "words"])
def test_draws_are_distributed_as_the_original_ones(make_config, original, case):
    """As often at each position, and as many runs of each length. "words" is the original with its
    slip mended, and without a number of targets, which that would miss."""
    runs, starts = int(original["runs"]), original["starts"]
    goal = {"pieces": 11, "reversed": 11, "dense": 20, "words": None}[case]
    alpha, beta = (5, 2) if case == "dense" else (6, 1)
    config = make_config(
        "permutation_lm",
        **{
            "data.sequence_length": 64,
            "objective.predict_fraction": (goal or 1) / 64,
            "objective.mask_alpha": alpha,
            "objective.mask_beta": beta,
            "objective.ngram_unit": "words" if case == "words" else "pieces",
        },
    )
    masks = draws(config, starts, runs, case == "reversed", 64 if goal is None else None)
    theirs = original[f"{case}_masked"] / runs
    ours = masks.mean(axis=0)
    share = np.clip((ours + theirs) / 2, 1 / runs, 1 - 1 / runs)
    deviation = (ours - theirs) / np.sqrt(2 * share * (1 - share) / runs)
    assert np.abs(deviation).max() < 5  # of 64 standard normals
    lengths = run_lengths(masks)
    sd = np.maximum(original[f"{case}_sd"], 1 / math.sqrt(runs))
    deviation = (lengths.mean(axis=0) - original[f"{case}_mean"]) / (sd * math.sqrt(2 / runs))
    assert np.abs(deviation).max() < 5
    if goal is not None:
        assert set(masks.sum(axis=1)) == {goal} == set(np.flatnonzero(original[f"{case}_counts"]))


def first_runs(masks):
    """The length of the first n-gram of each draw: contexts keep n-grams apart."""
    begin = masks.argmax(axis=1)
    after = np.arange(masks.shape[1])[None] >= begin[:, None]
    return np.argmax(after & ~masks, axis=1) - begin


@pytest.mark.parametrize("unit", ["words", "pieces"])
def test_n_grams_are_of_words_or_of_pieces(make_config, assert_binomial, unit):
    """P(n) is proportional to 1 / n: mean 2.1898 of n = 1..5. Words have 3 pieces here."""
    config = make_config("permutation_lm", **{"objective.ngram_unit": unit})
    starts, runs = np.arange(240) % 3 == 0, 20_000
    masks = draws(config, starts, runs, goal=240)
    assert starts[masks.argmax(axis=1)].all()
    length = first_runs(masks)
    n, rest = np.divmod(length, 3 if unit == "words" else 1)
    assert not rest.any()
    for size, p in enumerate([0.43796, 0.21898, 0.14599, 0.10949, 0.08759], start=1):
        assert_binomial((n == size).sum(), runs, p)
    # sd 1.332, so that 5 standard errors are .047
    assert n.mean() == pytest.approx(2.1898, abs=0.047)


def test_an_n_gram_stands_anywhere_in_its_context(make_config, assert_binomial):
    """One-piece words, n = 1, alpha / beta = 4: what precedes it is 0..3, what follows it 4..1."""
    config = make_config(
        "permutation_lm",
        **{"objective.ngram_longest": 1, "objective.mask_alpha": 9, "objective.mask_beta": 2},
    )
    masks = draws(config, np.ones(64, bool), 5000, goal=2)
    places = np.argsort(~masks, axis=1, kind="stable")[:, :2]
    for left in range(4):
        assert_binomial((places[:, 0] == left).sum(), 5000, 1 / 4)
        # The next context begins at place 5.
        assert_binomial((places[:, 1] == 5 + left).sum(), 5000, 1 / 4)


def test_xlnet_predicts_85_of_512(build, make_rows, corrupt):
    """43 in the first half and 42 in the second; shorter rows by their share."""
    _, objective = build(**XLNET)
    config = build(**XLNET)[0]
    lengths = [509] * 12 + [300, 254, 100, 3, 1, 0]
    rows = make_rows(config, lengths, separators=False)
    examples = corrupt(objective, rows)
    assert examples.positions.shape == (18, 85)
    used = np.asarray(examples.weights) > 0
    first = (used & (np.asarray(examples.positions) < 256)).sum(axis=1)
    assert first[:12].tolist() == [43] * 12
    assert used.sum(axis=1)[:12].tolist() == [85] * 12
    # Of length + 2 positions: 302 / 6 = 50.3, 256 / 6 = 42.7, 102 / 6 = 17, 5 / 6, 3 / 6, 2 / 6.
    assert used.sum(axis=1)[12:].tolist() == [50, 43, 17, 1, 0, 0]
    assert set(np.asarray(examples.backward).tolist()) == {False, True}


def test_functional_tokens_are_never_targets(build, make_rows, corrupt):
    """Half of the tokens are separators; the number is met as long as there are candidates."""
    config, objective = build(**{"objective.predict_fraction": 0.4, "objective.mask_alpha": 1})
    rows = make_rows(config, [32] * 200, separators=False)
    special = np.random.default_rng(0).random((200, 32)) < 0.5
    special[0], special[1, 3:] = True, True
    rows = rows._replace(tokens=jnp.where(special, SEP, rows.tokens))
    examples = corrupt(objective, rows)
    assert examples.positions.shape == (200, 14)  # .4 x 34 = 13.6
    used = np.asarray(examples.weights) > 0
    candidates = (~special).sum(axis=1)
    np.testing.assert_array_equal(used.sum(axis=1), np.minimum(14, candidates))
    assert (np.asarray(examples.labels)[used] >= 5).all()


def test_the_last_of_the_permutation(build, make_rows, corrupt, assert_binomial):
    """Every set of tokens is as likely. A functional token is not among the last 6 candidates and
    itself but with probability 6 / 33, where it comes after the first target."""
    config, objective = build(**{"objective.select": "last"})
    runs = 4000
    examples = corrupt(objective, make_rows(config, [32] * runs, separators=False))
    positions, rank = np.asarray(examples.positions), np.asarray(examples.rank)
    assert (np.asarray(examples.weights) == 1).all()
    assert positions.shape == (runs, 6)
    hits = np.bincount(positions.ravel(), minlength=35)
    assert hits[32:].tolist() == [0, 0, 0]
    for hit in hits[:32]:
        assert_binomial(hit, runs, 6 / 32)
    together = ((positions == 4).any(axis=1) & (positions == 5).any(axis=1)).sum()
    assert_binomial(together, runs, 6 / 32 * 5 / 31)
    first_target = np.take_along_axis(rank, positions, axis=1).min(axis=1)
    assert_binomial((rank[:, 32] > first_target).sum(), runs, 6 / 33)


# ---------------------------------------------------------------------------------------- the order


def test_ranks_are_one_permutation_after_the_other(build, make_rows, corrupt):
    config, objective = build(**{"objective.permutation_size": 7})
    rows = make_rows(config, [32, 32, 20, 9, 0])
    examples = corrupt(objective, rows)
    for b in range(5):
        rank = np.asarray(examples.rank)[b]
        used = np.asarray(examples.weights)[b] > 0
        target = np.zeros(35, bool)
        target[np.asarray(examples.positions)[b][used]] = True
        special = np.asarray(examples.tokens)[b] < 5
        for part in range(5):
            where = slice(7 * part, 7 * part + 7)
            context = ~target[where] & ~special[where]
            # Its context has 8 part - 1, the others different ranks of the 7 that follow.
            assert (rank[where][context] == 8 * part - 1).all()
            others = rank[where][~context] - 8 * part
            assert len(set(others.tolist())) == len(others)
            assert set(others.tolist()) <= set(range(7))


def test_every_order_is_as_likely(build, make_rows, corrupt, assert_binomial):
    """Of the six orders of three targets."""
    config, objective = build(**{"objective.predict_fraction": 3 / 34})
    runs = 3000
    examples = corrupt(objective, make_rows(config, [32] * runs, separators=False))
    order = np.take_along_axis(*map(np.asarray, (examples.rank, examples.positions)), axis=1)
    code = np.argsort(order, axis=1) @ [9, 3, 1]
    counts = np.unique(code, return_counts=True)[1]
    assert len(counts) == 6
    for count in counts:
        assert_binomial(count, runs, 1 / 6)


def test_the_copies_of_a_row_draw_for_themselves(build, make_rows, corrupt):
    config, objective = build(**{"data.copies": 2})
    rows = make_rows(config, [32] * 2)
    rows = jax.tree.map(lambda x: x[:1].repeat(2, axis=0), rows)._replace(copy=jnp.arange(2))
    examples = corrupt(objective, rows)
    np.testing.assert_array_equal(*examples.tokens)
    assert (examples.rank[0] != examples.rank[1]).any()
    assert (examples.positions[0] != examples.positions[1]).any()
