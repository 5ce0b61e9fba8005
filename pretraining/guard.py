"""Updates that went wrong: those that are not finite, and losses that jump.

Whether an update is finite, and how far its loss lies above the average of those before it, is
found out inside the step; what is done about it is decided here, one step later.
"""

import collections
import json
import math
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import numpy as np

from pretraining.data import loader
from pretraining.data.row import Row
from pretraining.errors import UserError
from pretraining.files import write_atomically

POLICIES = ("stop", "skip")
MOST_SKIPPED = 20  # updates skipped in a row after which the run is stopped all the same
OFFENDING = "offending"  # folder of the batches that did it
MOST_KEPT = 100  # of them
REWINDS = "rewinds.jsonl"


def check(config) -> None:
    """Refuses values of `config.guard` that are out of range."""
    guard = config.guard
    for key, allowed, valid in (
        ("non_finite", " or ".join(POLICIES), guard.non_finite in POLICIES),
        ("spike", "a number of at least 0", 0 <= guard.spike < math.inf),
        ("spike_memory", "at least 2", guard.spike_memory >= 2),
        ("rewinds", "at least 0", guard.rewinds >= 0),
        ("silence", "a number of at least 0", 0 <= guard.silence < math.inf),
    ):
        if not valid:
            raise UserError(f"config.guard.{key}={guard[key]!r} is out of range: {allowed}")
    if guard.rewinds and not guard.spike:
        raise UserError(
            f"config.guard.rewinds={guard.rewinds}, but config.guard.spike=0 finds no spike"
        )


# --------------------------------------------------------------------------------------- decisions


class Spike(Exception):
    """The run is to go back to its last checkpoint."""

    def __init__(self, step: int, figures: dict):
        super().__init__(step)
        self.step, self.figures = step, figures


class Guard:
    """Judges the figures of one update after the other.

    Args:
      skips: as in `loader.train_batches`: what earlier rewinds made of the batches.
    """

    def __init__(self, folder: pathlib.Path, config, stores, skips, checkpoints):
        self._folder, self._config, self._stores = folder, config, stores
        self._skips, self._checkpoints = skips, checkpoints
        self.rewinds = len(skips)

    def judge(self, step: int, figures: dict, rows) -> bool:
        """True where the update was out of the ordinary; it is said so, and its batch is kept.

        Args:
          step: number of the update, from 1.
          figures: of the update, as Python numbers.
          rows: its rows, as far as this process read them.

        Raises:
          UserError: it is not finite, and the run is to stop.
          Spike: the run is to go back.
        """
        if not figures["finite"]:
            self._keep(step, figures, rows)
            self._not_finite(step, figures, figures["skipped_in_a_row"])
            return True
        deviation, limit = figures["loss_deviation"], self._config.guard.spike
        if not limit or deviation <= limit:
            return False
        self._keep(step, figures, rows)
        _say(
            f"the loss of update {step}, {figures['loss']:.4g}, lies {deviation:.1f} standard "
            f"deviations above its average (config.guard.spike={limit}) in {self._folder}"
        )
        if self.rewinds < self._config.guard.rewinds:
            raise Spike(step, figures)
        return True

    def _not_finite(self, step: int, figures: dict, in_a_row: int) -> None:
        saved = self._checkpoints.newest()
        message = (
            f"update {step} is not finite (loss {figures['loss']}, gradient norm "
            f"{figures['gradient_norm']}) on training rows {self._listed_rows(step)}; the last "
            f"checkpoint is {f'that of step {saved}' if saved else 'none'}; to see it again: "
            f"python -m pretraining.replay --workdir={self._folder} --step={step}"
        )
        if self._config.guard.non_finite == "stop":
            raise UserError(message)
        if in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"{in_a_row} updates in a row were skipped, the most of config.guard.non_finite="
                f"'skip': a lower learning rate, or an older checkpoint, may help; {message}"
            )
        _say(f"skipped: {message}")

    def _listed_rows(self, step: int) -> str:
        rows = collections.defaultdict(list)
        for store, number in loader.row_addresses(
            self._stores, self._config, step - 1, self._skips
        ):
            rows[store.name].append(number)
        return " and ".join(f"{_shorten(found)} of store {name}" for name, found in rows.items())

    def _keep(self, step: int, figures: dict, rows) -> None:
        seed = self._config.seed.to_dict()
        save_batch(self._folder, Batch(step, figures, rows, seed, self._skips))


