"""A run as its folder tells it: config, curves, counts."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from pretraining import config as config_lib
from pretraining import goodput, metrics, run_folder
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError

# Metrics that are no term of a loss.
_NO_TERM = ("loss", "gradient_norm", "learning_rate", "loss_deviation", "skipped", "rewinds")
_NEAR = 0.25  # of log V: how far a fresh model's token loss may lie from it


@dataclasses.dataclass(frozen=True)
class Record:
    """What the checks read.

    Attributes:
      folder: of the run.
      config: resolved, flat: {"section.key": value}.
      lines: of metrics.jsonl; null stands for what was not finite.
      counts: [V] int64, how often each token occurs in the training text.
      starts: one dict for each start of the run, of provenance.jsonl.
      term: name of the loss of tokens, which `unigram_loss` belongs to; "" = none was found.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    lines: list[dict]
    counts: np.ndarray
    starts: list[dict]
    term: str

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
        steps, loss = self.series(f"eval/{self.term}")
        _, unigram = self.series("eval/unigram_loss")
        if not self.term or len(loss) != len(unigram):
            return np.zeros(0), np.zeros(0)
        return steps, loss - unigram


def read(folder: str | pathlib.Path) -> Record:
    """Reads a run folder, of a run that goes on or of one that has ended.

    Raises:
      UserError: there is no run in the folder, or it is damaged.
    """
    folder = run_folder.locate(folder)
    config = config_lib.flatten(run_folder.stored_config(folder))
    lines = metrics.read(folder / metrics.FILE)
    path = folder / run_folder.VOCABULARY / "unigram_counts.npy"
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    number = len((folder / run_folder.PROVENANCE).read_text().splitlines())
    starts = [run_folder.provenance(folder, start) for start in range(number)]
    return Record(folder, config, lines, counts, starts, token_term(lines, np.log(len(counts))))


def token_term(lines: list[dict], log_v: float) -> str:
    """The name of the loss of tokens: the one term that is the whole loss, or else the first, by
    name, that begins near log V; "" = there is none."""
    if not lines:
        return ""
    first = {
        name.removeprefix("train/"): value
        for name, value in sorted(lines[0].items())
        if name.startswith("train/") and value is not None
    }
    if "unigram_loss" not in first:
        return ""
    terms = {
        name: value
        for name, value in first.items()
        if name not in (*_NO_TERM, "unigram_loss") and "/" not in name
    }
    whole = [name for name, value in terms.items() if value == first.get("loss")]
    near = [name for name, value in terms.items() if abs(value - log_v) < _NEAR * log_v]
    return (whole + near + [""])[0]


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
