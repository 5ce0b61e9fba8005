"""Processes that are killed, at any moment, and stopped by signals."""

import collections
import dataclasses
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pretraining import checkpoint, metrics, run_folder, signs
from tests.faults import bench as runs
from tests.faults.bench import Bench
from tests.faults.outcome import Outcome

# Phases that are aimed at, and how often. What is aimed at a save may hit the step after it.
AIMS = {"prepare": 0.16, "compile": 0.16, "step": 0.24, "save": 0.24, "evaluate": 0.2}
CHAIN = 5  # kills of one run at most, all judged by one comparison


def kill_often(bench: Bench, seed: int, count: int = 50, aims: Sequence[str] = ()) -> Outcome:
    """`kill -9` at random moments, `count` of them or as many as there are `aims`.

    A run is killed, started again in the same folder and killed again, CHAIN times at most; then it
    comes to its end. A kill was survived if the next start went on from the newest checkpoint that
    was whole at the kill, and if in the end the run equals the undisturbed one.
    """
    outcome, random = Outcome("kill -9", bench.objective), runs.generator(bench, seed)
    wanted, died = runs.reference(bench), collections.Counter()
    chosen = random.choice(list(AIMS), size=count, p=list(AIMS.values())).tolist()
    left, number = collections.deque(aims or chosen), 0
    while left:
        victim = Victim(bench, bench.folder / f"killed_{number}", random)
        while left and len(victim.kills) < CHAIN and victim.strike(left[0]):
            left.popleft()
        if not victim.kills:
            outcome.count(f"{victim.folder} came to its end before it was near {left.popleft()}")
        died.update(kill.phase for kill in victim.kills)
        _end(victim, wanted, outcome)
        number += 1
    outcome.note = ", ".join(f"{phase} {died[phase]}" for phase in sorted(died))
    return outcome


def _end(victim: "Victim", wanted: pathlib.Path, outcome: Outcome) -> None:
    """Trains to the end, and judges the kills on the way there."""
    outcome.complaints += (wrong := victim.complete())
    equal_before = outcome.equal
    outcome.compare(victim.folder, wanted)
    unequal = wrong or outcome.equal == equal_before
    for kill in victim.kills:
        end = f"{victim.folder} did not end as it should" if unequal else None
        outcome.count(end, *judge(kill, runs.starting_steps(victim.folder)))


class Kill(NamedTuple):
    """What was there when a run was killed.

    Attributes:
      phase: in which the program died.
      starts: so far.
      saved: step of the newest whole checkpoint, 0 = none.
      complaint: what went wrong in killing it.
    """

    phase: str
    starts: int
    saved: int
    complaint: str | None = None


def judge(kill: Kill, starting_steps: Sequence[int]) -> list[str]:
    """Complaints unless the start after the kill went on from the newest checkpoint.

    Args:
      starting_steps: of all starts that came as far as to begin from a step.
    """
    found = [kill.complaint] if kill.complaint else []
    following = [*starting_steps, None][min(kill.starts, len(starting_steps))]
    if following != kill.saved:
        told = f"killed in {kill.phase} with a whole checkpoint of step {kill.saved}"
        found.append(f"{told}, the next start begins from {following}")
    return found


@dataclasses.dataclass
class Victim:
    """A run that is killed again and again.

    Attributes:
      cache: of its token stores; a kill while preparing is aimed at a new one, in which the next
        start goes on.
      kills: what was there at each.
    """

    bench: Bench
    folder: pathlib.Path
    generator: np.random.Generator
    caches: int = 0
    cache: pathlib.Path | None = None
    kills: list[Kill] = dataclasses.field(default_factory=list)

    def strike(self, aim: str) -> bool:
        """Starts it and kills it; False = it had come to its end before."""
        if aim == "prepare":
            self._renew_cache()
        launched, starts = time.time(), len(runs.starting_steps(self.folder))
        process = self._launch(compiled=aim != "compile")
        sign, longest = self._sign(aim, process, starts, launched)
        if came := runs.wait_for([process], sign):
            time.sleep(float(self.generator.uniform(0, longest)))
        hangs = None if came or process.poll() is not None else f"no sign of {aim}: it hangs"
        process.kill()
        ended = runs.finish(process)
        if ended.status == 0:
            return False
        phase = self._died_in(process, starts, launched)
        self.kills.append(
            Kill(
                phase,
                starts=len(runs.starting_steps(self.folder)),
                saved=max(runs.saved_steps(self.folder), default=0),
                complaint=hangs or ended.problem(-signal.SIGKILL),
            )
        )
        return True

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

    def _sign(
        self, aim: str, process: subprocess.Popen, starts: int, launched: float
    ) -> tuple[Callable[[], bool], float]:
        """(the sign that a phase has come near, most seconds to wait after it)."""
        if aim == "prepare":
            return lambda: any(self.cache.glob("*/*")), 0.5
        if aim == "compile":
            return lambda: _told(self.folder, process) == "compile", 0.2
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
        told = _told(self.folder, process)
        if len(runs.starting_steps(self.folder)) == starts:
            partial = self.cache.glob("*/*.partial-*") if self.cache else ()
            preparing = any(path.stat().st_ctime > launched for path in partial)
            return "prepare" if preparing else told or "start"
        if not _began(self.folder, starts):
            return "start" if told == "start" else "compile"
        next_step = runs.last_step(self.folder) + 1
        evaluating = next_step == runs.STEPS or next_step % runs.EVALUATE_EVERY == 0
        return "evaluate" if evaluating else "step"


def _told(folder: pathlib.Path, process: subprocess.Popen) -> str | None:
    """The phase that a process said it is in."""
    sign = signs.read(folder)
    return sign["phase"] if sign and sign["pid"] == process.pid else None


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
        came = runs.wait_for([process], lambda s=step, f=folder: runs.last_step(f) >= s)
        process.send_signal(number)
        ended = runs.finish(process)
        saved = max(runs.saved_steps(folder), default=0)
        told = f"stopped by a signal at step {saved};" in ended.out
        lost = saved < step or runs.last_step(folder) != saved
        outcome.count(
            None if came else f"step {step} did not come",
            ended.problem(128 + number),
            None if told else f"step {saved} is not told: {ended.out}",
            f"saved at {saved}, metrics until {runs.last_step(folder)}" if lost else None,
        )
        outcome.complaints += filter(None, [runs.train(bench, folder).problem()])
        if runs.starting_steps(folder) != [0, saved]:
            outcome.complaints.append(f"starts at {runs.starting_steps(folder)}, not {saved}")
        outcome.compare(folder, wanted)
    return outcome
