"""What the runs of a sweep gave: a frame with a row per run, and their curves.

    from experiments import results

    results.frame("runs/masking_ratio")                # pandas, a row per run
    results.curves("runs/masking_ratio", "eval/loss")  # by step, a column per run

Only run folders are read (`config.json`, `metrics.jsonl`, `provenance.jsonl` and
`evaluations/*-yardstick-*.json`), from wherever they come: a sweep's folder, its folder `runs`, or
any folder that holds run folders. A run called `<variant>-seed<k>` is repetition k of that variant;
one of another name is a variant of its own.
"""

import collections
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas

from pretraining import config as config_lib
from pretraining import goodput, metrics, run_folder
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError

RUNS = "runs"  # of a sweep's folder
YARDSTICK = "yardstick/"  # before the names of a yardstick's figures

# What makes a config.json one of a run, as far as it is read here.
_NEEDED = (
    "objective.name",
    "data.sequence_length",
    "data.copies",
    "train.batch_size",
    "train.steps",
    "seed.data",
    "evaluate.rows",
)

_START = {"data", "commit", "python", "versions", "devices", "processes", "cores", "xla_flags"}


class Result(NamedTuple):
    """What one run left behind.

    Attributes:
      name: that of its folder.
      variant: what was compared.
      seed: which repetition; runs of the same number are pairs.
      folder: the run folder.
      config: {"section.key": value}, resolved.
      lines: those of metrics.jsonl.
      provenance: one entry for each start.
      yardstick: its newest yardstick, as evaluate wrote it, or None; see `read`.
    """

    name: str
    variant: str
    seed: int
    folder: pathlib.Path
    config: dict[str, Any]
    lines: list[dict]
    provenance: list[dict]
    yardstick: dict | None

    @property
    def step(self) -> int:
        """The last step with a line, 0 without any."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def step_tokens(self) -> int:
        """Tokens of one update: rows of the batch x T, fillers and copies counted."""
        payload = self.config["data.sequence_length"] - SPECIAL_POSITIONS
        return self.config["train.batch_size"] * payload

    @property
    def step_flops(self) -> float:
        """Matmul FLOPs of one update, NaN where no line has them.

        A metrics line holds time/mfu = FLOPs / time/step_s / time/peak_flops, so the product of the
        three gives back what `pretraining.flops.step_flops` counted, to rounding.
        """
        for line in reversed(self.lines):
            parts = [line.get(f"time/{name}") for name in ("mfu", "peak_flops", "step_s")]
            if all(parts):
                return parts[0] * parts[1] * parts[2]
        return math.nan

    @property
    def blimp_score(self) -> str:
        """By what it judges sentences: a likelihood, a pseudo-likelihood...; "" = not told."""
        return str(self.yardstick["settings"].get("blimp_score", "")) if self.yardstick else ""

    @property
    def family(self) -> str:
        """Objectives of one family have comparable figures; "" without a yardstick, which tells."""
        return self.yardstick["family"] if self.yardstick else ""


def read(folder: str | pathlib.Path) -> list[Result]:
    """The runs in a folder, by name; those that have not begun are not there.

    A run's yardstick is that of its newest step, of the parameters rather than of their moving
    average; of several samples that which most of the runs have, and of two as frequent the full.

    Raises:
      UserError: there is no such folder, there are no runs in it, or a file of one is damaged.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    place = folder / RUNS if (folder / RUNS).is_dir() else folder
    configs = place.glob(f"*/{run_folder.CONFIG}")
    found = sorted(path.parent for path in configs if _is_run(path.parent))
    if not found:
        raise UserError(f"{folder}: no sweep and no runs here (no */{run_folder.CONFIG} of a run)")
    yardsticks = {path: _yardsticks(path) for path in found}
    shared = collections.Counter(sample for own in yardsticks.values() for sample in own)
    runs = {}
    for run in (_read_run(path, _preferred(yardsticks[path], shared)) for path in found):
        if (twin := runs.setdefault((run.variant, run.seed), run)) is not run:
            raise UserError(f"{place}: {twin.name} and {run.name} are the same variant and seed")
    return list(runs.values())


def frame(runs: str | pathlib.Path | Sequence[Result]) -> pandas.DataFrame:
    """A row per run, indexed by name.

    Columns: variant, seed, family and blimp_score (of the yardstick; "" without), objective; every
    config key that differs among the runs, except seed.*; step; tokens = step x batch_size x T;
    distinct_tokens = tokens / data.copies; flops = step x FLOPs of a step; seconds of wall time,
    over all starts, without those between them; goodput (the share of them that made steps); the
    last value of every `eval/...` and of `train/loss`; every figure of the yardstick as
    `yardstick/...`. NaN where a run has no such figure.

    Args:
      runs: a folder, or what `read` gave.

    Raises:
      UserError: as of `read`.
    """
    found = _results(runs)
    varied = differing([result.config for result in found])
    varied = [key for key in varied if not key.startswith("seed.") and key != "objective.name"]
    rows = [_row(result, varied) for result in found]
    return pandas.DataFrame(rows, index=pandas.Index([r.name for r in found], name="name"))


