"""Signs of life: what the processes of one run know of each other, and what follows from it.

No clocks of two hosts are compared. A process only asks whether a sign has changed since it last
looked, and counts the time in which it was looking.
"""

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pretraining.files import write_atomically

FOLDER = "processes"  # in the run folder; holds <process>.json
_KEYS = {"step", "phase", "entered", "host", "time", "start", "beat", "ended", "verdict"}

# Phases that are short, and phases whose length nobody knows; in any other, a process that stays
# behind may take _PATIENCE times as long before it is said to hang.
_SHORT, _ENDLESS, _PATIENCE = ("step", "data_wait"), ("prepare",), 10


def read(folder: pathlib.Path, process: int = 0) -> dict[str, Any] | None:
    """The last sign of a process, of this start or of an earlier one; None = none that is one.

    Keys: those of the `status` of its Monitor, and
      host, pid: where it ran;
      time: of its own clock, seconds since 1970;
      start, beat: an id, and a number that grows with every sign;
      ended: None while it runs; "" = it came to its end; or the error that ended it, one line;
      verdict: None, or what it found wrong with another process, one line.
    """
    try:
        sign = json.loads(_path(folder, process).read_text())
    except (OSError, ValueError):
        return None
    return sign if isinstance(sign, dict) and sign.keys() >= _KEYS else None


def write(folder: pathlib.Path, process: int, sign: Mapping[str, Any]) -> None:
    """Replaces the sign of a process; the folder FOLDER exists."""
    write_atomically(_path(folder, process), json.dumps(sign))


def _path(folder: pathlib.Path, process: int) -> pathlib.Path:
    return folder / FOLDER / f"{process}.json"


class Seen(NamedTuple):
    """What one process knows of another, or of itself.

    Attributes:
      sign: its last sign of this start; None = none yet.
      silent_s: since its sign changed.
      stood_s: since it entered a phase.
      restarted: the sign of a later start has followed.
    """

    sign: Mapping[str, Any] | None
    silent_s: float
    stood_s: float
    restarted: bool = False


class Watch:
    """The signs of some processes, as they change under one's eyes.

    What is there at the beginning and never changes is of an earlier start.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        processes: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._clock, self._looked = folder, clock, clock()
        self._now = 0.0  # time in which this process was looking
        self._stale = {process: read(folder, process) for process in processes}
        self._seen = dict.fromkeys(self._stale, _Changes())

    def look(self, most: float) -> dict[int, Seen]:
        """Reads all signs.

        Args:
          most: seconds since the last look that count at most: a process that was stopped for a
            while must not think that the others were.
        """
        now = self._clock()
        self._now += min(now - self._looked, most)
        self._looked = now
        for process, before in self._seen.items():
            sign = read(self._folder, process)
            if sign is not None and sign != self._stale[process]:
                self._seen[process] = before.followed_by(sign, self._now)
        return {
            process: Seen(
                last.sign, self._now - last.changed, self._now - last.entered, last.restarted
            )
            for process, last in self._seen.items()
        }


class _Changes(NamedTuple):
    """The last sign, when it changed, and when it last told of another phase."""

    sign: Mapping[str, Any] | None = None
    changed: float = 0.0
    entered: float = 0.0
    restarted: bool = False

    def followed_by(self, sign: Mapping[str, Any], now: float) -> "_Changes":
        if self.sign is None:
            return _Changes(sign, now, now)
        if sign["start"] != self.sign["start"]:
            return self._replace(restarted=True)
        if sign["beat"] == self.sign["beat"]:
            return self
        moved = sign["entered"] != self.sign["entered"]
        return _Changes(sign, now, now if moved else self.entered)


# ----------------------------------------------------------------------------------------- judgment


def find_lost(others: Mapping[int, Seen], silence_s: float) -> str | None:
    """A process that has ended, or gives no sign of life, as one line that names it.

    Args:
      others: the processes that are watched, without oneself.
      silence_s: after which a process is dead or stopped.
    """
    for process, found in others.items():
        if found.restarted:
            return f"{_name(process, found)} was started again, this start is not the last"
        if found.sign and found.sign["verdict"]:
            return found.sign["verdict"]
        if found.sign and found.sign["ended"]:
            return f"{_name(process, found)} ended {_place(found)}: {found.sign['ended']}"
    for process, found in others.items():
        if found.silent_s < silence_s or (found.sign and found.sign["ended"] == ""):
            continue
        if not found.sign:
            return f"{_name(process, found)} has given no sign of life for {found.silent_s:.0f} s"
        return (
            f"{_name(process, found)} has been silent for {found.silent_s:.0f} s, last "
            f"{_place(found)}"
        )
    return None


def find_hanging(everybody: Mapping[int, Seen], hang_s: float) -> str | None:
    """A process that others wait for, as one line that names it.

    It is the one that has entered the fewest phases, if it has stayed there too long and nobody
    else has moved on since. Where all stand at the same place too long, nobody is to blame.

    Args:
      everybody: all processes of the run.
      hang_s: after which a process hangs; ten times as long where it does not make steps, and never
        while it prepares.
    """
    running = {p: f for p, f in everybody.items() if f.sign and f.sign["ended"] is None}
    if not running:
        return None
    last = min(running, key=lambda process: running[process].sign["entered"])
    found = running[last]
    limit = hang_s * _allowance(found.sign["phase"])
    if min(other.stood_s for other in running.values()) < limit:
        return None
    if any(f.sign and f.sign["entered"] > found.sign["entered"] for f in everybody.values()):
        return f"{_name(last, found)} hangs: for {found.stood_s:.0f} s {_place(found)}"
    return f"all processes have stood for {found.stood_s:.0f} s {_place(found)}"


def _allowance(phase: str) -> float:
    if phase in _ENDLESS:
        return float("inf")
    return 1 if phase in _SHORT else _PATIENCE


def _name(process: int, found: Seen) -> str:
    return f"process {process}" + (f" ({found.sign['host']})" if found.sign else "")


def _place(found: Seen) -> str:
    return f"at step {found.sign['step']} in phase {found.sign['phase']}"
