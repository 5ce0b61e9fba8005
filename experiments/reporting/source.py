"""A sweep as its folder tells: results, the question behind them, and what is not there yet."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import question as question_lib
from experiments import results as results_lib
from experiments.reporting import metrics, wording
from experiments.running import claim, table
from pretraining import run_folder
from pretraining.errors import UserError


class Sweep(NamedTuple):
    """What a report is made of.

    Attributes:
      folder: where the runs are.
      title: of the report.
      protocol: at which the question was asked; "" = unknown.
      results: of the runs that have begun.
      question: what was asked, or None.
      planned: the runs of the sweep, of `runs.csv` or else of the question; () = unknown.
      status: {name of a run: "waiting", "running", "failed" or "done"}; {} = unknown.
      note: why there is no question; "" = there is one.
      told: sweep.json, see `experiments.running.claim.read`; None = there is none.
    """

    folder: pathlib.Path
    title: str
    protocol: str
    results: tuple[results_lib.Result, ...]
    question: question_lib.Question | None
    planned: tuple[question_lib.Run, ...]
    status: dict[str, str]
    note: str
    told: dict[str, Any] | None

    @property
    def then(self) -> dict[str, Any] | None:
        """`question.plan_of` the question when its first run began, where it was recorded."""
        return self.told["planned"] if self.told and "planned" in self.told else None

    @property
    def variants(self) -> list[str]:
        """Those that have begun, in the order of the question; of others that of their names."""
        begun = {result.variant for result in self.results}
        asked = list(dict.fromkeys(run.variant for run in self.planned if run.variant in begun))
        return asked + sorted(begun - set(asked), key=_natural)

    @property
    def contrasts(self) -> dict[str, str]:
        """{variant: what it is held against}, as the question planned them; {} without one."""
        variants = dict.fromkeys(run.variant for run in self.planned)
        return question_lib.contrasts(self.question, variants) if self.question else {}

    @property
    def missing(self) -> list[str]:
        """Names of runs that were planned and have not begun."""
        begun = {result.name for result in self.results}
        return [run.name for run in self.planned if run.name not in begun]


def read(folder: str | pathlib.Path) -> Sweep:
    """Reads the run folders, `sweep.json`, `runs.csv` and the question's `sweep.py`.

    All but the run folders may be missing.

    Raises:
      UserError: there is no such folder, no run has begun or has a figure, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    recorded, status = _recorded(folder)
    try:
        found = tuple(results_lib.read(folder))
    except UserError:
        if recorded and not any(folder.glob(f"{results_lib.RUNS}/*/{run_folder.CONFIG}")):
            raise UserError(
                f"{folder}: none of its {wording.count(len(recorded), 'run')} has begun"
            ) from None
        raise
    if not any(map(_has_figure, found)):
        raise UserError(f"{folder}: no run of the {len(found)} that have begun has a figure yet")
    told = claim.read(folder)
    asked, planned, note = _question(told)
    title = asked.title if asked else folder.resolve().name
    protocol = told["protocol"] if told else ""
    runs = recorded or planned
    return Sweep(folder, title, protocol, found, asked, runs, status, note, told)


def _has_figure(result: results_lib.Result) -> bool:
    evaluated = any(line.get(metrics.LOSS) is not None for line in result.lines)
    return evaluated or bool(result.yardstick and result.yardstick["figures"])


def _recorded(folder: pathlib.Path) -> tuple[tuple[question_lib.Run, ...], dict[str, str]]:
    """The runs of `runs.csv`, and their status."""
    rows = table.read(folder)
    runs = (
        question_lib.Run(
            row["variant"], int(row["seed"]), row["config"], json.loads(row["overrides"])
        )
        for row in rows.values()
    )
    return tuple(runs), {name: row["status"] for name, row in rows.items()}


def _question(told: Mapping[str, Any] | None):
    """The question and its runs, or why there is none."""
    if told is None:
        return None, (), f"There is no {claim.FILE}: the question is not known."
    path = question_lib.locate(told["question"]) / question_lib.FILE
    if not path.is_file():
        return None, (), f"The question is gone: there is no {path}."
    try:
        asked = question_lib.load(told["question"])
        return asked, tuple(question_lib.runs(asked, told["protocol"])), ""
    except UserError as error:
        return None, (), f"The question cannot be read: {error}."


def _natural(name: str) -> list:
    """A key that sorts p9 before p10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", name)]
