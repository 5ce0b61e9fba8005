"""Where the wall time of a run went, over all its starts.

start      the program and its libraries, the check of the run folder, the restored checkpoint
prepare    text into tokens, or the opening of stores that are there
compile    of the update; that of the evaluation belongs to `evaluate`
step       updates
data_wait  waiting for rows
evaluate   held-out figures
save       checkpoints, as far as training waits for them
lost       updates, waits and evaluations that a crash took back, and that were done again
down       between the last sign of life of one start and the next start
"""

import threading
import time
from collections.abc import Callable, Mapping

import psutil

PHASES = (
    "start",
    "prepare",
    "compile",
    "step",
    "data_wait",
    "evaluate",
    "save",
    "lost",
    "down",
)
_REPEATED = ("step", "data_wait", "evaluate")  # what is done again after a crash
PREFIX = "time/total/"  # of the totals in metrics.jsonl


class Ledger:
    """Seconds by phase; every moment belongs to one. Read from other threads, too.

    Attributes:
      step: the step that the program is at, for those who watch it.
      entered: phases entered so far: of two processes the one with fewer is behind.
      earlier: the last sign of life of the start before this one, with `totals` and the `time` in
        seconds since 1970; None = there was none.
    """

    def __init__(self, age: float = 0.0, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._lock, self._began = clock, threading.Lock(), time.time() - age
        self._totals = dict.fromkeys(PHASES, 0.0) | {"start": age}
        self._phase, self._since = "start", clock()
        self.step = self.entered = 0
        self.earlier: Mapping | None = None

    def enter(self, phase: str) -> None:
        """From now on time belongs to `phase`, one of PHASES."""
        with self._lock:
            now = self._clock()
            self._totals[self._phase] += now - self._since
            self._phase, self._since = phase, now
            self.entered += 1

    def totals(self) -> dict[str, float]:
        """{phase: seconds} until now."""
        with self._lock:
            running = self._clock() - self._since
            return self._totals | {self._phase: self._totals[self._phase] + running}

    def status(self) -> dict:
        """What a watcher wants to know: step, phase, phases entered, and totals."""
        return {
            "step": self.step,
            "phase": self._phase,
            "entered": self.entered,
            "totals": self.totals(),
        }

    def go_on(self, at_checkpoint: Mapping[str, float]) -> None:
        """Adds the starts before this one, as far as `earlier` tells of them.

        Args:
          at_checkpoint: totals at the step that is gone on from.
        """
        if not self.earlier:
            return
        with self._lock:
            for phase, seconds in self.earlier["totals"].items():
                self._totals[phase] += seconds
            self._totals["down"] += max(self._began - self.earlier["time"], 0.0)
        self.lose(at_checkpoint)

    def lose(self, at_checkpoint: Mapping[str, float]) -> None:
        """What was done since the totals were those is to be done again."""
        with self._lock:
            for phase in _REPEATED:
                self._totals["lost"] += self._totals[phase] - at_checkpoint[phase]
                self._totals[phase] = at_checkpoint[phase]


def process_age() -> float:
    """Seconds since this process began."""
    return max(time.time() - psutil.Process().create_time(), 0.0)


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """The entries of a metrics line: each total, and the share of all time that made steps."""
    everything = sum(totals.values())
    named = {PREFIX + phase: seconds for phase, seconds in totals.items()}
    return named | {"time/goodput": totals["step"] / everything if everything else 0.0}


def read(lines: list[dict], step: int) -> dict[str, float]:
    """The totals in the last metrics line that is not after `step`; zeros where there is none."""
    for line in reversed(lines):
        if line["step"] <= step and PREFIX + "step" in line:
            return {phase: line[PREFIX + phase] for phase in PHASES}
    return dict.fromkeys(PHASES, 0.0)


def summary(totals: Mapping[str, float]) -> str:
    """One line for people: all time, and the share of each phase that took any."""
    everything = sum(totals.values())
    shares = [
        f"{phase.replace('_', ' ')} {seconds / everything:.1%}"
        for phase, seconds in totals.items()
        if seconds >= 0.0005 * everything > 0
    ]
    return f"Wall time {everything:,.0f} s: {', '.join(shares)}"
