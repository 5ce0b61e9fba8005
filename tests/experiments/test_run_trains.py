"""A sweep of real runs, killed with -9 in the middle and started again."""

import sys

import pytest

from pretraining import metrics
from tests import running
from tests.faults import bench

QUESTION = """'''Twice the same.'''
from experiments.question import Figure, Protocol, Run
PROTOCOLS = {{"tiny": Protocol("small", "")}}
BASELINE = "first"
FIGURES = (Figure("eval/loss", "Loss", "lower"),)
def runs(protocol):
    return [Run(name, 0, "configs/masked_lm.py:tiny", {overrides}) for name in ("first", "second")]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed sweep elsewhere")
def test_a_sweep_killed_in_the_middle_is_gone_on_with_bit_for_bit(trained, run_overrides, tmp_path):
    """Both runs must end as the one that nobody disturbed and that no sweep started."""
    (tmp_path / "sweep.py").write_text(QUESTION.format(overrides=repr(run_overrides)))
    folder = tmp_path / "R"
    runs = [folder / "runs" / f"{name}-seed0" for name in ("first", "second")]
    words = [sys.executable, "-m", "experiments.run", str(tmp_path), f"--workdir={folder}"]

    process = running.start(words)
    killed_at = lambda: bench.saved_steps(runs[1]) >= [bench.SAVE_EVERY]
    problem = bench.kill_when(process, killed_at)
    assert problem is None, problem
    untouched = {path: path.stat().st_mtime_ns for path in bench.files(runs[0])}

    ended = running.finish(running.start(words))
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1] == "2 runs: 2 done"
    assert {path: path.stat().st_mtime_ns for path in bench.files(runs[0])} == untouched
    assert bench.starting_steps(runs[0]) == [0]
    first, again = bench.starting_steps(runs[1])
    assert (first, 0 < again < bench.STEPS) == (0, True)
    for run in runs:
        assert bench.differences(run, trained["masked_lm"]) == []

    loss = metrics.read(trained["masked_lm"] / metrics.FILE)[-1]["eval/loss"]
    table = (folder / "runs.csv").read_text().splitlines()[1:]
    assert [f",done,40,40,{loss:.6g}," in line for line in table] == [True, True]
