"""The table of a sweep, runs.csv: what is to be done, and how far it is."""

import csv
import io
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.running.planned import Planned
from pretraining import config as config_lib
from pretraining import metrics, run_folder
from pretraining.errors import UserError
from pretraining.files import write_atomically
from pretraining.manifest import MANIFEST

FILE = "runs.csv"
WAITING, RUNNING, FAILED, DONE = "waiting", "running", "failed", "done"
_STATUSES = (WAITING, RUNNING, FAILED, DONE)
_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its last lines


class Row(NamedTuple):
    """One run, a line of the file.

    Attributes:
      name: of its folder.
      variant: what is compared.
      seed: which repetition.
      config: the recipe.
      overrides: JSON.
      status: WAITING, RUNNING, FAILED or DONE.
      step: updates made.
      steps: updates to make.
      result: the figure that the question is about, or "".
      folder: the run folder.
    """

    name: str
    variant: str
    seed: int
    config: str
    overrides: str
    status: str
    step: int
    steps: int
    result: str
    folder: str


def row(planned: Planned, metric: str, status: str | None) -> Row:
    """What the run folder says now.

    Args:
      metric: the column `result`: of metrics.jsonl, or "yardstick/<figure>".
      status: of a run that is not done.
    """
    run, done = planned.run, is_done(planned)
    return Row(
        name=planned.name,
        variant=run.variant,
        seed=run.seed,
        config=run.config,
        overrides=json.dumps(planned.overrides),
        status=DONE if done else (status or WAITING),
        step=planned.cost.steps if done else step(planned.folder),
        steps=planned.cost.steps,
        result=_result(planned, metric) if done else "",
        folder=str(planned.folder),
    )


def is_done(planned: Planned) -> bool:
    """Whether the training has come to its end and the yardstick, if there is one, is written."""
    return is_trained(planned) and (not planned.sample or _yardstick(planned) is not None)


def is_trained(planned: Planned) -> bool:
    """Whether the training has come to its end."""
    checkpoints = planned.folder / run_folder.CHECKPOINTS
    return (checkpoints / str(planned.cost.steps) / MANIFEST).is_file()


def cores(planned: Planned) -> int | None:
    """Of the last start of the run; None = it has not begun."""
    if not (planned.folder / run_folder.CONFIG).exists():
        return None
    return run_folder.provenance(planned.folder, -1)["cores"]


def commands_left(planned: Planned, python: str = sys.executable) -> list[list[str]]:
    """The commands of a run that are still to be given."""
    if is_done(planned):
        return []
    return planned.commands(python)[1 if is_trained(planned) else 0 :]


def step(folder: pathlib.Path) -> int:
    """That of the last line of metrics.jsonl; 0 = there is none."""
    steps = (line["step"] for line in reversed(_last_lines(folder)) if "step" in line)
    return next(steps, 0)


def write(workdir: pathlib.Path, rows: Sequence[Row]) -> None:
    """Replaces the file as a whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Row._fields, *rows])
    write_atomically(workdir / FILE, text.getvalue())


def read(workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    """{name: {column: text}}; {} = there is no such file.

    Raises:
      UserError: the file is damaged, or was edited so that it is no such table.
    """
    path = workdir / FILE
    if not path.is_file():
        return {}
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file, strict=True))
        for number, line in enumerate(lines, 2):
            if problem := _problem(line):
                raise ValueError(f"line {number}: {problem}")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}; without it, it is written anew") from None
    return {line["name"]: line for line in lines}


def check_unchanged(planned: Sequence[Planned]) -> None:
    """Refuses to go on with a sweep whose question, or a recipe of it, has been edited since.

    Raises:
      UserError: a run that has begun would be another one now.
    """
    for each in planned:
        # What a run takes over from the one that it starts with is known only to itself.
        if not (each.folder / run_folder.CONFIG).exists() or each.config.init_from:
            continue
        now = config_lib.without_epochs(each.config)
        changed = config_lib.differences(run_folder.stored_config(each.folder), now)
        for key, change in changed.items():
            raise UserError(
                f"{each.folder} holds a run of another sweep: {key}: {change}; "
                "take another --workdir"
            )


def _problem(line: Mapping[str | None, str]) -> str:
    """Why it is not a row; "" = it is one."""
    if tuple(line) != Row._fields or None in line.values():
        return f"the columns are not {','.join(Row._fields)}"
    for name in ("seed", "step", "steps"):
        if not line[name].removeprefix("-").isdecimal():
            return f"{name} is {line[name]!r}"
    if line["status"] not in _STATUSES:
        return f"status is {line['status']!r}"
    try:
        overrides = json.loads(line["overrides"])
    except ValueError:
        overrides = None
    return "" if isinstance(overrides, dict) else f"overrides is {line['overrides']!r}"


def _yardstick(planned: Planned) -> dict[str, Any] | None:
    """The figures of the evaluation that follows the training; None = it is still to be done.

    It is that of the protocol's sample and of today's `PROTOCOL`, and has seen the files of all
    tasks that are asked for.
    """
    from pretraining.yardstick import suite

    name = f"{planned.cost.steps}-yardstick-{planned.sample}.json"
    try:
        stored = json.loads((planned.folder / "evaluations" / name).read_text())
        settings, figures = stored["settings"], dict(stored["figures"])
        complete = planned.digests.items() <= settings["tasks"].items()
        return figures if complete and settings["protocol"] == suite.PROTOCOL else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # there is none, or it is damaged


def _result(planned: Planned, metric: str) -> str:
    name = metric.removeprefix("yardstick/")
    if name == metric:
        lines: Sequence[Mapping[str, Any]] = metrics.read(planned.folder / metrics.FILE)
    else:
        found = _yardstick(planned)
        lines = [found] if found else []
    figures = [line[name] for line in lines if line.get(name) is not None]
    return f"{figures[-1]:.6g}" if figures else ""


def _last_lines(folder: pathlib.Path) -> list[dict]:
    """The last whole lines of metrics.jsonl that are objects with a step."""
    try:
        with open(folder / metrics.FILE, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut at the beginning of the tail, or being written
            continue
    return [line for line in lines if isinstance(line, dict)]
