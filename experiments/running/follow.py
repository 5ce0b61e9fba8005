"""A sweep while it goes on: its table, its one view, and what is said of a run that fails.

The view is a bar on a terminal, elsewhere a log line now and then.
"""

import collections
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from experiments.running import table
from experiments.running.launchers import Snapshot
from experiments.running.planned import Planned, duration
from experiments.running.table import DONE, FAILED, RUNNING, WAITING, Row

BEGUN = "begun"  # of those that wait, in a summary
_LOG_LINES = 15
_TABLE_EVERY_S = _LINE_EVERY_S = 30.0


class Sweep:
    """The table of a sweep, kept up to date; written at once."""

    def __init__(
        self,
        workdir: pathlib.Path,
        planned: Sequence[Planned],
        metric: str,
        chosen: Collection[str],
    ):
        """Begins it anew; of an earlier start is kept which runs failed that are not chosen now.

        Args:
          metric: of the column `result`.
          chosen: names of the runs that this start is about.
        """
        self._workdir, self._metric, self._chosen = workdir, metric, frozenset(chosen)
        self._planned = {each.name: each for each in planned}
        before = table.read(workdir)
        kept = {name for name, row in before.items() if row["status"] == FAILED} - set(chosen)
        self._rows = {
            each.name: table.row(each, metric, FAILED if each.name in kept else WAITING)
            for each in planned
        }
        (workdir / "logs").mkdir(exist_ok=True)
        self._write()

    def log(self, name: str) -> pathlib.Path:
        """The file to which a job prints."""
        return self._workdir / "logs" / f"{name}.log"

    def follow(
        self,
        started: Iterator[Snapshot],
        stop: Callable[[], Any],
        populations: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """Keeps the table, and a view of the chosen runs, up to date until a launcher's end.

        A job that fails is told at once; one that ends because of `stop()` has not failed.

        Args:
          started: of jobs, which are called like their run.
          populations: or {job: its runs}; what these still lack when it ends well is done later.
        """
        ended, written = set(), 0.0
        seen = lambda: {name: row for name, row in self._rows.items() if name in self._chosen}
        with View([self._planned[name] for name in seen()], seen()) as view:
            for snapshot in started:
                statuses = {name: row.status for name, row in self._rows.items()}
                for job in snapshot.keys() - ended:
                    runs = (populations or {}).get(job, (job,))
                    waits = bool(stop()) or (bool(populations) and not snapshot[job])
                    for name in runs:
                        self._take(name, snapshot[job], waits)
                    if any(self._rows[name].status == FAILED for name in runs):
                        view.tell(self._failure(job, snapshot[job]))
                ended |= {name for name, status in snapshot.items() if status is not None}
                changed = statuses != {name: row.status for name, row in self._rows.items()}
                if changed or time.monotonic() > written + _TABLE_EVERY_S:
                    self._write()
                    written = time.monotonic()
                view.show(seen())
            view.show(seen(), last=True)
        self._write()

    def summary(self) -> str:
        """How the chosen runs stand, one line."""
        rows = [self._rows[name] for name in self._chosen]
        counts = collections.Counter(
            BEGUN if row.status == WAITING and row.step else row.status for row in rows
        )
        text = ", ".join(f"{counts[s]} {s}" for s in (DONE, FAILED, BEGUN, WAITING) if counts[s])
        failed = self.failed()
        return f"{len(rows)} runs: {text}" + (f" ({', '.join(failed)})" if failed else "")

    def failed(self) -> list[str]:
        """The chosen runs that have failed."""
        return [n for n, row in self._rows.items() if n in self._chosen and row.status == FAILED]

    def _take(self, name: str, status: int | None, waits: bool) -> None:
        """Brings the row of a run up to date that runs, or has just ended."""
        ended = WAITING if waits else FAILED  # unless its folder says that it is done
        now = RUNNING if status is None else ended
        self._rows[name] = table.row(self._planned[name], self._metric, now)

    def _failure(self, name: str, status: int) -> str:
        log = self.log(name)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        told = "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
        return f"{name} failed with exit status {status}; the end of {log}:\n{told}"

    def _write(self) -> None:
        table.write(self._workdir, list(self._rows.values()))


class View:
    """Updates of all runs; the time left comes from what this start has done so far.

    Updates count by their FLOPs, because they take longer in some runs than in others. How long a
    yardstick takes is not known: those that are missing are counted beside the time.
    """

    def __init__(self, planned: Sequence[Planned], rows: Mapping[str, Row]):
        from tqdm import tqdm

        self._planned = {each.name: each for each in planned}
        self._begun, self._before = time.monotonic(), self._work(rows)
        self._next_line = 0.0
        self._bar = tqdm(
            initial=sum(row.step for row in rows.values()),
            total=sum(row.steps for row in rows.values()),
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps{postfix}",
        )

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def show(self, rows: Mapping[str, Row], last: bool = False) -> None:
        """Brings the view up to date; `last` prints a line in any case."""
        text = self._summary(rows)
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = sum(row.step for row in rows.values())
            self._bar.refresh()
        elif last or time.monotonic() >= self._next_line:
            running = [f"{r.name} {r.step}/{r.steps}" for r in rows.values() if r.status == RUNNING]
            print("  ".join([text, *running]), file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + _LINE_EVERY_S

    def tell(self, text: str) -> None:
        """Prints something for people, above the bar."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _work(self, rows: Mapping[str, Row]) -> dict[str, float]:
        """FLOPs that each run has done."""
        costs = {name: self._planned[name].cost for name in rows}
        return {name: rows[name].step * cost.flops / cost.steps for name, cost in costs.items()}

    def _summary(self, rows: Mapping[str, Row]) -> str:
        counts = collections.Counter(row.status for row in rows.values())
        parts = [f"{counts[DONE]} of {len(rows)} runs done", f"{counts[RUNNING]} running"]
        if counts[FAILED]:
            parts.append(f"{counts[FAILED]} failed")
        now, seconds = self._work(rows), time.monotonic() - self._begun
        # A run that is gone on with first goes back, to its last checkpoint.
        self._before = {name: min(work, self._before[name]) for name, work in now.items()}
        done = sum(now.values()) - sum(self._before.values())
        open_ = [self._planned[n] for n, row in rows.items() if row.status not in (DONE, FAILED)]
        left = sum(each.cost.flops - now[each.name] for each in open_)
        if done and left:
            parts.append(f"{duration(left * seconds / done)} of training left")
        if missing := sum(bool(each.sample) for each in open_):
            parts.append(f"{missing} yardstick{'s' * (missing > 1)} left")
        return ", ".join(parts)
