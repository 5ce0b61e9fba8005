"""Format, counts and replacement of masked rows."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from objectives import masked_lm
from pretraining.errors import UserError

PAD, CLS, SEP, MASK = 0, 2, 3, 4
UNITS = ("token", "whole_word", "span", "ngram")
RULES = ("exact", "ceil", "stochastic", "bernoulli")


@pytest.fixture(scope="module")
def build(make_config, vocabulary):
    def make(**overrides):
        config = make_config("masked_lm", **overrides)
        return config, masked_lm.build(config, vocabulary)

    return make


def candidates(rows):
    """[B, T] bool by the definition: valid and none of the ids 0..4."""
    valid = np.arange(rows.tokens.shape[1])[None] < np.asarray(rows.length)[:, None]
    return valid & (np.asarray(rows.tokens) > 4)


# ------------------------------------------------------------------------------------------ format


def test_format_of_a_row(build, make_rows, corrupt):
    config, objective = build(**{"model.document_attention": True})
    rows = make_rows(config, [32, 9, 1, 0])
    examples = jax.tree.map(np.asarray, corrupt(objective, rows))
    for b, n in enumerate([32, 9, 1, 0]):
        payload = np.asarray(rows.tokens)[b, :n]
        restored = examples.tokens[b].copy()
        used = examples.weights[b] > 0
        restored[examples.positions[b][used]] = examples.labels[b][used]
        assert restored.tolist() == [CLS, *payload, SEP, *[PAD] * (33 - n)]
        assert examples.length[b] == n + 2
        document = np.asarray(rows.document)[b]
        last = document[max(n - 1, 0)]
        expected = [document[0], *document[:n], last]
        assert examples.document[b, : n + 2].tolist() == expected
        assert (examples.positions[b][~used] == 0).all()
        assert (examples.labels[b][~used] == PAD).all()
    assert examples.corrupted.shape == examples.tokens.shape


def test_documents_are_left_out_by_default(build, make_rows, corrupt):
    config, objective = build()
    assert corrupt(objective, make_rows(config, [32])).document is None


def test_corrupted_positions_are_what_is_predicted(build, make_rows, corrupt):
    config, objective = build()
    examples = jax.tree.map(np.asarray, corrupt(objective, make_rows(config, [32, 20, 7, 0] * 8)))
    for b in range(32):
        positions = examples.positions[b][examples.weights[b] > 0]
        assert sorted(positions) == np.flatnonzero(examples.corrupted[b]).tolist()


def test_padding_of_a_vocabulary_without_pad(make_config, vocabulary, make_rows, corrupt):
    config = make_config("masked_lm")
    without = type(vocabulary)(**{**vars(vocabulary), "pad": None})
    rows = make_rows(config, [32, 5])
    with_pad, no_pad = (
        corrupt(masked_lm.build(config, v), rows).tokens for v in (vocabulary, without)
    )
    assert (with_pad == no_pad).all()


# ------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rule", RULES)
def test_counts_of_every_unit_and_rule(unit, rule, build, make_rows, corrupt, assert_binomial):
    """On over 10^5 tokens: all that the rule asks for, but for words that do not fit."""
    config, objective = build(
        **{"objective.unit": unit, "objective.count": rule, "data.sequence_length": 64}
    )
    rows = make_rows(config, [61] * 1700 + list(range(62)) * 10)
    examples = corrupt(objective, rows)
    corrupted = np.asarray(examples.corrupted)
    possible = np.pad(candidates(rows), ((0, 0), (1, 2)))
    assert not (corrupted & ~possible).any()
    assert np.asarray(examples.overflow).sum() == 0
    counts, lengths = corrupted.sum(axis=1), np.asarray(rows.length).astype(int)
    assert (np.asarray(examples.weights).sum(axis=1) == counts).all()
    rate = Fraction(15, 100)
    available = candidates(rows).sum(axis=1)
    wanted = {
        "exact": [{max(1, round(rate * (n + 2)))} for n in lengths.tolist()],
        "ceil": [{math.ceil(rate * n)} for n in lengths.tolist()],
        "stochastic": [
            {math.floor(rate * (n + 2)), math.ceil(rate * (n + 2))} for n in lengths.tolist()
        ],
    }
    assert available.sum() > 1e5
    if unit in ("token", "span"):
        if rule == "bernoulli":
            assert_binomial(counts.sum(), available.sum(), 0.15)
        else:
            for count, allowed, most in zip(counts, wanted[rule], available, strict=True):
                assert count in {min(number, most) for number in allowed}
    elif rule == "bernoulli":
        expected = available.sum() * 0.15
        assert expected * 0.97 < counts.sum() <= scipy.stats.binom.isf(1e-9, available.sum(), 0.15)
    else:
        for count, allowed in zip(counts, wanted[rule], strict=True):
            assert count <= max(allowed)
        assert counts.sum() > 0.97 * min(sum(map(min, wanted[rule])), available.sum())


def test_schedule_and_its_counts(build, make_rows, corrupt):
    lengths = list(range(33))
    for kind, middle in (("linear", 0.45), ("cosine", 0.45)):
        config, objective = build(
            **{
                "objective.mask_rate": 0.3,
                "objective.mask_rate_final": 0.6,
                "objective.mask_rate_schedule": kind,
            }
        )
        # 1 - cos(pi / 4) is .292893, so a quarter of the way cosine stands at .3 + .3 x .146447.
        quarter = {"linear": 0.375, "cosine": 0.343934}[kind]
        rows = make_rows(config, lengths, separators=False)
        for step, rate in ((0, 0.3), (25, quarter), (50, middle), (100, 0.6), (1000, 0.6)):
            knobs = objective.schedule(jnp.int32(step))
            assert abs(float(knobs["mask_rate"]) - rate) < 1e-6
            counts = np.asarray(corrupt(objective, rows, knobs=knobs).corrupted).sum(axis=1)
            nearest = Fraction(round(rate * 10_000), 10_000)
            expected = [min(n, max(1, round(nearest * (n + 2)))) for n in lengths]
            assert counts.tolist() == expected


def test_constant_schedule(build):
    _, objective = build(
        **{
            "objective.mask_rate": 0.4,
            "objective.predict_rate": 0.3,
            "objective.mask_fraction": 0.5,
            "objective.random_fraction": 0.2,
            "objective.keep_fraction": 0.3,
        }
    )
    for step in (0, 7):
        knobs = objective.schedule(jnp.int32(step))
        assert {name: round(float(value), 6) for name, value in knobs.items()} == {
            "mask_rate": 0.4,
            "predict_rate": 0.3,
            "mask_fraction": 0.5,
            "random_fraction": 0.2,
        }


def test_evaluation_is_at_15_percent_whatever_training_does(build, make_rows, corrupt):
    config, objective = build(
        **{
            "objective.mask_rate": 0.1,
            "objective.predict_rate": 0.05,
            "objective.mask_fraction": 1.0,
            "objective.random_fraction": 0.0,
            "objective.keep_fraction": 0.0,
        }
    )
    rows = make_rows(config, [32] * 2000, separators=False)
    examples = corrupt(objective, rows, knobs=objective.evaluation_knobs)
    assert (np.asarray(examples.corrupted).sum(axis=1) == 5).all()  # .15 x 34 = 5.1
    assert (np.asarray(examples.weights).sum(axis=1) == 5).all()
    assert objective.evaluation_knobs["mask_fraction"] == 0.8
    assert objective.evaluation_knobs["random_fraction"] == 0.1


def test_predicting_fewer_than_are_corrupted(build, make_rows, corrupt, assert_binomial):
    config, objective = build(**{"objective.mask_rate": 0.4, "objective.predict_rate": 0.2})
    rows = make_rows(config, [32] * 3000, separators=False)
    examples = jax.tree.map(np.asarray, corrupt(objective, rows))
    assert (examples.corrupted.sum(axis=1) == 14).all()  # .4 x 34 = 13.6
    assert examples.weights.shape[1] == 7  # .2 x 34 = 6.8
    assert (examples.weights == 1).all()
    assert (examples.overflow == 0).all()
    assert np.take_along_axis(examples.corrupted, examples.positions, axis=1).all()
    # Which of the corrupted are predicted is random too.
    predicted = np.zeros_like(examples.corrupted)
    np.put_along_axis(predicted, examples.positions, True, axis=1)
    for position in range(1, 33):
        assert_binomial(predicted[:, position].sum(), 3000, 7 / 32)


@pytest.mark.parametrize("unit", UNITS)
def test_copies_predict_more_than_is_corrupted(unit, build, make_rows, corrupt):
    config, objective = build(
        **{"objective.mask_rate": 0.2, "data.copies": 2, "objective.unit": unit}
    )
    rows = make_rows(config, [32, 17, 4, 2, 1, 0] * 20)
    first, second = (
        jax.tree.map(
            np.asarray, corrupt(objective, rows._replace(copy=jnp.full_like(rows.copy, copy)))
        )
        for copy in range(2)
    )
    assert not (first.corrupted & second.corrupted).any()
    if unit == "token":
        full = np.asarray(rows.length) == 32
        assert ((first.corrupted | second.corrupted)[full].sum(axis=1) == 14).all()


def test_what_finds_no_slot_is_counted(build, make_rows, corrupt, init, terms):
    """A member of a population with a higher rate than the config: K = 5 slots for 17 tokens."""
    config, objective = build()
    rows = make_rows(config, [32] * 4, separators=False)
    knobs = objective.schedule(jnp.int32(0)) | {"mask_rate": jnp.float32(0.5)}
    examples = corrupt(objective, rows, knobs=knobs)
    assert examples.weights.shape == (4, 5)
    assert (np.asarray(examples.overflow) == 12).all()
    assert (np.asarray(examples.weights).sum(axis=1) == 5).all()
    assert (np.asarray(examples.corrupted).sum(axis=1) == 17).all()
    overflow = terms(objective, init(objective, examples), examples)["overflow"]
    assert float(overflow.sum / overflow.weight) == pytest.approx(12 / 17)


# ------------------------------------------------------------------------------------- replacement

# Devlin et al. 2019, appendix C.2, table 8: [MASK], same, random.
TABLE_8 = [
    (0.8, 0.1, 0.1),
    (1.0, 0.0, 0.0),
    (0.8, 0.0, 0.2),
    (0.8, 0.2, 0.0),
    (0.0, 0.2, 0.8),
    (0.0, 0.0, 1.0),
]


@pytest.mark.parametrize("unit", UNITS)
def test_replacement_fractions(unit, build, make_rows, corrupt, assert_binomial):
    config, objective = build(**{"objective.unit": unit, "objective.mask_rate": 0.4})
    rows = make_rows(config, [32] * 9000)
    for seed, (mask, keep, random) in enumerate(TABLE_8):
        knobs = objective.schedule(jnp.int32(0)) | {
            "mask_fraction": jnp.float32(mask),
            "random_fraction": jnp.float32(random),
        }
        examples = corrupt(objective, rows, seed, knobs)
        chosen = np.asarray(examples.corrupted)[:, 1:33]
        before = np.asarray(rows.tokens)[chosen]
        after = np.asarray(examples.tokens)[:, 1:33][chosen]
        total = len(before)
        assert total > 1e5
        assert_binomial(np.sum(after == MASK), total, mask + random / 64)
        assert_binomial(np.sum(after == before), total, keep + random / 64)
        assert_binomial(np.sum((after != before) & (after != MASK)), total, random * 62 / 64)


def drawn_tokens(kind, build, make_rows, corrupt):
    config, objective = build(
        **{
            "objective.mask_rate": 0.5,
            "objective.mask_fraction": 0.0,
            "objective.random_fraction": 1.0,
            "objective.keep_fraction": 0.0,
            "objective.random_tokens": kind,
        }
    )
    examples = corrupt(objective, make_rows(config, [32] * 8000))
    return np.asarray(examples.tokens)[np.asarray(examples.corrupted)]


@pytest.mark.parametrize("kind", ["all", "no_specials", "unigram"])
def test_random_tokens(kind, build, make_rows, corrupt, vocabulary, assert_binomial):
    drawn = drawn_tokens(kind, build, make_rows, corrupt)
    weight = {
        "all": np.ones(64),
        "no_specials": np.where(np.arange(64) < 5, 0, 1),
        "unigram": np.where(np.arange(64) < 5, 0, np.arange(64) ** 2),
    }[kind]
    assert len(drawn) > 1e5
    for token, count in enumerate(np.bincount(drawn, minlength=64)):
        assert_binomial(count, len(drawn), weight[token] / weight.sum(), alarm=1e-10)


def test_a_span_has_one_fate_but_many_random_tokens(build, make_rows, corrupt, assert_binomial):
    config, objective = build(
        **{
            "objective.unit": "span",
            "objective.count": "ceil",
            "objective.replacement_unit": "span",
            "objective.mask_rate": 0.3,
        }
    )
    rows = make_rows(config, [32] * 6000)

    def spans(mask, random):
        knobs = {"mask_fraction": jnp.float32(mask), "random_fraction": jnp.float32(random)}
        examples = corrupt(objective, rows, knobs=objective.schedule(jnp.int32(0)) | knobs)
        chosen, tokens = np.asarray(examples.corrupted), np.asarray(examples.tokens)
        first = chosen[:, 1:] & ~chosen[:, :-1]
        return tokens, first, chosen[:, 1:] & chosen[:, :-1]

    tokens, first, inside = spans(mask=0.7, random=0.0)
    masked = tokens == MASK
    assert inside.sum() > 1e4
    assert (masked[:, 1:] == masked[:, :-1])[inside].all()
    assert_binomial(masked[:, 1:][first].sum(), first.sum(), 0.7)

    tokens, _, inside = spans(mask=0.0, random=1.0)
    assert_binomial((tokens[:, 1:] == tokens[:, :-1])[inside].sum(), inside.sum(), 1 / 64)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"objective.unit": "phrase"}, "config.objective.unit='phrase'.*token, whole_word"),
        ({"objective.count": "about"}, "config.objective.count='about'.*exact, ceil"),
        ({"objective.random_tokens": "x"}, "random_tokens='x'.*no_specials"),
        ({"objective.replacement_unit": "word"}, "replacement_unit='word'.*token, span"),
        ({"objective.mask_rate_schedule": "step"}, "mask_rate_schedule='step'.*cosine"),
        ({"objective.mask_rate": 0.0}, r"mask_rate=0.0 is out of range: in \[0.0001, 1\]"),
        ({"objective.mask_rate": 15.0}, "mask_rate=15.0 is out of range"),
        ({"objective.evaluation_mask_rate": 2.0}, "evaluation_mask_rate=2.0 is out of range"),
        ({"objective.smooth": -1.0}, "smooth=-1.0 is out of range: at least 0"),
        ({"objective.span_longest": 0}, "span_longest=0 is out of range: at least 1"),
        ({"objective.ngram_longest": 0}, "ngram_longest=0"),
        ({"objective.span_probability": 1.5}, "span_probability=1.5"),
        ({"objective.mask_fraction": 0.9}, "mask_fraction=0.9, .*keep_fraction=0.1 must add up"),
        ({"objective.mask_rate_final": 0.4}, "mask_rate_final=0.4 .*mask_rate_schedule='const"),
        ({"objective.mask_rate_schedule": "linear"}, "mask_rate_final=0.0 .*='linear'"),
        ({"objective.predict_rate": 0.2}, "predict_rate=0.2 is above .*0.15.*data.copies"),
        ({"data.copies": 7}, "data.copies=7 x .*0.15, is above 1"),
    ],
)
def test_mistakes_are_named(overrides, message, build):
    with pytest.raises(UserError, match=message):
        build(**overrides)


@pytest.mark.parametrize("name", ["cls", "sep", "mask"])
def test_a_vocabulary_without_a_special_token(name, make_config, vocabulary):
    lacking = type(vocabulary)(**{**vars(vocabulary), name: None})
    with pytest.raises(UserError, match=f"'masked_lm' needs a '{name}' token"):
        masked_lm.build(make_config("masked_lm"), lacking)


def test_a_vocabulary_without_counts(make_config, vocabulary):
    empty = type(vocabulary)(**{**vars(vocabulary), "unigram_counts": np.zeros(64, np.int64)})
    config = make_config("masked_lm", **{"objective.random_tokens": "unigram"})
    with pytest.raises(UserError, match="random_tokens='unigram'"):
        masked_lm.build(config, empty)
