"""Which runs of a report stand beside each other: families and objectives."""

import json

import pytest

from experiments.reporting import context, metrics, page, sections, source
from tests.experiments.synthetic import (
    PLANNED,
    SETTINGS,
    SWEEP,
    faults_of,
    metric_table,
    table,
    text_of,
    write_families,
    write_run,
    write_sweep,
)


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


@pytest.fixture
def families(tmp_path):
    return write_families(tmp_path)


def test_families_are_not_ranked(families):
    text = text_of(families)
    for metric, kinds, sections_of in (
        ("yardstick/family/bits_per_byte", "families", {"left": "causal", "third": "third"}),
        ("eval/loss", "objectives", {"both": "both", "left": "left", "third": "third"}),
    ):
        assert f"{metric} is not ranked across {kinds}" in text
        for variant, label in sections_of.items():
            rows = metric_table(text, metric, label)
            assert list(rows) == ["variant", variant]
    shared = metric_table(text, "yardstick/blimp/accuracy")
    assert list(shared) == ["variant", "both", "left", "third"]
    names = {
        block.name
        for block in sections.blocks(context.make(source.read(families), None))
        if isinstance(block, page.Picture)
    }
    assert {"curves-both", "curves-left", "curves-third"} <= names


def test_runs_of_no_family_are_compared_with_nobody(tmp_path):
    for variant, family in (("a", "masked"), ("b", ""), ("c", "")):
        figures = {"family/masked_loss": 2.0, "blimp/accuracy": 0.5}
        write_run(tmp_path / f"{variant}-seed0", {400: 3.0}, figures=figures, family=family)
    frame = context.make(source.read(tmp_path), None).frame
    found = metrics.groups(frame, "yardstick/family/masked_loss")
    assert {label: list(runs.variant) for label, runs in found.items()} == {"masked": ["a"]}


def test_how_sentences_are_judged_is_told(tmp_path):
    kinds = {"a": "likelihood", "b": "detection", "c": "likelihood"}
    for variant, kind in kinds.items():
        settings = SETTINGS | {"blimp_score": kind}
        figures = {"blimp/accuracy": 0.5}
        write_run(tmp_path / f"{variant}-seed0", {400: 3.0}, figures=figures, settings=settings)
    assert "not judged alike here: by detection in b; likelihood in a, c." in text_of(tmp_path)
    assert "blimp_score" not in faults_of(tmp_path)


def test_families_figures_that_the_question_does_not_show_have_no_tests(sweep):
    asked = sweep.parent / "more" / "sweep.py"
    asked.write_text(SWEEP.replace("yardstick/family/masked_loss", "yardstick/blimp/accuracy"))
    text = text_of(sweep)
    assert "## Figures of the families\n\nThey do not rank across families: likelihoods of" in text
    rows = table(text, "### yardstick/family/masked_loss: masked")
    assert rows["variant"] == ["n", "mean", "sd", "against", "difference"]
    assert rows["p40"] == ["3", "4.900", "0", "p15", "-0.2"]


def test_every_family_stands_alone(families):
    """Of a question that shows none of their figures."""
    asked = families / "more"
    asked.mkdir()
    asked_for = SWEEP.replace("yardstick/family/masked_loss", "yardstick/blimp/accuracy")
    (asked / "sweep.py").write_text(asked_for)
    told = {"question": str(asked), "protocol": "tiny", "overrides": {}, "tasks": ""}
    told |= {"planned": PLANNED}
    (families / "sweep.json").write_text(json.dumps(told))
    text = text_of(families)
    assert text.index("bits_per_byte: causal") < text.index("masked_loss: masked")
    assert text.index("masked_loss: masked") < text.index("bits_per_byte: third")
    for metric, family, variant in (
        ("masked_loss", "masked", "both"),
        ("bits_per_byte", "causal", "left"),
        ("bits_per_byte", "third", "third"),
    ):
        rows = table(text, f"### yardstick/family/{metric}: {family}")
        assert (list(rows), rows[variant][1]) == (["variant", variant], "2.500")


def test_what_the_question_shows_is_not_shown_twice(sweep):
    assert "## Figures of the families" not in text_of(sweep)


def test_a_loss_that_the_question_does_not_show_compares_between_equal_settings_alone(sweep):
    assert list(metric_table(text_of(sweep), "eval/loss", "hidden")) == [
        "variant",
        "p15",
        "p40",
        "p80",
    ]
    asked = sweep.parent / "more" / "sweep.py"
    asked.write_text(SWEEP.replace('Figure("eval/loss", "Validation loss", "lower"),', ""))
    text = text_of(sweep)
    assert "eval/loss is not ranked across objectives, nor settings" in text
    assert list(metric_table(text, "eval/loss", "hidden, mask_rate=0.4")) == ["variant", "p40"]


def test_evaluations_of_other_units_are_not_ranked(tmp_path):
    """Two variants have one objective; the third masks spans."""
    for variant, config in (
        ("a", {"objective.unit": "token"}),
        ("b", {"objective.unit": "token", "optimizer.learning_rate": 0.4}),
        ("c", {"objective.unit": "span"}),
    ):
        figures = {"family/masked_loss": 4.0}
        write_run(tmp_path / f"{variant}-seed0", {400: 5.0}, config, figures=figures)
    text = text_of(tmp_path)
    assert "eval/loss is not ranked across objectives, nor settings of one that may change" in text
    assert list(metric_table(text, "eval/loss", "hidden, unit=token")) == ["variant", "a", "b"]
    assert list(metric_table(text, "eval/loss", "hidden, unit=span")) == ["variant", "c"]
    assert list(metric_table(text, "yardstick/family/masked_loss")) == ["variant", "a", "b", "c"]


def test_one_family_is_not_lectured(sweep):
    text = text_of(sweep)
    assert "is not ranked" not in text
    assert "of different kinds" not in text


def test_runs_without_a_yardstick_stand_in_no_family(families):
    write_run(families / "new-seed0", {400: 3.0}, {"objective.name": "both"})
    of = context.make(source.read(families), None)
    for metric in ("yardstick/family/masked_loss", "yardstick/family/bits_per_byte"):
        assert "new-seed0" not in {
            n for g in metrics.groups(of.frame, metric).values() for n in g.index
        }
    assert "new-seed0" in metrics.groups(of.frame, "eval/loss")["both"].index
