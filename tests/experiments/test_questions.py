"""The questions that are shipped: every protocol is a sweep that could start."""

import functools
import pathlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import planned as planned_lib
from experiments import question as question_lib
from experiments import sizes
from experiments.machine import Share
from experiments.question import SameFlops
from pretraining import config as config_lib
from tests import running

FOLDERS = sorted(path.parent for path in (running.ROOT / "experiments").glob("*/sweep.py"))
NAMES = [folder.name for folder in FOLDERS]
SEEDS = {"seed.init", "seed.corruption", "seed.dropout"}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(running.ROOT)


@functools.cache
def load(name):
    return question_lib.load(running.ROOT / "experiments" / name)


@functools.cache
def plan(name):
    """The tiny sweep; costs are found in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned_lib, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
        return planned_lib.plan(load(name), "tiny", {}, pathlib.Path("R"), Share((), {}))


@functools.cache
def configs(name, protocol):
    """{variant: config} as the training command will read it, of the first repetition."""
    question = load(name)
    first = [run for run in question_lib.runs(question, protocol) if run.seed == 0]
    for run in first:
        if isinstance(run.overrides.get("train.steps"), SameFlops):
            run.overrides["train.steps"] = 1
    return {run.variant: config_lib.load(run.config, run.overrides) for run in first}


def flat(name, protocol="tiny"):
    return {v: config_lib.flatten(config) for v, config in configs(name, protocol).items()}


def differing(one, other):
    return {key for key in one | other if one.get(key) != other.get(key)}


def test_there_are_five():
    assert NAMES == [
        "generator_size",
        "mask_schedule",
        "masking_ratio",
        "objectives",
        "selection_unit",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_is_a_sweep_that_could_start(name):
    """Configs, shapes, one token store and one order of rows."""
    question = load(name)
    assert {"tiny", "paper"} <= question.protocols.keys()
    found = plan(name)
    assert min(each.cost.flops for each in found) > 0
    assert {each.run.seed for each in found} == {0, 1, 2}
    for protocol in question.protocols:
        for config in configs(name, protocol).values():
            config_lib.validate(config)
        keys = [planned_lib._store_keys(config) for config in configs(name, protocol).values()]
        assert keys == [keys[0]] * len(keys)


@pytest.mark.parametrize("name", NAMES)
def test_repetitions_differ_in_three_seeds_and_pair_by_number(name):
    runs = question_lib.runs(load(name), "tiny")
    for run in runs:
        same = [other for other in runs if other.variant == run.variant]
        assert [other.seed for other in same] == [0, 1, 2]
        assert all(
            differing(run.overrides, other.overrides) == SEEDS for other in same if other != run
        )
        assert {run.overrides[key] for key in SEEDS} == {run.seed}


@pytest.mark.parametrize("name", NAMES)
def test_figures_show_what_is_there(name):
    question = load(name)
    assert question.figures
    everything = [config for p in question.protocols for config in flat(name, p).values()]
    variants = {variant for p in question.protocols for variant in configs(name, p)}
    for figure in question.figures:
        assert figure.metric.startswith(("yardstick/", "eval/"))
        if figure.knob:
            assert all(figure.knob in config for config in everything)
        for wanted in figure.series.values():
            assert any(wanted.items() <= config.items() for config in everything), wanted
        for curve in figure.published:
            assert curve.source
            if not figure.knob:
                assert curve.points.keys() <= variants


# --------------------------------------------------------------------------------- one by one


def test_masking_ratio_keeps_the_text_of_a_step():
    for protocol in load("masking_ratio").protocols:
        for variant, config in configs("masking_ratio", protocol).items():
            baseline = configs("masking_ratio", protocol)["mask-15"]
            rows = lambda c: c.train.batch_size / c.data.copies
            assert rows(config) == rows(baseline), variant
            assert config.train.steps == baseline.train.steps, variant


def test_masking_ratio_turns_one_knob_at_a_time():
    variants = flat("masking_ratio")
    assert differing(variants["mask-15"], variants["mask-40"]) == {"objective.mask_rate"}
    fractions = {f"objective.{kind}_fraction" for kind in ("mask", "random", "keep")}
    assert differing(variants["mask-40"], variants["bert-40"]) == fractions
    apart = differing(variants["mask-40"], variants["corrupt-40-predict-20"])
    assert apart == {"objective.predict_rate"}


def test_masking_ratio_has_the_published_rates():
    """Table of the README of DinkyTrain, typed in again: MNLI and SST-2 of the large model."""
    mnli, _, _, sst = load("masking_ratio").figures[0].published
    assert mnli.points == dict(
        zip(
            (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            (84.2, 84.1, 84.2, 84.5, 84.1, 83.2, 82.3, 80.8),
            strict=True,
        )
    )
    assert (mnli.label, sst.label, sst.points[0.15], sst.points[0.8]) == (
        "MNLI",
        "SST-2",
        93.3,
        90.5,
    )
    rates = {config["objective.mask_rate"] for config in flat("masking_ratio", "paper").values()}
    assert rates == mnli.points.keys()


def test_selection_unit_turns_the_unit_alone():
    variants = flat("selection_unit")
    for unit in ("whole_word", "ngram", "span"):
        assert differing(variants["token"], variants[unit]) == {"objective.unit"}


def test_mask_schedules_have_one_mean():
    variants = flat("mask_schedule")

    def rates(variant):
        config = variants[variant]
        return config["objective.mask_rate"], config["objective.mask_rate_final"]

    assert rates("constant") == (0.225, 0.225)
    for variant, down in (("decreasing", True), ("increasing", False)):
        first, last = rates(variant)
        assert (first + last) / 2 == pytest.approx(0.225, abs=1e-12)
        assert (first > last) == down
        assert variants[variant]["objective.mask_rate_schedule"] == "linear"


def test_generators_are_sizes_of_one_network():
    variants = flat("generator_size")
    sizes = {"eighth": 1 / 8, "quarter": 1 / 4, "half": 1 / 2, "three_quarters": 3 / 4, "whole": 1}
    for name, size in sizes.items():
        assert variants[name]["objective.generator_size"] == size
        allowed = {"objective.generator_size"}
        assert differing(variants[name], variants["quarter"]) <= allowed


def test_objectives_share_data_and_optimizer():
    variants = flat("objectives")
    names = {config["objective.name"] for config in variants.values()}
    assert names == set(config_lib.objective_names())
    shared = (
        "data.",
        "tokenizer.",
        "optimizer.",
        "train.batch_size",
        "model.width",
        "model.layers",
    )
    for config in variants.values():
        found = differing(config, variants["masked_lm"])
        assert [key for key in found if key.startswith(shared)] == []


def test_the_same_flops_are_the_same():
    """To half an update, which is how far they can be rounded."""
    found = plan("objectives")
    wanted = next(each.cost.flops for each in found if each.run.variant == "masked_lm")
    matched = [each for each in found if each.run.variant.endswith("-flops")]
    assert len(matched) == 4 * 3
    for each in matched:
        of_one = each.cost.flops / each.cost.steps
        assert abs(each.cost.flops - wanted) <= of_one / 2
        assert each.config.train.steps == each.cost.steps
        like = next(other for other in found if other.name == each.name.replace("-flops", ""))
        assert like.cost.steps == sizes.TINY["train.steps"]
        assert of_one == pytest.approx(like.cost.flops / like.cost.steps, rel=1e-12)
