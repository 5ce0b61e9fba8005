"""A sample of the faults of `python -m tests.faults --all`: real processes, equal in the end."""

import functools
import json
import shutil
import signal
import sys

import numpy as np
import pytest

from pretraining import metrics
from pretraining.config import objective_names
from tests.faults import bench as runs
from tests.faults import faulty, kills, storage, suites, updates
from tests.faults.__main__ import status
from tests.faults.outcome import Outcome, table
from tests.running import finish, start

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
    "gradient": functools.partial(updates.not_finite, seed=0, kinds=["gradient"]),
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
    outcome = kills.kill_often(make(objective), seed=0, aims=AIMS[objective])
    check(outcome)
    assert outcome.injected == len(AIMS[objective])
    if "compile" in AIMS[objective]:  # the one phase that lasts until the kill for certain
        assert "compile" in outcome.note


@pytest.mark.parametrize("name", SAMPLE)
def test_a_run_survives(name, make):
    check(SAMPLE[name](make("masked_lm")))


def check(outcome: Outcome) -> None:
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.passed, "\n".join([table([outcome]), *outcome.complaints])


# --------------------------------------------------------------------- what the faults are told by


@pytest.mark.parametrize(
    "kill, following, complaints",
    [
        (kills.Kill("step", starts=1, saved=14), 14, 0),
        (kills.Kill("step", starts=1, saved=14), 7, 1),  # a whole checkpoint was not used
        (kills.Kill("save", starts=1, saved=14), 21, 1),  # one that was not whole was
        (kills.Kill("save", starts=2, saved=7), 7, 1),  # no start has followed
        (kills.Kill("start", starts=0, saved=0), 14, 0),
        (kills.Kill("step", starts=1, saved=14, complaint="it hangs"), 14, 1),
    ],
)
def test_a_kill_was_survived_if_the_next_start_goes_on(kill, following, complaints):
    assert len(kills.judge(kill, [0, following])) == complaints


def test_a_sign_that_does_not_come_is_a_complaint():
    process = start([sys.executable, "-c", ""])
    assert "did not come" in runs.kill_when(process, lambda: False)
    process = start([sys.executable, "-c", "import time; time.sleep(100)"])
    assert runs.kill_when(process, lambda: True) is None


def test_a_variable_can_be_removed(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    words = [sys.executable, "-c", "import os; print('JAX_COMPILATION_CACHE_DIR' in os.environ)"]
    assert finish(start(words)).out == "True\n"
    assert finish(start(words, JAX_COMPILATION_CACHE_DIR=None)).out == "False\n"


def test_the_faulty_objective_is_written_once(tmp_path):
    bench = runs.Bench(tmp_path, "masked_lm", {}, None)
    first = faulty.install(bench)
    path = tmp_path / "elsewhere/objectives/faulty.py"
    node = path.stat().st_ino
    assert faulty.install(bench) == first
    assert path.stat().st_ino == node
    assert [file.name for file in path.parent.iterdir()] == ["faulty.py"]


def test_a_report_of_other_tests_becomes_a_row(tmp_path):
    cases = [
        '<testcase name="good"/>',
        '<testcase name="bad"><failure message="one line"/></testcase>',
        '<testcase name="absent"><skipped message="no mount"/></testcase>',
    ]
    (tmp_path / "report.xml").write_text(f"<suites><suite>{''.join(cases)}</suite></suites>")
    outcome = Outcome("tests", "-")
    suites.read(tmp_path / "report.xml", outcome)
    assert (outcome.injected, outcome.survived, outcome.complaints) == (2, 1, ["bad: one line"])
    assert outcome.note == "1 passed, 1 failed, 1 skipped"
    assert outcome.skipped == "absent (no mount)"
    assert not outcome.passed


def test_everything_is_not_done_where_something_was_skipped():
    good, skipped = Outcome("kill", "one"), Outcome("disk", "one", skipped="no mount")
    good.count()
    bad = Outcome("kill", "two", complaints=["it hangs"])
    assert status([good], everything=True) == 0
    assert status([good, skipped], everything=False) == 0
    assert status([good, skipped], everything=True) == 1
    assert status([good, bad], everything=False) == 1


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