def _say(message: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {message}", flush=True)


def _shorten(numbers: list[int], most: int = 16) -> str:
    listed = ", ".join(map(str, numbers[:most]))
    return listed + (f", ... ({len(numbers)} in all)" if len(numbers) > most else "")


# ------------------------------------------------------------------------------- offending batches


class Batch(NamedTuple):
    """One update as it was.

    Attributes:
      step: its number, from 1.
      figures: as Python numbers.
      rows: those that this process read.
      seed: `config.seed`, which with the step makes every key.
      skips: as in `loader.train_batches`.
    """

    step: int
    figures: dict[str, Any]
    rows: Any
    seed: dict[str, int]
    skips: loader.Skips


def save_batch(folder: pathlib.Path, batch: Batch) -> None:
    """Writes the batch into <folder>/offending, unless MOST_KEPT lie there.

    `<name>-<process>.npz` hold the rows (no pickle) and `<name>.json`, written last, the rest; the
    name is `<step>-<rewinds before it>`, because the same step may go wrong again after a rewind.
    """
    place, name = folder / OFFENDING, f"{batch.step}-{len(batch.skips)}"
    place.mkdir(exist_ok=True)
    if len(list(place.glob("*.json"))) >= MOST_KEPT:
        return
    np.savez(place / f"{name}-{jax.process_index()}.npz", **batch.rows._asdict())
    if jax.process_index() == 0:
        record = batch._asdict() | {"rows": None, "processes": jax.process_count()}
        write_atomically(place / f"{name}.json", json.dumps(record, indent=1) + "\n")


def load_batch(folder: pathlib.Path, step: int) -> Batch | None:
    """What `save_batch` wrote last of a step, with the rows of all processes, [B]; None = nothing.

    Raises:
      UserError: a file is damaged or missing.
    """
    found = (folder / OFFENDING).glob(f"{step}-*.json")
    path = max(found, key=lambda path: int(path.stem.partition("-")[2]), default=None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text())
        parts = [
            _load_rows(path.with_name(f"{path.stem}-{process}.npz"))
            for process in range(record.pop("processes"))
        ]
        fields = {name: np.concatenate([part[name] for part in parts]) for name in Row._fields}
        places = np.stack([fields["index"], fields["copy"]])
        _, first = np.unique(places, axis=1, return_index=True)  # processes may share rows
        rows = Row(**{name: field[first] for name, field in fields.items()})
        return Batch(**record | {"rows": rows})
    except (ValueError, TypeError, LookupError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path.with_suffix('')}* is damaged: {error}") from None


def _load_rows(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


# ------------------------------------------------------------------------------------------ rewinds


def read_rewinds(folder: pathlib.Path) -> list[dict]:
    """The rewinds of a run, oldest first.

    Raises:
      UserError: the file is not what was written.
    """
    path = folder / REWINDS
    try:
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def skips(rewinds: list[dict]) -> tuple[tuple[int, int], ...]:
    """What they make of the batches: `skips` of `loader.train_batches`."""
    return tuple((rewind["checkpoint"], rewind["skipped_batches"]) for rewind in rewinds)


def add_rewind(earlier: list[dict], spike: Spike, checkpoint: int) -> list[dict]:
    """The rewinds with one more; no batch between the checkpoint and the spike is read again.

    As in Chowdhery et al. (2022, section 5.1).
    """
    before = skips(earlier)
    first, last = (loader.batch_number(step, before) for step in (checkpoint, spike.step - 1))
    entry = {
        "spike": spike.step,
        "checkpoint": checkpoint,
        "skipped_batches": last + 1 - first,
        "loss": spike.figures["loss"],
        "loss_deviation": spike.figures["loss_deviation"],
    }
    return [*earlier, entry]


def rewind(folder: pathlib.Path, earlier: list[dict], spike: Spike, checkpoint: int) -> list[dict]:
    """`add_rewind`, noted in the run folder before the run goes back."""
    rewinds = add_rewind(earlier, spike, checkpoint)
    if jax.process_index() == 0:
        write_atomically(folder / REWINDS, "".join(json.dumps(each) + "\n" for each in rewinds))
    _say(
        f"back from update {spike.step} to the checkpoint of step {checkpoint}; the "
        f"{rewinds[-1]['skipped_batches']} batches between are skipped"
    )
    return rewinds
