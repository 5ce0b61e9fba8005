"""The speed of a run, through the loop's own report: a step's time is counted once and whole."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from pretraining import goodput, metrics, report


@pytest.fixture
def now(monkeypatch):
    """The time, and an update that takes no figures but when it is done."""
    time = [0.0]
    monkeypatch.setattr(report.flops, "step_flops", lambda *_: 5e9)

    def fetch(figures):
        time[0] = max(time[0], figures["done"])
        return {"loss": 1.0, "finite": True, "skipped_in_a_row": 0}

    monkeypatch.setattr(report.metrics, "fetch", fetch)
    return time


def make_report(folder, every, ledger, judge):
    config = ConfigDict(
        dict(
            train=dict(batch_size=4, steps=100),
            data=dict(sequence_length=28),
            log=dict(every=every, tensorboard=False, wandb="", profile_start=0, profile_steps=1),
        )
    )
    guard, work = types.SimpleNamespace(judge=judge, rewinds=2), report.work(config, None)
    speed = metrics.Speed(ledger, peak=1e10, **work)
    return report.Report(report.Lines(folder, config, 0, ledger, guard, speed), folder, config, 0)


@pytest.mark.parametrize("every", [1, 2, 10])
def test_step_time_holds_the_wait_for_the_device(every, now, tmp_path):
    """A device that needs 1.00 s a step, fetched one step late, and 0.25 s of waiting for rows."""
    ledger = goodput.Ledger(clock=lambda: now[0])
    told = make_report(tmp_path, every, ledger, lambda *_: False)
    done = 0.0
    for step in range(1, 31):
        ledger.enter("data_wait")
        now[0] += 0.25
        ledger.enter("step")
        done = max(done, now[0]) + 0.75  # the device is busy until then
        told.push(step, {"done": done}, None)
    told.close()
    lines = metrics.read(tmp_path / metrics.FILE)
    assert [line["step"] for line in lines] == [s for s in range(1, 30) if s % every == 0]
    for line in lines[2:]:
        np.testing.assert_allclose(line["time/step_s"], 0.75, rtol=0.02)
        np.testing.assert_allclose(line["time/tokens_per_s"], 100 / line["time/step_s"])
        np.testing.assert_allclose(line["time/mfu"], 0.5 / line["time/step_s"])
        np.testing.assert_allclose(line["time/data_wait"], 0.25 / line["time/step_s"], rtol=0.02)
        assert sum(line[f"time/total/{phase}"] for phase in goodput.PHASES) <= now[0]
        assert line["train/rewinds"] == 2.0


def test_an_unusual_update_is_logged_though_no_line_is_due(now, tmp_path):
    seen = []

    def judge(step, figures, rows):
        seen.append((step, rows))
        return step == 7

    ledger = goodput.Ledger(clock=lambda: now[0])
    told = make_report(tmp_path, 10, ledger, judge)
    ledger.enter("step")
    for step in range(1, 13):
        told.push(step, {"done": float(step)}, f"rows of {step}")
    told.close()
    assert [line["step"] for line in metrics.read(tmp_path / metrics.FILE)] == [7, 10]
    assert seen == [(step, f"rows of {step}") for step in range(1, 12)]
