"""A sample of the faults of `python -m tests.faults --all`: real processes, equal in the end."""

import functools
import json
import shutil
import signal

import numpy as np
import pytest

from pretraining import metrics
from pretraining.config import objective_names
from tests.faults import bench as runs
from tests.faults import kills, storage, updates
from tests.faults.outcome import Outcome, table

# Moments of the kills, in chains of one run.
AIMS = dict.fromkeys(objective_names(), ("step", "save")) | {
    "masked_lm": ("prepare", "save", "evaluate"),
    "replaced_token_detection": ("compile", "step", "save"),
}

SAMPLE = {
    "SIGTERM": functools.partial(kills.stop_by_signal, seed=0, numbers=[signal.SIGTERM]),
    "SIGINT": functools.partial(kills.stop_by_signal, seed=0, numbers=[signal.SIGINT]),
    "checkpoint": functools.partial(storage.damage_checkpoints, seed=0, kinds=["deleted"]),
    "disk": storage.fill_disk,
    "store": functools.partial(storage.damage_store, seed=0, kinds=["vocabulary swapped"]),
    "metrics": functools.partial(storage.cut_metrics, seed=0),
    "not finite": functools.partial(updates.not_finite, seed=0, kinds=["stop", "skip"]),
    "spike": functools.partial(updates.spike, seed=0),
}


@pytest.fixture(scope="module")
def make(trained, run_overrides, tmp_path_factory):
    """Makes the bench of an objective, on which what `trained` holds is the undisturbed run."""
    place = tmp_path_factory.mktemp("faults")

    def make(objective):
        folder = place / objective
        if not folder.exists():
            folder.mkdir()
            (folder / "reference").symlink_to(trained[objective])
        return runs.Bench(folder, objective, run_overrides, place / "compiled")

    return make


@pytest.mark.parametrize("objective", AIMS)
def test_a_run_survives_kills(objective, make):
    check(kills.kill_often(make(objective), seed=0, aims=AIMS[objective]))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_run_survives(name, make):
    check(SAMPLE[name](make("masked_lm")))


def check(outcome: Outcome) -> None:
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.passed, "\n".join([table([outcome]), *outcome.complaints])


# --------------------------------------------------------------------- what the faults are told by


@pytest.fixture
def finished(trained, tmp_path):
    """An undisturbed run, and a copy of it to be spoiled."""
    reference = trained["masked_lm"]
    shutil.copytree(reference, tmp_path / "copy")
    return reference, tmp_path / "copy"


def test_a_copy_is_equal(finished):
    reference, copy = finished
    assert runs.differences(copy, reference) == runs.remains(copy) == []


def test_another_figure_is_a_difference_and_another_time_is_none(finished):
    reference, copy = finished
    lines = metrics.read(copy / metrics.FILE)
    lines[4]["time/step_s"] += 1.0
    (copy / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.differences(copy, reference) == []
    lines[7]["train/loss"] = float(np.nextafter(lines[7]["train/loss"], 0))
    (copy / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.differences(copy, reference) == ["step 8 differs in train/loss"]


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, lines[-1]]])
def test_a_missing_line_and_one_that_is_there_twice_are_differences(change, finished):
    reference, copy = finished
    lines = change((copy / metrics.FILE).read_text().splitlines())
    (copy / metrics.FILE).write_text("\n".join(lines))
    (found,) = runs.differences(copy, reference)
    assert found.startswith("metrics of the steps [1, 2, ")


def test_another_state_is_a_difference_in_every_part_of_it(finished):
    reference, copy = finished
    saved = runs.checkpoints(copy)
    shutil.rmtree(saved / "40")
    shutil.copytree(saved / "35", saved / "40")
    found = runs.differences(copy, reference)
    assert {line.split("/")[0] for line in found} == {"params", "optimizer", "ema", "rest"}
    assert "rest/step differs" in found


@pytest.mark.parametrize(
    "name",
    ["checkpoints/42.orbax-checkpoint-tmp", ".metrics.jsonl.17", "checkpoints/4/m.tmp"],
)
def test_what_is_left_lying_is_seen(name, finished):
    _, copy = finished
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("")
    assert runs.remains(copy) == [f"left lying: {copy / name}"]


def test_the_table_tells_failures_from_faults_that_were_survived():
    survived = Outcome("kill", "one", note="step 2")
    survived.count()
    survived.count(None, None)
    failed = Outcome("kill", "two")
    failed.count("it hangs")
    skipped = Outcome("disk", "one", skipped="no mount")
    nothing = Outcome("signal", "one")
    assert [each.passed for each in (survived, failed, skipped, nothing)] == [1, 0, 1, 0]
    assert table([survived, failed, skipped]).splitlines() == [
        "fault  objective  injected  survived  bit-equal",
        "kill   one        2         2         0 of 0     step 2",
        "kill   two        1         0         0 of 0     FAILED",
        "disk   one        -         -         -          skipped: no mount",
    ]
    unequal = Outcome("kill", "one", injected=1, survived=1, compared=2, equal=1)
    assert not unequal.passed
