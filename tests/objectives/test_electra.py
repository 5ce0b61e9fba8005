"""Sizes of the generator, parameter counts of ELECTRA, refused settings, what the samples are drawn
with, and the selection of the original code, with replacement."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import electra, replaced_token_detection
from pretraining import state
from pretraining.errors import UserError
from pretraining.models.transformer import TransformerConfig

MASK = 4


def recipe(size, **overrides):
    config = importlib.import_module("configs.replaced_token_detection").get_config(size)
    config.update_from_flattened_dict(overrides)
    return config


# ------------------------------------------------------------------------------------------- sizes

SMALL = {
    "model.embedding_width": 128,
    "model.position_rows": 512,
    "model.segments": 2,
    "tokenizer.size": 30_522,
}


@pytest.mark.parametrize(
    "size,overrides,encoder,total",
    # The discriminators' bodies of google-research/electra, and all that is trained.
    [
        ("small", SMALL, 13_483_008, 14_196_219),
        ("base", {}, 108_891_648, 119_386_427),
        ("large", {}, 334_092_288, 354_655_291),
        ("small", SMALL | {"objective.generator_size": 1.0}, 13_483_008, 23_122_875),
    ],
)
def test_parameters_are_the_originals(size, overrides, encoder, total, vocabulary):
    config = recipe(size, **overrides)
    entries = config.tokenizer.size
    sized = vars(vocabulary) | {"size": entries, "unigram_counts": np.ones(entries)}
    objective = replaced_token_detection.build(config, type(vocabulary)(**sized))
    params = jax.eval_shape(lambda: state.init_params(objective, config))
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert count(params["encoder"]) == encoder
    assert count(params) == total


def shrunk(size, depth=1.0, **model):
    config = recipe("base").model
    config.update(model)
    large = TransformerConfig.create(config, 100, 512)
    small = electra.shrink(large, size, depth)
    same = {"layers", "width", "mlp_width", "heads"}
    for field in dataclasses.fields(large):
        if field.name not in same:
            assert getattr(small, field.name) == getattr(large, field.name)
    return small.layers, small.width, small.mlp_width, small.heads


def test_sizes_of_generators():
    assert shrunk(1 / 3) == (12, 256, 1024, 4)  # ELECTRA-base
    assert shrunk(1 / 4, layers=24, width=1024, heads=16, mlp_width=4096) == (24, 256, 1024, 4)
    assert shrunk(1.0, 0.5) == (6, 768, 3072, 12)
    assert shrunk(0.3) == (12, 230, 922, 2)  # 230 // 64 = 3 heads do not divide 230
    assert shrunk(0.01, 0.01) == (1, 8, 31, 1)


# ------------------------------------------------------------------------------------------ checks


ELECTRIC = {"generator": "two_tower", "discriminator": "electric"}


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"discriminator": "some"}, r"discriminator='some' is not one of all, masked_only, "),
        ({"generator": "big"}, r"config.objective.generator='big' is not one of masked_lm, "),
        ({"sharing": "some"}, r"config.objective.sharing='some' is not one of all, token, none"),
        ({"temperature": 0.0}, r"config.objective.temperature=0.0 is out of range"),
        ({"generator_size": 1.5}, r"config.objective.generator_size=1.5 is out of range"),
        ({"generator_layers": -1.0}, r"config.objective.generator_layers=-1.0 is out of range"),
        ({"discriminator_weight": -1.0}, r"config.objective.discriminator_weight=-1.0 is out of"),
        (
            {"with_replacement": True, "unit": "span"},
            r"with_replacement=True needs config.objective.unit='token', not 'span'",
        ),
        (
            {"with_replacement": True, "predict_rate": 0.1},
            r"with_replacement=True needs config.objective.predict_rate=0, not 0.1",
        ),
        (
            {"with_replacement": True, "random_fraction": 0.1, "keep_fraction": 0.05},
            r"with_replacement=True needs config.objective.random_fraction=0, not 0.1",
        ),
        (
            {**ELECTRIC, "predict_rate": 0.1},
            r"predict_rate=0.1 must be 0 with config.objective.discriminator='electric'",
        ),
        (
            {**ELECTRIC, "evaluation_mask_rate": 1.0},
            r"evaluation_mask_rate=1 must be below 1 with",
        ),
    ],
)
def test_refused_settings(overrides, message, make_config, vocabulary):
    flat = {f"objective.{key}": value for key, value in overrides.items()}
    config = make_config("replaced_token_detection", **flat)
    with pytest.raises(UserError, match=message):
        replaced_token_detection.build(config, vocabulary)


def test_two_towers_do_not_keep_documents_apart(make_config, vocabulary):
    overrides = {"objective.generator": "two_tower", "model.document_attention": True}
    config = make_config("replaced_token_detection", **overrides)
    with pytest.raises(UserError, match="two_tower' reads a row from both ends"):
        replaced_token_detection.build(config, vocabulary)


def test_the_last_logit_is_not_rounded_to_16_bits(
    make_config, vocabulary, make_rows, corrupt, init
):
    """An energy is added to a log-probability: its steps must not be those of bfloat16."""
    config = make_config("replaced_token_detection", **{"model.dtype": "bfloat16"})
    objective = replaced_token_detection.build(config, vocabulary)
    examples = corrupt(objective, make_rows(config, [32, 9]))
    params = jax.tree.map(lambda x: 5 * x, init(objective, examples))
    logits = electra.detection_logits(objective.model.apply, params, examples)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_copies_are_refused_with_replacement(make_config, vocabulary):
    overrides = {"objective.with_replacement": True, "data.copies": 2}
    config = make_config("replaced_token_detection", **overrides)
    with pytest.raises(UserError, match="needs config.data.copies=1, not 2"):
        replaced_token_detection.build(config, vocabulary)


def test_a_generator_that_cannot_be_names_its_keys(make_config, vocabulary):
    overrides = {"model.position": "rotary", "objective.generator_size": 0.2}
    config = make_config("replaced_token_detection", **overrides)
    message = "generator_size=0.2 and config.objective.generator_layers=1.0 make a generator that"
    with pytest.raises(UserError, match=message):
        replaced_token_detection.build(config, vocabulary)


# ------------------------------------------------------------------------------------------ draws


def test_copies_of_a_row_are_sampled_apart(make_config, vocabulary, make_rows, corrupt):
    config = make_config("replaced_token_detection", **{"data.copies": 2})
    objective = replaced_token_detection.build(config, vocabulary)
    rows = make_rows(config, [32, 32])
    rows = jax.tree.map(lambda x: x.at[1].set(x[0]), rows)._replace(copy=jnp.asarray([0, 1]))
    examples = corrupt(objective, rows)
    assert not set(examples.positions[0].tolist()) & set(examples.positions[1].tolist())
    assert (examples.noise[0] != examples.noise[1]).any()


def test_temperature_is_a_knob_of_training(make_config, vocabulary, make_rows, corrupt):
    fractions = {"objective.mask_fraction": 1.0, "objective.keep_fraction": 0.0}
    config = make_config("replaced_token_detection", **{"objective.temperature": 0.5}, **fractions)
    objective = replaced_token_detection.build(config, vocabulary)
    rows = make_rows(config, [32, 0])
    assert corrupt(objective, rows).temperature.tolist() == [0.5, 0.5]
    evaluated = corrupt(objective, rows, knobs=objective.evaluation_knobs)
    assert evaluated.temperature.tolist() == [1, 1]
    knobs = objective.evaluation_knobs
    assert (knobs["mask_fraction"], knobs["random_fraction"]) == (1.0, 0.0)


# ------------------------------------------------------------------------ the original's selection


@pytest.fixture(scope="module")
def drawn(make_config, vocabulary, make_rows, corrupt):
    """(sequence length, mask rate) -> rows, examples; no separators, the last row has 9 tokens."""

    def make(length, rate, count=400):
        overrides = {"data.sequence_length": length, "objective.mask_rate": rate}
        overrides |= {"objective.with_replacement": True}
        config = make_config("replaced_token_detection", **overrides)
        objective = replaced_token_detection.build(config, vocabulary)
        rows = make_rows(config, [length - 3] * (count - 1) + [9], separators=False)
        return rows, jax.tree.map(np.asarray, corrupt(objective, rows))

    return make


@pytest.mark.parametrize("length,rate,draws", [(128, 0.15, 19), (512, 0.25, 128)])
def test_draws_with_replacement_repeat_as_chance_has_it(length, rate, draws, drawn):
    """The mean number of distinct positions of n equally likely ones is n (1 - (1 - 1/n)^k), and
    its variance that of an occupancy problem."""
    _, examples = drawn(length, rate)
    n, full = length - 3, slice(0, -1)
    assert (examples.weights[full].sum(axis=1) == draws).all()
    distinct = examples.corrupted[full].sum(axis=1)
    missed, both = (1 - 1 / n) ** draws, (1 - 2 / n) ** draws
    variance = n * missed + n * (n - 1) * both - (n * missed) ** 2
    error = distinct.mean() - n * (1 - missed)
    assert abs(error) < 6 * math.sqrt(variance / len(distinct))
    assert {len(set(row)) for row in examples.positions[full]} == set(distinct)
    counts = np.bincount(examples.positions[full].ravel(), minlength=length)
    assert (counts[1 : n + 1] > 0).all()
    assert counts[[0, n + 1, n + 2]].sum() == 0


def test_a_repeated_position_is_visible_if_all_its_draws_leave_it_so(drawn, assert_binomial):
    _, examples = drawn(128, 0.25, count=1000)
    visible = {1: [], 2: []}
    for tokens, positions, weights in zip(
        examples.tokens, examples.positions, examples.weights, strict=True
    ):
        place, times = np.unique(positions[weights > 0], return_counts=True)
        for number, seen in visible.items():
            seen.extend(tokens[place[times == number]] != MASK)
    assert_binomial(sum(visible[1]), len(visible[1]), 0.15)
    assert len(visible[2]) > 2000
    assert_binomial(sum(visible[2]), len(visible[2]), 0.15**2)


def test_draws_with_replacement_are_of_the_row(drawn):
    rows, examples = drawn(128, 0.15)
    for b in (0, 5, 399):
        used = examples.weights[b] > 0
        assert used.sum() == (2 if b == 399 else 19)  # round(.15 x (9 + 2)) = 2
        places = examples.positions[b]
        payload = np.asarray(rows.tokens)[b]
        assert (examples.labels[b][used] == payload[places[used] - 1]).all()
        assert (places[used] >= 1).all()
        assert (places[used] <= rows.length[b]).all()
        assert (places[~used] == 0).all()
        assert set(places[used]) == set(np.flatnonzero(examples.corrupted[b]))
        same = ~examples.corrupted[b][1:126]
        inside = np.arange(125) < int(rows.length[b])
        assert (examples.tokens[b, 1:126] == payload)[same & inside].all()
        hidden = examples.tokens[b] != examples.original[b]
        assert (examples.tokens[b][hidden] == MASK).all()


def test_separators_are_never_drawn(make_config, vocabulary, make_rows, corrupt):
    overrides = {"objective.with_replacement": True, "objective.mask_rate": 0.5}
    config = make_config("replaced_token_detection", **overrides)
    objective = replaced_token_detection.build(config, vocabulary)
    rows = make_rows(config, [32, 20, 0] * 40)
    examples = corrupt(objective, rows)
    original = np.asarray(examples.original)
    special = np.isin(original, vocabulary.special_ids)
    assert special.sum() > 300
    assert not np.asarray(examples.corrupted)[special].any()
    nothing = rows._replace(tokens=jnp.full_like(rows.tokens, 3))
    assert float(corrupt(objective, nothing).weights.sum()) == 0
