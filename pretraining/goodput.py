"""Where the wall time of a run went, over all its starts.

start      the program and its libraries, checks, the restored checkpoint, the summary at the end
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
from typing import Any

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

    Args:
      age: seconds of this program before the ledger.
      sign: the last sign of life of the start before this one, with its `totals`, the `time` in
        seconds since 1970, and whether it had `finished` the run; None = there was none.
      share: what is counted of each second: runs that share a program share its time.

    Attributes:
      step: the step that the program is at, for those who watch it.
      entered: phases entered so far: of two processes the one with fewer is behind.
      finished: the run is at its end: what follows until another start is no part of it.
    """

    def __init__(
        self,
        age: float = 0.0,
        sign: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        share: float = 1.0,
    ):
        self._clock, self._lock = lambda: share * clock(), threading.Lock()
        self._totals = dict.fromkeys(PHASES, 0.0)
        if sign and sign.get("totals", {}).keys() == self._totals.keys():
            self._totals |= sign["totals"]
            if not sign["finished"]:
                self._totals["down"] += share * max(time.time() - age - sign["time"], 0.0)
        self._totals["start"] += share * age
        self._phase, self._since = "start", self._clock()
        self.step = self.entered = 0
        self.finished = False

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

    def status(self) -> dict[str, Any]:
        """What a watcher wants to know."""
        return {
            "step": self.step,
            "phase": self._phase,
            "entered": self.entered,
            "finished": self.finished,
            "totals": self.totals(),
        }

    def go_back(self, at_checkpoint: Mapping[str, float]) -> None:
        """What was done since a checkpoint is to be done again, and so was lost.

        The last sign of life may be older than the checkpoint: what is missing in it was taken for
        `down`. To be called in a phase that is never repeated.

        Args:
          at_checkpoint: totals when it was saved; {} = the beginning of the run.
        """
        with self._lock:
            for phase in PHASES[:-1]:
                then = at_checkpoint.get(phase, 0.0)
                more = self._totals[phase] - then
                if more < 0:
                    self._totals[phase] = then
                    self._totals["down"] = max(self._totals["down"] + more, 0.0)
                elif phase in _REPEATED:
                    self._totals[phase] = then
                    self._totals["lost"] += more


def process_age() -> float:
    """Seconds since this process began."""
    return max(time.time() - psutil.Process().create_time(), 0.0)


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """The entries of a metrics line: each total, and the share of all time that made steps."""
    everything = sum(totals.values())
    named = {PREFIX + phase: seconds for phase, seconds in totals.items()}
    return named | {"time/goodput": totals["step"] / everything if everything else 0.0}


def summary(totals: Mapping[str, float]) -> str:
    """One line for people: all time, and the share of each phase that took any."""
    everything = sum(totals.values())
    shares = [
        f"{phase.replace('_', ' ')} {seconds / everything:.1%}"
        for phase, seconds in totals.items()
        if seconds >= 0.0005 * everything > 0
    ]
    return f"Wall time {everything:,.0f} s: {', '.join(shares)}"
