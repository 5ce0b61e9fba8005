"""metrics.jsonl is cut back and repaired; the speed is that of updates alone."""

import json

import pytest
from ml_collections import ConfigDict

from pretraining import goodput, metrics

CONFIG = ConfigDict(dict(log=dict(tensorboard=False, wandb="")))


def test_a_resumed_file_loses_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / metrics.FILE
    whole = "".join(json.dumps({"step": step, "train/loss": step / 2}) + "\n" for step in (1, 2, 3))
    path.write_text(whole + '{"step": 4, "train/lo')
    writer = metrics.Writer(tmp_path, CONFIG, step=2)
    writer.write(3, {"train/loss": 7.0})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in metrics.read(path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 7.0),
    ]


def test_a_half_line_is_left_out_when_reading(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_text('{"step": 1}\n{"st')
    assert metrics.read(path) == [{"step": 1}]
    assert metrics.read(tmp_path / "none") == []


def test_floats_are_written_exactly(tmp_path):
    value = 0.1 + 2**-50
    writer = metrics.Writer(tmp_path, CONFIG, step=0)
    writer.write(1, {"train/loss": value})
    writer.close()
    assert metrics.read(tmp_path / metrics.FILE)[0]["train/loss"] == value


def test_a_member_has_the_tokens_of_all_in_its_share_of_their_time():
    """Four share updates of 4 s, of which 1 s is waiting."""
    now = [0.0]
    ledger = goodput.Ledger(clock=lambda: now[0], share=0.25)
    speed = metrics.Speed(ledger, step_tokens=800, step_flops=2e8, peak=1e9, share=0.25)
    for phase, seconds in (("data_wait", 1.0), ("step", 3.0)):
        ledger.enter(phase)
        now[0] += seconds
    speed.stepped()
    assert speed.figures(steps_left=5) == {
        "time/step_s": 1.0,
        "time/tokens_per_s": 800.0,
        "time/mfu": 0.2,
        "time/peak_flops": 1e9,
        "time/data_wait": 0.25,
        "time/eta_s": 20.0,
    }


def test_speed_counts_updates_and_their_waiting_alone():
    now = [0.0]
    ledger = goodput.Ledger(clock=lambda: now[0])
    speed = metrics.Speed(ledger, step_tokens=800, step_flops=2e9, peak=1e9)
    for _ in range(2):
        ledger.enter("evaluate")
        now[0] += 100.0
        ledger.enter("data_wait")
        now[0] += 1.0
        ledger.enter("step")
        now[0] += 3.0
        speed.stepped()
    assert speed.figures(steps_left=5) == pytest.approx(
        {
            "time/step_s": 4.0,
            "time/tokens_per_s": 200.0,
            "time/mfu": 0.5,
            "time/peak_flops": 1e9,
            "time/data_wait": 0.25,
            "time/eta_s": 20.0,
        }
    )
    now[0] += 7.0
    assert speed.figures(4) == {}
    ledger.enter("step")
    now[0] += 2.0
    speed.stepped()
    assert speed.figures(3)["time/step_s"] == 2.0
