"""Processes that are killed, at any moment, and stopped by signals."""

import collections
import dataclasses
import itertools
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

import numpy as np

from pretraining import checkpoint, metrics, run_folder, signs
from tests.faults import bench as runs
from tests.faults.bench import Bench
from tests.faults.outcome import Outcome

# Phases that are aimed at, and how often. What is aimed at a save may hit the step after it.
AIMS = {"prepare": 0.16, "compile": 0.16, "step": 0.24, "save": 0.24, "evaluate": 0.2}


def kill_often(bench: Bench, seed: int, count: int = 50, aims: Sequence[str] = ()) -> Outcome:
    """`kill -9` at random moments, `count` of them or as many as there are `aims`.

    A run is killed, started again in the same folder and killed again, until it comes to its end
    before its killer; then it must equal the undisturbed one, and the next run begins.
    """
    outcome, random = Outcome("kill -9", bench.objective), runs.generator(bench, seed)
    wanted, died = runs.reference(bench), collections.Counter()
    victims = (Victim(bench, bench.folder / f"killed_{n}", random) for n in itertools.count())
    victim = next(victims)
    for aim in aims or random.choice(list(AIMS), size=count, p=list(AIMS.values())).tolist():
        while (struck := victim.strike(aim)) is None:
            _end(victim, wanted, outcome)
            victim = next(victims)
        phase, complaint = struck
        died[phase] += 1
        outcome.count(complaint)
    _end(victim, wanted, outcome)
    outcome.note = ", ".join(f"{phase} {died[phase]}" for phase in sorted(died))
    return outcome


def _end(victim: "Victim", wanted: pathlib.Path, outcome: Outcome) -> None:
    outcome.complaints += victim.complete()
    outcome.compare(victim.folder, wanted)


@dataclasses.dataclass
class Victim:
    """A run that is killed again and again.

    Attributes:
      cache: of its token stores; a kill while preparing is aimed at a new one, in which the next
        start goes on.
    """

    bench: Bench
    folder: pathlib.Path
    generator: np.random.Generator
    caches: int = 0
    cache: pathlib.Path | None = None

    def strike(self, aim: str) -> tuple[str, str | None] | None:
        """(phase in which the program died; what is wrong); None = it had ended before."""
        if aim == "prepare":
            self._renew_cache()
        launched, starts = time.time(), len(runs.starting_steps(self.folder))
        process = self._launch(compiled=aim != "compile")
        sign, longest = self._sign(aim, starts, launched)
        if runs.wait_for(process, sign):
            time.sleep(float(self.generator.uniform(0, longest)))
        process.kill()
        ended = runs.finish(process)
        if ended.status == 0:
            return None
        phase = self._died_in(process, starts, launched)
        return phase, ended.problem(-signal.SIGKILL)

    def complete(self) -> list[str]:
        """Trains to the end; what is wrong then."""
        problem = runs.finish(self._launch()).problem()
        left = runs.remains(self.cache) if self.cache else []
        return [*([problem] if problem else []), *left]

    def _renew_cache(self) -> None:
        """A new one, unless the last is not complete: what a dead process left is the point."""
        if self.cache is None or any(self.cache.glob(f"stores/*/{checkpoint.MANIFEST}")):
            self.caches += 1
            self.cache = self.folder.with_name(f"{self.folder.name}_cache_{self.caches}")

    def _launch(self, compiled: bool = True) -> subprocess.Popen:
        bench = self.bench if compiled else self.bench._replace(compiled=None)
        changes = {"data.cache": self.cache} if self.cache else {}
        return runs.launch(bench, self.folder, changes | {"guard.silence": 0.4})

    def _sign(self, aim: str, starts: int, launched: float) -> tuple[Callable[[], bool], float]:
        """(the sign that a phase has come near, most seconds to wait after it)."""
        if aim == "prepare":
            return lambda: any(self.cache.glob("*/*")), 0.5
        if aim == "compile":
            return lambda: len(runs.starting_steps(self.folder)) > starts, 3.0
        if aim == "save":
            return lambda: _is_saving(self.folder, launched), 0.03
        saved = max(runs.saved_steps(self.folder), default=0)
        if aim == "evaluate":
            step, longest = saved - saved % runs.EVALUATE_EVERY + runs.EVALUATE_EVERY - 1, 0.02
        else:
            step = saved + int(self.generator.integers(1, runs.SAVE_EVERY + 3))
            longest = 0.02
        step = min(step, runs.STEPS - 1)
        return lambda: _began(self.folder, starts) and runs.last_step(self.folder) >= step, longest

    def _died_in(self, process: subprocess.Popen, starts: int, launched: float) -> str:
        """Where files tell, they do: a sign of life may be older than what it tells of."""
        if _is_saving(self.folder, launched):
            return "save"
        sign = signs.read(self.folder)
        told = sign["phase"] if sign and sign["pid"] == process.pid else None
        if len(runs.starting_steps(self.folder)) == starts:
            partial = self.cache.glob("*/*.partial-*") if self.cache else ()
            preparing = any(path.stat().st_ctime > launched for path in partial)
            return "prepare" if preparing else told or "start"
        if not _began(self.folder, starts):
            return "start" if told == "start" else "compile"
        next_step = runs.last_step(self.folder) + 1
        evaluating = next_step == runs.STEPS or next_step % runs.EVALUATE_EVERY == 0
        return "evaluate" if evaluating else "step"


def _is_saving(folder: pathlib.Path, launched: float) -> bool:
    """Whether a checkpoint that was begun since `launched` is not sealed."""
    try:
        return any(
            path.stat().st_ctime > launched
            for path in runs.checkpoints(folder).glob("[0-9]*")
            if not (path / checkpoint.MANIFEST).exists()
        )
    except FileNotFoundError:  # it was just renamed
        return True


def _began(folder: pathlib.Path, starts: int) -> bool:
    """Whether this start has made updates: the lines of an earlier one may still be there."""
    steps, lines = runs.starting_steps(folder), folder / metrics.FILE
    if len(steps) == starts or not lines.exists():
        return False
    newer = lines.stat().st_mtime_ns > (folder / run_folder.PROVENANCE).stat().st_mtime_ns
    return newer and runs.last_step(folder) > steps[-1]


def stop_by_signal(bench: Bench, seed: int, numbers=(signal.SIGTERM, signal.SIGINT)) -> Outcome:
    """SIGTERM and SIGINT at random steps: saved at the current step, told by the exit status."""
    outcome, generator = Outcome("signal", bench.objective), runs.generator(bench, seed)
    wanted = runs.reference(bench)
    for number in numbers:
        folder = bench.folder / f"stopped_by_{number.name}"
        step = int(generator.integers(1, 25))
        process = runs.launch(bench, folder)
        runs.wait_for(process, lambda step=step, folder=folder: runs.last_step(folder) >= step)
        process.send_signal(number)
        ended = runs.finish(process)
        saved = max(runs.saved_steps(folder), default=0)
        told = f"stopped by a signal at step {saved};" in ended.out
        lost = saved < step or runs.last_step(folder) != saved
        outcome.count(
            ended.problem(128 + number),
            None if told else f"step {saved} is not told: {ended.out}",
            f"saved at {saved}, metrics until {runs.last_step(folder)}" if lost else None,
        )
        outcome.complaints += filter(None, [runs.train(bench, folder).problem()])
        if runs.starting_steps(folder) != [0, saved]:
            outcome.complaints.append(f"starts at {runs.starting_steps(folder)}, not {saved}")
        outcome.compare(folder, wanted)
    return outcome
