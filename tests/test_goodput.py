"""Every second of a run belongs to one phase, over all its starts."""

import pytest

from pretraining import goodput


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def walk(ledger, time, *stay):
    for phase, seconds in stay:
        ledger.enter(phase)
        time.now += seconds


def test_time_belongs_to_the_phase_that_was_entered():
    time = Time()
    ledger = goodput.Ledger(age=2.0, clock=time)
    time.now += 1.0
    walk(ledger, time, ("compile", 5.0), ("step", 10.0), ("data_wait", 1.0), ("step", 4.0))
    expected = dict.fromkeys(goodput.PHASES, 0.0)
    expected |= {"start": 3.0, "compile": 5.0, "step": 14.0, "data_wait": 1.0}
    assert ledger.totals() == expected
    ledger.step = 7
    assert ledger.status() == {"step": 7, "phase": "step", "entered": 4, "totals": expected}


def test_what_a_crash_took_back_is_lost():
    """Killed 50 s after its last sign of life before the next start."""
    time = Time()
    first = goodput.Ledger(clock=time)
    walk(first, time, ("compile", 5.0), ("step", 20.0), ("evaluate", 2.0), ("save", 1.0))
    at_checkpoint = first.totals()
    walk(first, time, ("step", 8.0), ("data_wait", 3.0))
    at_death = first.totals()
    second = goodput.Ledger(age=1.0, clock=time)
    second.earlier = {"totals": at_death, "time": second._began - 50.0}
    second.go_on(at_checkpoint)
    walk(second, time, ("compile", 4.0), ("step", 6.0))
    assert second.totals() == {
        "start": 1.0,
        "prepare": 0.0,
        "compile": 9.0,
        "step": 26.0,
        "data_wait": 0.0,
        "evaluate": 2.0,
        "save": 1.0,
        "lost": 11.0,
        "down": 50.0,
    }
    assert sum(second.totals().values()) == 5 + 20 + 2 + 1 + 8 + 3 + 50 + 1 + 4 + 6


def test_a_first_start_has_nothing_to_add():
    ledger = goodput.Ledger(age=1.0, clock=Time())
    ledger.go_on(dict.fromkeys(goodput.PHASES, 0.0))
    assert sum(ledger.totals().values()) == 1.0


def test_a_rewind_loses_what_it_takes_back():
    time = Time()
    ledger = goodput.Ledger(clock=time)
    walk(ledger, time, ("step", 20.0))
    at_checkpoint = ledger.totals()
    walk(ledger, time, ("step", 5.0), ("save", 1.0))
    ledger.lose(at_checkpoint)
    walk(ledger, time, ("step", 7.0))
    totals = ledger.totals()
    assert (totals["step"], totals["lost"], totals["save"]) == (27.0, 5.0, 1.0)


def test_totals_go_through_a_metrics_line():
    totals = {phase: float(place) for place, phase in enumerate(goodput.PHASES)}
    line = goodput.figures(totals)
    assert line["time/goodput"] == totals["step"] / 36
    lines = [
        {"step": 5, **line},
        {"step": 6},
        {"step": 9, **goodput.figures(totals | {"step": 1.0})},
    ]
    assert goodput.read(lines, 8) == totals
    assert goodput.read(lines, 9) == totals | {"step": 1.0}
    assert goodput.read(lines, 4) == dict.fromkeys(goodput.PHASES, 0.0)


def test_the_summary_leaves_out_what_took_no_time():
    totals = dict.fromkeys(goodput.PHASES, 0.0) | {"step": 750.0, "data_wait": 250.0, "save": 0.1}
    assert goodput.summary(totals) == "Wall time 1,000 s: step 75.0%, data wait 25.0%"


def test_this_process_has_an_age():
    assert goodput.process_age() == pytest.approx(goodput.process_age(), abs=5.0)
    assert goodput.process_age() > 0.1
