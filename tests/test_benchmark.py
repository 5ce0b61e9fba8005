"""What the benchmark times, by a clock that tests turn."""

import types

import pytest

from pretraining import benchmark

WAITS = (9.0, 8.0, 1.0, 2.0, 3.0)  # for the rows of each step
START = 10.0  # any step
FIGURES = (700.0, 100.0, 200.0, 400.0, 800.0)  # until those of each step are there


class Machine:
    """Steps that take the times above, and what was done when."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def perf_counter(self):
        return self.now

    def batches(self):
        for number, wait in enumerate(WAITS):
            self.now += wait
            yield number

    def update(self, state, rows):
        assert state == rows  # the state of the step before, and the next rows
        self.now += START
        self.done.append(f"start {rows}")
        return state + 1, rows

    def fetch(self, step):
        self.now += FIGURES[step]
        self.done.append(f"fetch {step}")


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    clock = types.SimpleNamespace(perf_counter=machine.perf_counter)
    monkeypatch.setattr(benchmark, "time", clock)
    monkeypatch.setattr(benchmark.metrics, "fetch", machine.fetch)
    return machine


def test_a_step_is_timed_from_end_to_end_without_the_first(machine):
    seconds, waits = benchmark.time_steps(machine.update, 0, machine.batches(), steps=3)
    # From the figures of one step to those of the next, which runs while the rows are awaited.
    assert seconds == [1 + 10 + 100, 2 + 10 + 200, 3 + 10 + 400]
    assert waits == [1, 2, 3]


def test_figures_are_fetched_while_the_next_step_runs(machine):
    benchmark.time_steps(machine.update, 0, machine.batches(), steps=3)
    assert machine.done == [
        "start 0",
        *("start 1", "fetch 0"),
        *("start 2", "fetch 1"),
        *("start 3", "fetch 2"),
        *("start 4", "fetch 3"),
    ]