def curves(runs: str | pathlib.Path | Sequence[Result], metric: str) -> pandas.DataFrame:
    """A metric over training: indexed by step, a column per run that has it.

    Raises:
      UserError: as of `read`.
    """
    columns = {
        result.name: pandas.Series(
            {line["step"]: line[metric] for line in result.lines if metric in line}, dtype=float
        )
        for result in _results(runs)
    }
    present = {name: column for name, column in columns.items() if column.notna().any()}
    return pandas.DataFrame(present).sort_index().rename_axis("step")


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The keys that are not in all of some flat dicts, or not with the same value, sorted."""
    keys = {key for config in configs for key in config}
    texts = (
        {json.dumps(c.get(key, "absent"), default=repr) for c in configs} for key in sorted(keys)
    )
    return [key for key, values in zip(sorted(keys), texts, strict=True) if len(values) > 1]


def _results(runs) -> list[Result]:
    return read(runs) if isinstance(runs, str | pathlib.Path) else list(runs)


def _row(result: Result, varied: list[str]) -> dict[str, Any]:
    last = {}
    for line in result.lines:
        last |= line
    seconds = sum(
        value
        for key, value in last.items()
        if key.startswith(goodput.PREFIX) and key != f"{goodput.PREFIX}down"
    )
    figures = result.yardstick["figures"] if result.yardstick else {}
    row = {
        "variant": result.variant,
        "seed": result.seed,
        "family": result.family,
        "blimp_score": result.blimp_score,
        "objective": result.config["objective.name"],
        **{key: result.config.get(key) for key in varied},
        "step": result.step,
        "tokens": result.step * result.step_tokens,
        "distinct_tokens": result.step * result.step_tokens // result.config["data.copies"],
        "flops": result.step * result.step_flops,
        "seconds": seconds or math.nan,
        "goodput": last.get(f"{goodput.PREFIX}step", math.nan) / (seconds or math.nan),
    }
    shown = {key: last[key] for key in last if key.startswith("eval/") or key == "train/loss"}
    shown |= {YARDSTICK + name: value for name, value in figures.items()}
    return row | {key: math.nan if value is None else value for key, value in shown.items()}


# -------------------------------------------------------------------------------------- one folder


def _read_run(folder: pathlib.Path, yardstick: dict | None) -> Result:
    match = re.fullmatch(r"(.+)-seed(\d+)", folder.name)
    variant, seed = (match[1], int(match[2])) if match else (folder.name, 0)
    config = _config(folder)
    lines, provenance = (_lines(folder / name) for name in (metrics.FILE, run_folder.PROVENANCE))
    for file, entries, needed in (
        (metrics.FILE, lines, {"step"}),
        (run_folder.PROVENANCE, provenance, _START),
    ):
        if missing := {key for entry in entries for key in needed - entry.keys()}:
            raise UserError(f"{folder / file} is damaged: a line without {min(missing)!r}")
    return Result(folder.name, variant, seed, folder, config, lines, provenance, yardstick)


def _is_run(folder: pathlib.Path) -> bool:
    """Whether a folder with a config.json is one of ours, be it damaged, or of another program."""
    if any((folder / name).exists() for name in (metrics.FILE, run_folder.PROVENANCE)):
        return True
    try:
        config = json.loads((folder / run_folder.CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and not config_lib.flatten(config).keys().isdisjoint(_NEEDED)


def _config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / run_folder.CONFIG
    config = config_lib.flatten(_object(path, path.read_text()))
    for key in _NEEDED:
        if key not in config:
            raise UserError(f"{path} is damaged: {key!r} is missing")
    return config


def _lines(path: pathlib.Path) -> list[dict]:
    """The lines of a file that a run may be writing: a last one cut in half is left out."""
    text = path.read_text() if path.exists() else ""
    whole = text.splitlines()
    if text and not text.endswith("\n"):
        whole.pop()
    return [_object(path, line, f" line {number}") for number, line in enumerate(whole, 1)]


def _yardsticks(folder: pathlib.Path) -> dict[str, dict]:
    """{sample: the yardstick}, of the newest step, of the parameters if they were measured."""
    found = collections.defaultdict(dict)
    for path in folder.glob("evaluations/*-yardstick-*.json"):
        stored = _object(path, path.read_text())
        if missing := {"step", "ema", "family", "settings", "figures"} - stored.keys():
            raise UserError(f"{path} is damaged: {min(missing)!r} is missing")
        sample = path.stem.rpartition("-")[-1]
        found[stored["step"], not stored["ema"]][sample] = stored
    return found[max(found)] if found else {}


def _preferred(yardsticks: Mapping[str, dict], shared: Mapping[str, int]) -> dict | None:
    if not yardsticks:
        return None
    return yardsticks[max(sorted(yardsticks), key=lambda name: (shared[name], name == "full"))]


def _object(path: pathlib.Path, text: str, place: str = "") -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}{place} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}{place} is damaged: no JSON object")
    return value
