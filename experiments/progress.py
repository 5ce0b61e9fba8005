"""The one view of a whole sweep: a bar on a terminal, elsewhere a log line now and then."""

import collections
import sys
import time
from collections.abc import Mapping, Sequence

from experiments.planned import Planned
from experiments.table import DONE, FAILED, RUNNING, Row


class View:
    """Updates of all runs; the time left comes from what this start has done so far.

    Updates count by their FLOPs, because they take longer in some runs than in others.
    """

    LINE_EVERY_S = 30.0

    def __init__(self, planned: Sequence[Planned], rows: Mapping[str, Row]):
        from tqdm import tqdm

        self._flops = {each.name: each.cost.flops / each.cost.steps for each in planned}
        self._begun, self._before = time.monotonic(), self._work(rows)
        self._total = sum(each.cost.flops for each in planned)
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
            self._next_line = time.monotonic() + self.LINE_EVERY_S

    def tell(self, text: str) -> None:
        """Prints something for people, above the bar."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def _work(self, rows: Mapping[str, Row]) -> float:
        return sum(row.step * self._flops[name] for name, row in rows.items())

    def _summary(self, rows: Mapping[str, Row]) -> str:
        counts = collections.Counter(row.status for row in rows.values())
        parts = [f"{counts[DONE]} of {len(rows)} runs done", f"{counts[RUNNING]} running"]
        if counts[FAILED]:
            parts.append(f"{counts[FAILED]} failed")
        work, seconds = self._work(rows), time.monotonic() - self._begun
        if work > self._before:
            left = (self._total - work) * seconds / (work - self._before)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """For people: "45 s", "12 min", "3 h 05 min", "4 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 72 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(minutes / 1440):,} days"
