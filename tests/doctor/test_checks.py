"""A healthy run is told to be healthy; each disease is found, by its numbers."""

import dataclasses
import math
import time

import pytest

from pretraining import doctor, run_folder
from pretraining.doctor import machine
from tests.doctor.synthetic import (
    PEAK,
    STEPS,
    diagnosed,
    edited,
    falling,
    healthy,
    late,
    losses,
    nothing,
    put,
)


def detection(accuracy, loss):
    """Of 15 % that are not as the majority; the entropy of that is .4227."""

    def change(line):
        if "eval/loss" in line:
            line |= {
                "eval/majority_accuracy": 0.85,
                "eval/told_accuracy": accuracy,
                "eval/told": loss,
                "eval/ema/told_accuracy": 1.0,
            }

    return change


def twice_seen(record):
    """8 M tokens of a text of 6.1 M: 1.3 epochs."""
    return dataclasses.replace(record, counts=record.counts // 2)


def evaluated_never(line):
    for name in [name for name in line if name.startswith("eval/")]:
        del line[name]


# What was done to the run: (check, severity, words of the text).
DISEASES = {
    "rate zero": (
        edited(put(train__learning_rate=0.0)),
        ("learning rate", "warning", "0 in all 200 lines"),
    ),
    "rate below the config": (
        edited(nothing, optimizer__learning_rate=3e-3),
        ("learning rate", "warning", "peaks at 0.001, where the config says 0.003"),
    ),
    "rate above the config": (
        edited(nothing, optimizer__learning_rate=5e-4),
        ("learning rate", "warning", "where the config says 0.0005"),
    ),
    "endless warm-up": (
        edited(nothing, optimizer__warmup=5000),
        ("learning rate", "warning", "warm-up of 5000 steps is not over"),
    ),
    "no decay": (
        edited(put(train__learning_rate=PEAK), optimizer__schedule="constant"),
        ("learning rate", "note", "ends at a learning rate of 0.001"),
    ),
    "no warm-up, post-norm": (
        edited(put(train__learning_rate=lambda s: PEAK * (1 - s / STEPS)), optimizer__warmup=0),
        ("warm-up", "warning", "norms follow the sums"),
    ),
    "no warm-up, pre-norm": (
        edited(nothing, optimizer__warmup=0, model__norm_order="pre"),
        ("warm-up", "note", "no warm-up"),
    ),
    "explosion": (
        edited(put(train__gradient_norm=late(200.0, 0.8, 1500))),
        ("gradient norm", "warning", "explodes: median 0.8 after the warm-up, 200 of late"),
    ),
    "vanishing": (
        edited(put(train__gradient_norm=late(1e-5, 0.8))),
        ("gradient norm", "warning", "vanishes"),
    ),
    "always clipped": (
        edited(put(train__gradient_norm=3.0)),
        ("clipping", "note", "100% of the updates are over optimizer.clip=1 (median 3)"),
    ),
    "loss not finite": (
        edited(put(train__loss=late(None, 5.0, 1950))),
        ("finite updates", "warning", "6 updates were not finite, the first at step 1950"),
    ),
    "skipped": (
        edited(put(train__skipped=late(7.0, 0.0))),
        ("finite updates", "warning", "7 updates were not finite"),
    ),
    "spike": (
        edited(put(train__loss_deviation=lambda s: 12.0 if s == 700 else 0.1)),
        ("spikes", "warning", "12.0 standard deviations, at step 700; the run went on"),
    ),
    "rewound": (
        edited(put(train__rewinds=late(1.0, 0.0))),
        ("spikes", "note", "the run went back 1 times"),
    ),
    "too wide at first": (
        edited(put(train__masked_lm=lambda s: 15.0 if s == 10 else falling(s))),
        ("first loss", "warning", "begins at 15.00 (step 10), log V is 8.32"),
    ),
    "leaks from the first step": (
        edited(put(train__masked_lm=1.0)),
        ("first loss", "warning", "begins at 1.00"),
    ),
    "stands still": (
        edited(losses(lambda s: 8.3)),
        ("learning", "warning", "stands still"),
    ),
    "diverges": (
        edited(losses(late(7.0, 5.0, 1600))),
        ("learning", "warning", "5.000 at best, 7.000 of late: it diverges"),
    ),
    "unigram plateau": (
        edited(losses(lambda s: 6.5 + 1.8 * math.exp(-s / 100))),
        ("unigram baseline", "warning", "the model makes no use of context"),
    ),
    "no masking": (
        edited(put(eval__accuracy=0.99, eval__masked_lm=0.05, eval__loss=0.05)),
        ("leak", "warning", "validation accuracy 99.0%, masked_lm 0.05 (unigram 6.50): too good"),
    ),
    "no masking in training": (
        edited(put(train__accuracy=0.98, train__masked_lm=0.1)),
        ("leak", "warning", "training accuracy 98.0%, masked_lm 0.10 (unigram 6.50): too good"),
    ),
    "overfitting": (
        twice_seen(edited(losses(lambda s: falling(s) - s / 2000, late(5.5, 5.0)))),
        ("overfitting", "warning", "5.500, at best 5.000, while training goes on falling: overf"),
    ),
    "other validation text": (
        edited(losses(lambda s: falling(s) - s / 2000, late(5.5, 5.0))),
        ("overfitting", "warning", "falling, though nothing has been seen twice"),
    ),
    "comes apart right after the beginning": (
        edited(losses(late(6.0, falling, 410), late(6.1, falling, 410))),
        ("overfitting", "warning", "6.100, at best 5.133, and training rises too"),
    ),
    "comes apart": (
        edited(losses(late(7.0, 5.0, 1400))),
        ("overfitting", "warning", "training rises too"),
    ),
    "gap": (
        edited(losses(lambda s: 5.0 - s / 2000, lambda s: 5.0)),  # medians of the last fifths
        ("train-validation gap", "warning", "+0.99 nats, +0.09 at the first"),
    ),
    "learned by heart": (
        twice_seen(edited(put(train__accuracy=0.98, train__masked_lm=0.1))),
        ("leak", "note", "1.3 epochs: probably learned by heart"),
    ),
    "many epochs": (
        edited(nothing, train__batch_size=32 * 16),
        ("epochs", "note", "10.42 epochs of 12,288,000 tokens"),
    ),
    "majority": (
        edited(detection(0.85, 0.4227)),
        (
            "majority baseline",
            "warning",
            "told is right in 85.00% (majority 85.00%), its loss 0.42",
        ),
    ),
    "majority, but moving": (
        edited(detection(0.85, 0.41)),
        ("majority baseline", "note", "0.4100 (knowing the rate alone: 0.4227): it has just"),
    ),
    "overflow": (
        edited(put(train__overflow=0.03)),
        ("slots", "warning", "3.00% of the chosen tokens found no slot"),
    ),
    "short rows": (
        edited(put(train__fill=lambda s: 0.5 if s % 20 else 1.0)),
        ("padding", "warning", "25.00% of the rows is padding"),
    ),
    "evaluation not finite": (
        edited(put(eval__masked_lm=late(None, 5.0, 1500))),
        ("finite evaluations", "warning", "eval/masked_lm not finite, first at step 1600"),
    ),
    "never evaluated": (
        edited(evaluated_never),
        ("evaluation", "warning", "without one evaluation"),
    ),
    "waits for rows": (
        edited(put(time__total__data_wait=lambda s: 0.75 * s)),
        ("data wait", "warning", "60% of the time of updates"),
    ),
    "waits a little": (
        edited(put(time__total__data_wait=lambda s: 0.125 * s)),
        ("data wait", "note", "20% of the time of updates"),
    ),
    "mostly compiling": (
        edited(put(time__total__compile=3000.0)),
        ("goodput", "note", "25% of all time made updates; next is compile, 75%"),
    ),
    "other code": (
        dataclasses.replace(
            healthy(), starts=[healthy().starts[0], healthy().starts[0] | {"commit": "other"}]
        ),
        ("one program", "note", "2 starts with different commit"),
    ),
}


@pytest.mark.parametrize("disease", DISEASES)
def test_a_disease_is_found_and_explained(disease):
    record, (check, severity, words) = DISEASES[disease]
    finding = diagnosed(record)[check]
    assert finding.severity == severity, finding
    assert words in finding.text
    if severity == "warning":
        assert finding.causes
        assert finding.advice


def test_a_healthy_run_has_no_finding_but_the_missing_reference():
    found = diagnosed(healthy())
    assert [name for name, each in found.items() if each.severity != "ok"] == ["reference"]
    assert found["reference"].severity == "note"
    assert "no reference curve" in found["reference"].text


def test_every_check_that_applies_to_the_healthy_run_has_a_disease():
    told = {check for _, (check, _, _) in DISEASES.values()}
    assert set(diagnosed(healthy())) - told == {"progress", "reference"}


def test_too_few_tokens_are_no_disease():
    record = DISEASES["unigram plateau"][0]

    def of(lines, batch):
        config = record.config | {"train.batch_size": batch}
        return diagnosed(dataclasses.replace(record, lines=lines, config=config))

    early = of(record.lines, 3)["unigram baseline"]  # 750,000 tokens
    assert early.severity == "note"
    assert "too short a run to tell, before 1,000,000 tokens and 1,400 updates" in early.text
    assert of(record.lines, 6)["unigram baseline"].severity == "warning"  # 1.5 M, all there are
    going_on = of(record.lines[:100], 12)["unigram baseline"]  # 1.5 M, half of them
    assert going_on.severity == "note"
    assert "too early to tell, before 2,000,000 tokens" in going_on.text


@pytest.mark.parametrize("disease", ["other validation text", "gap", "unigram plateau"])
def test_an_evaluation_unlike_training_is_the_first_cause(disease):
    record, (check, _, _) = DISEASES[disease]
    other = dataclasses.replace(record, evaluation_knobs={"mask_rate": 0.3, "unknown": 1.0})
    told = "training unlike evaluation: mask_rate 0.15, in evaluation 0.3"
    assert diagnosed(other)[check].causes == (told, *diagnosed(record)[check].causes)


def test_large_batches_are_no_updates():
    """2.5 G tokens in 400 updates of a warm-up of 1,000: nothing can be told yet."""
    record = DISEASES["majority"][0]
    plateau = losses(lambda step: 6.5 + 1.8 * math.exp(-step / 100))
    for values in record.lines:
        plateau(values)
    config = record.config | {
        "train.batch_size": 50_000,
        "train.steps": 100_000,
        "optimizer.warmup": 1000,
    }

    def severities(until):
        long = dataclasses.replace(record, lines=record.lines[: until // 10], config=config)
        found = diagnosed(long)
        return [found[f"{name} baseline"].severity for name in ("unigram", "majority")]

    assert severities(400) == ["note", "note"]
    config["optimizer.warmup"] = 0
    assert severities(1990) == ["note", "note"]
    assert severities(2000) == ["warning", "warning"]


def test_a_knob_that_changes_excuses_a_training_loss_that_rises():
    curve = losses(lambda step: falling(step) if step < 1600 else 7.0)
    rising, knobs = edited(curve), edited(curve)
    for values in knobs.lines:
        values["train/knobs/mask_rate"] = values["step"] / STEPS
    assert diagnosed(rising)["learning"].severity == "warning"
    assert diagnosed(knobs)["learning"].severity == "ok"
    assert "train-validation gap" not in diagnosed(knobs)


def test_a_warm_start_need_not_begin_at_log_v():
    record = DISEASES["leaks from the first step"][0]
    warm = dataclasses.replace(record, config=record.config | {"init_from": "runs/other"})
    assert "first loss" not in diagnosed(warm)


def test_a_line_after_many_updates_does_not_tell_how_the_run_began():
    record = DISEASES["leaks from the first step"][0]
    long = record.config | {"train.steps": 100_000}
    later = dataclasses.replace(record, lines=record.lines[9:], config=long)
    assert diagnosed(later)["first loss"].severity == "ok"


def test_a_run_that_goes_on_is_judged_by_what_is_there():
    record = healthy()
    young = dataclasses.replace(record, lines=record.lines[:1])
    assert not [f for f in doctor.diagnose(young) if f.severity == "warning"]
    assert "stopped (no sign of life)" in diagnosed(young)["progress"].text
    empty = dataclasses.replace(record, lines=[])
    assert [finding.severity for finding in doctor.diagnose(empty)] == ["note", "note"]
    assert "no line" in diagnosed(empty)["metrics"].text


def test_a_run_that_left_its_population_before_its_first_line_is_warned_of(tmp_path):
    starts = [each | {"population": "one"} for each in healthy().starts]
    record = dataclasses.replace(healthy(), folder=tmp_path, lines=[], starts=starts)
    assert diagnosed(record)["progress"].severity == "note"
    run_folder.mark_left(tmp_path, "update 2 is not finite")
    finding = diagnosed(record)["progress"]
    assert finding.severity == "warning"
    assert "has left its population: update 2 is not finite" in finding.text
    alone = dataclasses.replace(record, starts=[*starts, starts[-1] | {"population": ""}])
    assert diagnosed(alone)["progress"].severity == "note"


def test_evaluations_that_are_not_finite_shift_no_other():
    """The unigram loss of step 200 is subtracted from no other step's loss."""
    record = edited(put(eval__masked_lm=late(5.0, None, 300), eval__unigram_loss=lambda s: s / 100))
    steps, excess = record.excess()
    assert steps.tolist() == list(range(400, 2001, 200))
    assert excess.tolist() == [5.0 - step / 100 for step in range(400, 2001, 200)]


def test_windows_without_a_finite_loss_are_left_out():
    def change(line):
        put(train__masked_lm=late(None, falling, 1300), eval__masked_lm=late(5.5, 5.0))(line)

    found = diagnosed(edited(change))
    assert "overfitting" not in found
    assert math.isfinite(found["train-validation gap"].figures["last"])
    never = diagnosed(edited(put(train__masked_lm=None)))
    assert not {"train-validation gap", "first loss"} & never.keys()


def test_an_objective_without_a_loss_of_tokens_is_compared_with_no_unigrams():
    found = diagnosed(dataclasses.replace(healthy(), term=""))
    missing = {"first loss", "unigram baseline", "leak", "overfitting", "train-validation gap"}
    assert diagnosed(healthy()).keys() - found.keys() == missing


@pytest.mark.parametrize(
    "host, seconds, severity, words",
    [
        ("here", 0, "ok", "it goes on"),
        ("here", 1e4, "note", "stopped"),
        ("there", 1e4, "ok", "of host there"),
    ],
)
def test_only_the_own_clock_says_for_how_long_a_run_is_silent(
    host, seconds, severity, words, monkeypatch
):
    sign = {"ended": None, "host": host, "time": time.time() - seconds}
    monkeypatch.setattr(machine.signs, "read", lambda folder: sign)
    monkeypatch.setattr(machine.platform, "node", lambda: "here")
    record = dataclasses.replace(healthy(), lines=healthy().lines[:100])
    finding = diagnosed(record)["progress"]
    assert (finding.severity, words in finding.text) == (severity, True)
