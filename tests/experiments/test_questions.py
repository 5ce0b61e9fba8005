"""The questions that are shipped: every protocol is a sweep that could start."""

import functools
import pathlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import question as question_lib
from experiments import sizes
from experiments.question import SameFlops
from experiments.running import planned as planned_lib
from experiments.running.machine import Share
from pretraining import config as config_lib
from pretraining import flops, program
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
            keys = {key: value for key, value in wanted.items() if key != "variant"}
            assert any(keys.items() <= config.items() for config in everything), wanted
            assert variants & {*wanted.get("variant", variants)}
        for curve in figure.published:
            assert curve.source
            if not figure.knob:
                assert curve.points.keys() & variants


# As they stand in the tables that the figures name, typed in again.
PUBLISHED = {
    "generator_size": [],
    "mask_schedule": [],
    "masking_ratio": [
        [84.2, 84.1, 84.2, 84.5, 84.1, 83.2, 82.3, 80.8],  # MNLI
        [90.9, 91.3, 91.6, 91.6, 91.1, 90.7, 89.4, 87.9],  # QNLI
        [87.8, 87.9, 88.0, 88.1, 88.1, 87.8, 87.5, 87.1],  # QQP
        [93.3, 92.7, 93.0, 92.8, 92.7, 92.6, 91.9, 90.5],  # SST-2
        {
            "mask-40": 84.5,
            "corrupt-40-predict-20": 83.7,
            "mask-20": 84.1,
            "corrupt-20-predict-40": 85.7,
        },
    ],
    "objectives": [
        {"masked_lm": 83.9, "causal_lm": 82.1},
        {"masked_lm": 84.34, "permutation_lm": 85.63},
        {"masked_lm": 82.2, "replaced_token_detection-flops": 85.1},
        {"masked_lm": 75.1, "replaced_token_detection-flops": 79.9},
        {"span masking alone": 83.8, "span_boundary": 84.0},
    ],
    "selection_unit": [
        {"token": 83.2, "whole_word": 82.9, "spanbert": 83.4},
        {"token": 86.7, "whole_word": 86.3, "spanbert": 87.0},
        {"token": 92.5, "whole_word": 92.8, "spanbert": 93.3},
        {"token": 83.8, "whole_word": 84.3, "spanbert": 85.4},
    ],
}
RATES = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_are_those_of_the_tables(name):
    curves = [curve for figure in load(name).figures for curve in figure.published]
    found = {curve.label: dict(curve.points) for curve in curves}
    assert len(found) == len({(curve.label, tuple(curve.points.items())) for curve in curves})
    wanted = [
        p if isinstance(p, dict) else dict(zip(RATES, p, strict=True)) for p in PUBLISHED[name]
    ]
    assert list(found.values()) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_contrasts_hold_variants_against_variants(name):
    question = load(name)
    for protocol in question.protocols:
        variants = list(configs(name, protocol))
        contrasts = question_lib.contrasts(question, variants)
        assert contrasts.keys() == set(variants) - {question.baseline}


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
    rates = {config["objective.mask_rate"] for config in flat("masking_ratio", "paper").values()}
    assert rates == set(RATES)


def test_masking_ratio_holds_each_variant_against_what_it_changes():
    """The pre-registered family, and that each turns what the README says."""
    question = load("masking_ratio")
    variants = flat("masking_ratio")
    planned = question_lib.contrasts(question, variants)
    assert planned == {
        "mask-20": "mask-15",
        "mask-40": "mask-15",
        "mask-60": "mask-15",
        "mask-80": "mask-15",
        "bert-15": "mask-15",
        "bert-40": "mask-40",
        "corrupt-20-predict-40": "mask-20",
        "corrupt-40-predict-20": "mask-40",
    }
    text = (question.folder / "README.md").read_text()
    paper = question_lib.contrasts(question, configs("masking_ratio", "paper"))
    assert f"{len(planned)} of them ({len(paper)} in `paper`)" in text


@pytest.mark.parametrize("name", NAMES)
def test_readmes_tell_the_sizes(name):
    text = " ".join((load(name).folder / "README.md").read_text().split())
    tiny = sizes.TINY
    assert (
        f"**tiny**: {tiny['model.layers']} layers of {tiny['model.width']}, "
        f"{tiny['tokenizer.size']:,} pieces, {tiny['data.sequence_length']} positions, "
        f"{tiny['train.steps']} updates of {tiny['train.batch_size']} rows, {sizes.SEEDS} seeds."
    ) in text
    small = next(iter(configs(name, "small").values()))
    assert f"**small**: {small.model.layers} layers of {small.model.width}" in text
    assert f"{small.tokenizer.size:,} pieces, {small.data.sequence_length} positions" in text


@pytest.mark.parametrize("name", NAMES)
def test_readmes_name_the_metric_that_decides(name):
    text = (load(name).folder / "README.md").read_text()
    rule = " ".join(text[text.index("## Decision rule") : text.index("## Published")].split())
    assert f"The metric is `{load(name).figures[0].metric}`" in rule


def test_masking_ratio_at_the_size_of_the_paper_is_the_published_recipe():
    """RoBERTa's activation, counts and random tokens: fairseq's mask_tokens_dataset and roberta."""
    for variant, config in flat("masking_ratio", "paper").items():
        assert config["model.activation"] == "gelu_erf", variant
        assert config["objective.count"] == "stochastic", variant
        assert config["objective.random_tokens"] == "no_specials", variant


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


def test_what_objectives_cannot_do_without_is_all_that_differs():
    """Beside their own knobs; span_boundary is all of SpanBERT's scheme, not its head alone."""
    for protocol in load("objectives").protocols:
        variants = flat("objectives", protocol)
        found = {
            name: {
                key for key in differing(config, variants["masked_lm"]) if key[:9] != "objective"
            }
            for name, config in variants.items()
            if not name.endswith("-flops")
        }
        assert found.pop("permutation_lm") == {"model.position", "model.norm_order"}
        assert set(map(frozenset, found.values())) == {frozenset()}
        spans = differing(variants["span_boundary"], variants["masked_lm"])
        shared = {key for key in spans if key in variants["masked_lm"]} - {"objective.name"}
        own = ("unit", "count", "replacement_unit", "random_tokens")
        assert shared == {f"objective.{name}" for name in own}


def test_the_same_flops_are_counted_again():
    """In the configs that are run, not in those that were scaled."""
    found = {each.name: each for each in plan("objectives") if each.run.seed == 0}

    def count(name):
        config, vocabulary, _ = program.rehearse(found[name].config)
        return flops.step_flops(config, vocabulary), config.train.steps

    of_one, steps = count("masked_lm-seed0")
    for name in found:
        if name.endswith("-flops-seed0"):
            of_other, others = count(name)
            assert abs(of_other * others - of_one * steps) <= of_other / 2, name


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
