"""The clock of a run, through the loop's own report: a step's time is counted once and whole."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from pretraining import metrics, train


@pytest.mark.parametrize("every", [1, 2, 10])
def test_step_time_holds_the_wait_for_the_device(every, monkeypatch, tmp_path):
    """A device that needs 1.00 s a step, fetched one step late, and 0.25 s of waiting for rows."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train.flops, "step_flops", lambda *_: 5e9)
    monkeypatch.setattr(train.flops, "peak_flops", lambda *_: 1e10)
    config = ConfigDict(
        dict(
            train=dict(batch_size=4, steps=100),
            data=dict(sequence_length=28),
            log=dict(every=every, tensorboard=False, wandb="", profile_start=0, profile_steps=1),
        )
    )
    prepared = types.SimpleNamespace(vocabulary=None)
    report = train.Report(tmp_path, config, prepared, 0, None)

    def fetch(figures):
        now[0] = max(now[0], figures["done"])
        return {"loss": 1.0, "finite": True}

    monkeypatch.setattr(train.metrics, "fetch", fetch)
    done = 0.0
    for step in range(1, 31):
        report.clock.resume()
        now[0] += 0.25
        report.clock.waited()
        done = max(done, now[0]) + 0.75  # the device is busy until then
        report.push(step, {"done": done})
    report.close()
    lines = metrics.read(tmp_path / metrics.FILE)
    assert [line["step"] for line in lines] == [s for s in range(1, 30) if s % every == 0]
    for line in lines[2:]:
        np.testing.assert_allclose(line["time/step_s"], 0.75, rtol=0.02)
        np.testing.assert_allclose(line["time/tokens_per_s"], 100 / line["time/step_s"])
        np.testing.assert_allclose(line["time/mfu"], 0.5 / line["time/step_s"])
        np.testing.assert_allclose(line["time/data_wait"], 0.25 / line["time/step_s"], rtol=0.02)
