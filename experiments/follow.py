"""A sweep while it goes on: its table, its view, and what is said of a run that fails."""

import collections
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from experiments import table
from experiments.launchers import Snapshot
from experiments.planned import Planned
from experiments.progress import View
from experiments.table import DONE, FAILED, RUNNING, WAITING

_LOG_LINES = 15
_TABLE_EVERY_S = 30.0


class Sweep:
    """The table of a sweep, kept up to date; written at once."""

    def __init__(self, workdir: pathlib.Path, planned: Sequence[Planned], metric: str):
        """Args: `metric` of the column `result`."""
        self._workdir, self._metric = workdir, metric
        self._planned = {each.name: each for each in planned}
        before = table.read(workdir)
        kept = {name for name, row in before.items() if row["status"] == FAILED}
        self._rows = {
            each.name: table.row(each, metric, FAILED if each.name in kept else WAITING)
            for each in planned
        }
        (workdir / "logs").mkdir(exist_ok=True)
        self._write()

    def log(self, name: str) -> pathlib.Path:
        """The file to which a run prints."""
        return self._workdir / "logs" / f"{name}.log"

    def follow(
        self, names: Collection[str], started: Iterator[Snapshot], stop: Callable[[], Any]
    ) -> None:
        """Keeps the table, and a view of the named runs, up to date until a launcher's end.

        A run that fails is told at once; one that ends because of `stop()` has not failed.
        """
        ended, written = set(), 0.0
        seen = lambda: {name: row for name, row in self._rows.items() if name in names}
        with View([each for each in self._planned.values() if each.name in names], seen()) as view:
            for snapshot in started:
                statuses = {name: row.status for name, row in self._rows.items()}
                for name in snapshot.keys() - ended:
                    self._take(name, snapshot[name], bool(stop()))
                    if self._rows[name].status == FAILED:
                        view.tell(self._failure(name, snapshot[name]))
                ended |= {name for name, status in snapshot.items() if status is not None}
                changed = statuses != {name: row.status for name, row in self._rows.items()}
                if changed or time.monotonic() > written + _TABLE_EVERY_S:
                    self._write()
                    written = time.monotonic()
                view.show(seen())
            view.show(seen(), last=True)
        self._write()

    def summary(self, names: Collection[str]) -> str:
        """How the named runs stand, one line."""
        counts = collections.Counter(self._rows[name].status for name in names)
        text = ", ".join(f"{counts[s]} {s}" for s in (DONE, FAILED, WAITING) if counts[s])
        failed = self.failed(names)
        return f"{len(names)} runs: {text}" + (f" ({', '.join(failed)})" if failed else "")

    def failed(self, names: Collection[str]) -> list[str]:
        """The named runs that have failed."""
        return [n for n, row in self._rows.items() if n in names and row.status == FAILED]

    def _take(self, name: str, status: int | None, stopping: bool) -> None:
        """Brings the row of a run up to date that runs, or has just ended."""
        ended = WAITING if stopping else FAILED  # unless its folder says that it is done
        now = RUNNING if status is None else ended
        self._rows[name] = table.row(self._planned[name], self._metric, now)

    def _failure(self, name: str, status: int) -> str:
        log = self.log(name)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        told = "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
        return f"{name} failed with exit status {status}; the end of {log}:\n{told}"

    def _write(self) -> None:
        table.write(self._workdir, list(self._rows.values()))
