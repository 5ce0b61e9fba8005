"""Every second of a run belongs to one phase, over all its starts."""

import sys
import time

import pytest

from pretraining import goodput
from tests.running import finish, start


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def walk(ledger, time, *stay):
    for phase, seconds in stay:
        ledger.enter(phase)
        time.now += seconds


def test_time_belongs_to_the_phase_that_was_entered():
    clock = Time()
    ledger = goodput.Ledger(age=2.0, clock=clock)
    clock.now += 1.0
    walk(ledger, clock, ("compile", 5.0), ("step", 10.0), ("data_wait", 1.0), ("step", 4.0))
    expected = dict.fromkeys(goodput.PHASES, 0.0)
    expected |= {"start": 3.0, "compile": 5.0, "step": 14.0, "data_wait": 1.0}
    assert ledger.totals() == expected
    ledger.step = 7
    assert ledger.status() == {
        "step": 7,
        "phase": "step",
        "entered": 4,
        "finished": False,
        "totals": expected,
    }


def later(ledger, seconds, clock, age=1.0):
    """The ledger of a start that begins so many seconds after the last sign of another one."""
    sign = ledger.status() | {"time": time.time() - age - seconds}
    return goodput.Ledger(age, sign, clock)


def test_what_a_crash_took_back_is_lost():
    """Killed 50 s after its last sign of life before the next start."""
    clock = Time()
    first = goodput.Ledger(clock=clock)
    walk(first, clock, ("compile", 5.0), ("step", 20.0), ("evaluate", 2.0), ("save", 1.0))
    at_checkpoint = first.totals()
    walk(first, clock, ("step", 8.0), ("data_wait", 3.0))
    second = later(first, 50.0, clock)
    second.go_back(at_checkpoint)
    walk(second, clock, ("compile", 4.0), ("step", 6.0))
    assert second.totals() == pytest.approx(
        {
            "start": 1.0,
            "prepare": 0.0,
            "compile": 9.0,
            "step": 26.0,
            "data_wait": 0.0,
            "evaluate": 2.0,
            "save": 1.0,
            "lost": 11.0,
            "down": 50.0,
        },
        abs=0.1,
    )


def test_a_checkpoint_that_is_younger_than_the_last_sign():
    """The sign was given 4 s before the end, the checkpoint saved 1 s before it."""
    clock = Time()
    first = goodput.Ledger(clock=clock)
    walk(first, clock, ("step", 20.0))
    sign = later(first, 54.0, clock)
    walk(first, clock, ("step", 2.0), ("save", 1.0))
    sign.go_back(first.totals())
    totals = sign.totals()
    assert (totals["step"], totals["save"], totals["lost"]) == (22.0, 1.0, 0.0)
    assert totals["down"] == pytest.approx(51.0, abs=0.1)


def test_a_start_that_was_refused_forgets_nothing():
    clock = Time()
    first = goodput.Ledger(clock=clock)
    walk(first, clock, ("step", 20.0))
    at_checkpoint = first.totals()
    refused = later(first, 10.0, clock)  # ends before it knows of a checkpoint
    third = later(refused, 10.0, clock)
    third.go_back(at_checkpoint)
    totals = third.totals()
    assert (totals["step"], totals["lost"], totals["start"]) == (20.0, 0.0, 2.0)
    assert totals["down"] == pytest.approx(20.0, abs=0.1)


def test_after_the_end_of_a_run_nothing_is_down():
    clock = Time()
    first = goodput.Ledger(clock=clock)
    walk(first, clock, ("step", 20.0))
    first.finished = True
    assert later(first, 1e6, clock).totals()["down"] == 0.0


@pytest.mark.parametrize("sign", [None, {}, {"totals": {"step": 1.0}}])
def test_a_first_start_has_nothing_to_add(sign):
    ledger = goodput.Ledger(age=1.0, sign=sign, clock=Time())
    ledger.go_back({})
    assert sum(ledger.totals().values()) == 1.0


def test_a_rewind_loses_what_it_takes_back():
    clock = Time()
    ledger = goodput.Ledger(clock=clock)
    walk(ledger, clock, ("step", 20.0))
    at_checkpoint = ledger.totals()
    walk(ledger, clock, ("step", 5.0), ("save", 1.0), ("start", 0.0))
    ledger.go_back(at_checkpoint)
    walk(ledger, clock, ("step", 7.0))
    totals = ledger.totals()
    assert (totals["step"], totals["lost"], totals["save"]) == (27.0, 5.0, 1.0)


def test_of_what_runs_share_each_counts_its_share(monkeypatch):
    """A quarter of everything: 2 s before the ledger, 40 s down, 10 s of updates, 2 s of saving."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    clock, totals = Time(), dict.fromkeys(goodput.PHASES, 0.0)
    sign = {"totals": totals | {"step": 5.0}, "time": 958.0, "finished": False}
    ledger = goodput.Ledger(2.0, sign, clock, share=0.25)
    walk(ledger, clock, ("step", 10.0), ("save", 2.0))
    assert ledger.totals() == totals | {"start": 0.5, "step": 7.5, "save": 0.5, "down": 10.0}


def test_a_metrics_line_holds_all_of_it():
    totals = {phase: float(place) for place, phase in enumerate(goodput.PHASES)}
    line = goodput.figures(totals)
    assert line.pop("time/goodput") == totals["step"] / 36
    assert line == {f"time/total/{phase}": seconds for phase, seconds in totals.items()}


def test_the_summary_leaves_out_what_took_no_time():
    totals = dict.fromkeys(goodput.PHASES, 0.0) | {"step": 750.0, "data_wait": 250.0, "save": 0.1}
    assert goodput.summary(totals) == "Wall time 1,000 s: step 75.0%, data wait 25.0%"


def test_the_age_of_a_process_counts_from_its_start_not_from_the_first_import():
    """To a second: Linux tells only in whole ones when it was booted."""
    program = """
import time
time.sleep(2.5)
from pretraining import goodput
for _ in range(2):
    print(time.time(), goodput.process_age(), time.time())
    time.sleep(0.5)
"""
    before = time.time()
    process = start([sys.executable, "-c", program])
    status, out, err = finish(process)
    assert status == 0, err
    told = [map(float, line.split()) for line in out.splitlines()]
    began = [(earliest - age, latest - age) for earliest, age, latest in told]
    assert began[0][0] == pytest.approx(before, abs=1.2)
    # Both ages are counted from one moment, however long the process waited between its clocks.
    assert max(first for first, _ in began) <= min(last for _, last in began) + 1e-6
