"""A run as its folder tells it: config, curves, counts."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from pretraining import config as config_lib
from pretraining import goodput, metrics, run_folder
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """What the checks read.

    Attributes:
      folder: of the run.
      config: resolved, flat: {"section.key": value}.
      lines: of metrics.jsonl; null stands for what was not finite.
      counts: [V] int64, how often each token occurs in the training text.
      starts: one dict for each start of the run, of provenance.jsonl.
      term: the objective's `token_term`, the loss that `unigram_loss` belongs to; "" = none.
      evaluation_knobs: the objective's: those of every evaluation.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    lines: list[dict]
    counts: np.ndarray
    starts: list[dict]
    term: str
    evaluation_knobs: dict[str, float]

    @property
    def step(self) -> int:
        """Of the last line; 0 = there is none."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config["train.steps"]

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch, copies and fillers counted."""
        payload = self.config["data.sequence_length"] - SPECIAL_POSITIONS
        return self.config["train.batch_size"] * payload

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return self.step * self.tokens_per_step

    @property
    def log_v(self) -> float:
        """Nats of a guess among all tokens."""
        return float(np.log(len(self.counts)))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and finite values [n] of a metric."""
        pairs = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, values

    def last(self, name: str) -> float | None:
        """The last finite value of a metric; None = there is none."""
        _, values = self.series(name)
        return float(values[-1]) if len(values) else None

    def total(self, phase: str) -> float:
        """Seconds that `goodput.PHASES` spent in a phase; 0 where nothing was noted."""
        return self.last(goodput.PREFIX + phase) or 0.0

    def excess(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the validation loss of tokens minus that of the unigram distribution."""
        names = f"eval/{self.term}", "eval/unigram_loss"
        found = [[line["step"], *map(line.get, names)] for line in self.lines]
        whole = [values for values in found if None not in values]
        steps, loss, unigram = np.array(whole, np.float64).reshape(-1, 3).T
        return steps, loss - unigram


def read(folder: str | pathlib.Path) -> Record:
    """Reads a run folder, of a run that goes on or of one that has ended.

    Raises:
      UserError: there is no run in the folder, or it is damaged.
    """
    folder = run_folder.locate(folder)
    config = run_folder.stored_config(folder)
    vocabulary = Vocabulary.load(folder / run_folder.VOCABULARY)
    objective = config_lib.build_objective(config, vocabulary)
    run_folder.provenance(folder, 0)  # refuses a file that is missing
    number = len((folder / run_folder.PROVENANCE).read_text().splitlines())
    return Record(
        folder,
        config_lib.flatten(config),
        metrics.read(folder / metrics.FILE),
        vocabulary.unigram_counts,
        [run_folder.provenance(folder, start) for start in range(number)],
        objective.token_term,
        objective.evaluation_knobs,
    )


def find(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The run folders that a path names: itself, or those in it, or in its folder `runs`.

    Raises:
      UserError: there is none.
    """
    path = run_folder.locate(path)
    if (path / run_folder.CONFIG).is_file():
        return [path]
    for parent in (path, path / "runs"):
        found = sorted(file.parent for file in parent.glob(f"*/{run_folder.CONFIG}"))
        if found:
            return found
    raise UserError(f"{path}: there is no run here, and no folder of runs (no {run_folder.CONFIG})")
