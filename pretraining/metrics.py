"""Figures of a run: metrics.jsonl, TensorBoard, W&B, a progress bar or log lines.

`metrics.jsonl` holds one JSON object per logged step, null for what is not finite. `step` counts
updates made. Keys that start with `time/` are timings; every other value is a function of (config,
data, step), bit for bit; of a member of a population also of those that it trains with.
"""

import hashlib
import importlib.util
import json
import math
import os
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import numpy as np

from pretraining.errors import UserError
from pretraining.files import write_atomically

FILE = "metrics.jsonl"


def fetch(metrics: Any) -> Any:
    """Device scalars as Python numbers: the one place where the loop waits for the device.

    Those of a population, [N], become lists.
    """
    return jax.tree.map(lambda x: x.tolist(), jax.device_get(metrics))


def cut_back(path: pathlib.Path, step: int) -> None:
    """Drops every line after `step`, and a line that a crash cut in half."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read(path: pathlib.Path) -> list[dict]:
    """The whole lines of a metrics file; a last line cut in half is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


class Writer:
    """Writes lines from process 0; the other processes' writers do nothing."""

    def __init__(self, folder: pathlib.Path, config, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        cut_back(folder / FILE, step)
        self._file = open(folder / FILE, "a")  # noqa: SIM115 (held for the whole run)
        self._tensorboard = self._wandb = None
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if config.log.wandb:
            self._wandb = _start_wandb(folder, config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; values are Python numbers."""
        if not self._active:
            return
        line = {"step": step} | {name: _json(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                if math.isfinite(value):  # of others it only warns, without a step
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def sync(self) -> None:
        """Everything written is on disk when this returns: a checkpoint may follow."""
        if self._active:
            os.fsync(self._file.fileno())
            if self._tensorboard:
                self._tensorboard.flush()

    def close(self) -> None:
        if self._active:
            self.sync()
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def check(config) -> None:
    """Refuses a tracker that is not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.log.wandb={config.log.wandb!r} needs the package wandb: "
            "pip install -e '.[wandb]'"
        )


def _start_wandb(folder: pathlib.Path, config):
    import wandb

    # The place identifies the run, so that a resumed run goes on in the same curve.
    place = f"{platform.node()}:{folder.resolve()}"
    return wandb.init(
        project=config.log.wandb,
        name=folder.name,
        id=hashlib.sha256(place.encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder),
        config=config.to_dict(),
    )


class Speed:
    """Throughput of the updates since the last line; what is no update does not count.

    Args:
      share: of the program's time that the ledger counts.
    """

    def __init__(
        self, ledger, *, step_tokens: int, step_flops: float, peak: float, share: float = 1.0
    ):
        self._ledger, self._tokens, self._flops, self._peak = ledger, step_tokens, step_flops, peak
        self._share = share
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps = self._ledger.totals(), 0

    def stepped(self) -> None:
        """One more update has been started."""
        self._steps += 1

    def figures(self, steps_left: int) -> dict[str, float]:
        """The figures, of which there are none without an update; a new count begins.

        `time/mfu` = matmul FLOPs of the model (forward x 3; recomputation not counted) per second /
        (devices x peak of one device). `time/data_wait` is the share of the time of updates that
        was spent waiting for rows.
        """
        now, since, steps = self._ledger.totals(), self._since, self._steps
        self._reset()
        if not steps:
            return {}
        wait = now["data_wait"] - since["data_wait"]
        seconds = now["step"] - since["step"] + wait
        step_s = seconds / steps
        return {
            "time/step_s": step_s,
            "time/tokens_per_s": self._tokens / step_s,
            "time/mfu": self._flops / step_s / self._peak,
            "time/peak_flops": self._peak,
            "time/data_wait": wait / seconds,
            "time/eta_s": steps_left * step_s / self._share,
        }


class Profile:
    """Profiles `config.log.profile_steps` steps from `profile_start` on, in <folder>/profile."""

    def __init__(self, folder: pathlib.Path, config):
        self._folder, self._steps = str(folder / "profile"), config.log.profile_steps
        self._start, self._stop = config.log.profile_start, None

    def reached(self, step: int, figures: Any) -> None:
        """Begins after update `profile_start`; ends when `figures` of the last one are there."""
        if self._start and step == self._start:
            jax.profiler.start_trace(self._folder)
            self._stop = step + self._steps
        elif step == self._stop:
            jax.block_until_ready(figures)
            self.close()

    def close(self) -> None:
        if self._stop:
            jax.profiler.stop_trace()
            self._stop = None


class Progress:
    """A bar on a terminal; elsewhere a log line every few seconds."""

    LINE_EVERY_S = 5.0

    def __init__(self, start: int, total: int):
        from tqdm import tqdm

        quiet = not sys.stderr.isatty() or jax.process_index() > 0
        self._total, self._next_line = total, 0.0
        self._bar = tqdm(
            initial=start, total=total, unit="step", disable=quiet, dynamic_ncols=True, leave=True
        )

    def show(self, step: int, values: dict[str, float]) -> None:
        """Brings the bar to `step`; prints a line where there is no bar."""
        text = _summary(values)
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif jax.process_index() == 0 and (
            time.monotonic() >= self._next_line or "eval/loss" in values or step == self._total
        ):
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + self.LINE_EVERY_S

    def close(self) -> None:
        self._bar.close()


def _summary(values: dict[str, float]) -> str:
    parts = []
    for key, name, form in (
        ("runs", "mean of", "{:.0f}"),
        ("train/loss", "loss", "{:.3f}"),
        ("eval/loss", "eval", "{:.3f}"),
        ("train/learning_rate", "lr", "{:.2e}"),
        ("train/gradient_norm", "grad", "{:.2f}"),
        ("time/tokens_per_s", "tok/s", "{:,.0f}"),
        ("time/mfu", "mfu", "{:.0%}"),
        ("time/data_wait", "wait", "{:.0%}"),
        ("time/eta_s", "eta", "{:.0f}s"),
    ):
        if key in values and np.isfinite(values[key]):
            parts.append(f"{name} {form.format(values[key])}")
    return "  ".join(parts)
