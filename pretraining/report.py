"""What the loop tells while it trains: lines of metrics, progress, and updates that went wrong."""

import pathlib

import jax

from pretraining import flops, goodput, metrics
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.guard import Guard


class Report:
    """Writes the figures of each update one step late, so that the device never waits for them."""

    def __init__(
        self,
        folder: pathlib.Path,
        config,
        vocabulary,
        start: int,
        ledger: goodput.Ledger,
        guard: Guard,
    ):
        self._config, self._guard, self._ledger = config, guard, ledger
        payload = config.data.sequence_length - SPECIAL_POSITIONS
        self._speed = metrics.Speed(
            ledger,
            step_tokens=config.train.batch_size * payload,
            step_flops=flops.step_flops(config, vocabulary),
            peak=flops.peak_flops(config),
        )
        self._writer = metrics.Writer(folder, config, start)
        self._progress = metrics.Progress(start, config.train.steps)
        self._profile = metrics.Profile(folder, config)
        self._pending = None

    def push(self, step: int, figures: dict, rows) -> None:
        """Takes rows and device figures of update `step`; writes those of the one before."""
        if self._pending:
            self._write({})
        self._pending = step, figures, rows
        self._speed.stepped()
        self._profile.reached(step, figures)

    def wait(self) -> None:
        """Waits for the last update, so that its time counts as that of a step."""
        jax.block_until_ready(self._pending and self._pending[1])

    def flush(self, evaluation: dict[str, float]) -> None:
        """Writes the last update's figures together with an evaluation's, and syncs the file."""
        if self._pending:
            self._write(evaluation)
        self._writer.sync()

    def _write(self, evaluation: dict[str, float]) -> None:
        (step, figures, rows), self._pending = self._pending, None
        figures = metrics.fetch(figures)
        unusual = self._guard.judge(step, figures, rows)
        for name in ("finite", "skipped_in_a_row"):
            del figures[name]
        due = step % self._config.log.every == 0
        if not (evaluation or due or unusual):
            return
        figures["rewinds"] = float(self._guard.rewinds)
        line = {f"train/{name}": value for name, value in figures.items()} | evaluation
        line |= self._speed.figures(self._config.train.steps - step)
        self._writer.write(step, line | goodput.figures(self._ledger.totals()))
        self._progress.show(step, line)

    def close(self) -> None:
        self._profile.close()
        self._progress.close()
        self._writer.close()
