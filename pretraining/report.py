"""What the loop tells while it trains: lines of metrics, progress, and updates that went wrong."""

import pathlib

import jax

from pretraining import flops, goodput, metrics
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.guard import Guard


class Report:
    """Hands the figures of each update on one step late, so that the device never waits for them.

    Args:
      lines: of the run, or of all runs of a population.
      folder: of the profile.
    """

    def __init__(self, lines, folder: pathlib.Path, config, start: int):
        self._lines, self._pending = lines, None
        self._progress = metrics.Progress(start, config.train.steps)
        self._profile = metrics.Profile(folder, config)

    def push(self, step: int, figures: dict, rows) -> None:
        """Takes rows and device figures of update `step`; writes those of the one before."""
        if self._pending:
            self._write({})
        self._pending = step, figures, rows
        self._lines.stepped()
        self._profile.reached(step, figures)

    def wait(self) -> None:
        """Waits for the last update, so that its time counts as that of a step."""
        jax.block_until_ready(self._pending and self._pending[1])

    def flush(self, evaluation: dict) -> None:
        """Writes the last update's figures together with an evaluation's, and syncs the file."""
        if self._pending:
            self._write(evaluation)
        self._lines.sync()

    def _write(self, evaluation: dict) -> None:
        (step, figures, rows), self._pending = self._pending, None
        line = self._lines.write(step, metrics.fetch(figures), rows, evaluation)
        if line:
            self._progress.show(step, line)

    def close(self) -> None:
        self._profile.close()
        self._progress.close()
        self._lines.close()


class Lines:
    """The lines of one run's metrics; has each update judged.

    Args:
      speed: see `work`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config,
        start: int,
        ledger: goodput.Ledger,
        guard: Guard,
        speed: metrics.Speed,
    ):
        self._config, self._guard, self._ledger, self._speed = config, guard, ledger, speed
        self._writer = metrics.Writer(folder, config, start)

    def stepped(self) -> None:
        """One more update has been started."""
        self._speed.stepped()

    def write(self, step: int, figures: dict, rows, evaluation: dict) -> dict[str, float]:
        """Writes the figures of an update, Python numbers, if a line is due; the line, or {}.

        Raises:
          UserError, Spike: see `Guard.judge`.
        """
        unusual = self._guard.judge(step, figures, rows)
        due = step % self._config.log.every == 0
        if not (evaluation or due or unusual):
            return {}
        kept = {k: v for k, v in figures.items() if k not in ("finite", "skipped_in_a_row")}
        kept["rewinds"] = float(self._guard.rewinds)
        line = {f"train/{name}": value for name, value in kept.items()} | evaluation
        line |= self._speed.figures(self._config.train.steps - step)
        line |= goodput.figures(self._ledger.totals())
        self._writer.write(step, line)
        return line

    def sync(self) -> None:
        """Everything written is on disk when this returns."""
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()


def work(config, vocabulary) -> dict[str, float]:
    """What `metrics.Speed` has to know of an update, by its keywords; `peak` is the devices'."""
    payload = config.data.sequence_length - SPECIAL_POSITIONS
    return {
        "step_tokens": config.train.batch_size * payload,
        "step_flops": flops.step_flops(config, vocabulary),
    }
