"""A question: a folder with `sweep.py`, which says what is run, and what of it is drawn.

    experiments/<question>/
      README.md   question, protocol, decision rule, published numbers, what was run and its result
      sweep.py    PROTOCOLS, BASELINE, FIGURES and `runs(protocol)`, see `Question`

A question outside this folder works the same way: `python -m experiments.run my/question`.
"""

import importlib.util
import itertools
import pathlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pretraining.errors import UserError

FILE = "sweep.py"


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
      variant: what is compared; runs that differ in seeds alone have the same one.
      seed: which repetition; runs of the same number are pairs.
      config: a recipe, "configs/masked_lm.py:tiny".
      overrides: {"objective.mask_rate": 0.4}, seeds included; "train.steps" may be a SameFlops.
    """

    variant: str
    seed: int
    config: str
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        """That of its folder."""
        return f"{self.variant}-seed{self.seed}"


class SameFlops(NamedTuple):
    """The number of updates that cost what all updates of another variant cost.

    Attributes:
      variant: that other one.
    """

    variant: str


class Protocol(NamedTuple):
    """A size at which a question is asked.

    Attributes:
      about: one line for `--help`: scale, machine, time.
      yardstick: sample of `python -m pretraining.evaluate --suite=yardstick`: "quick", "full" or
        "" = no yardstick.
    """

    about: str
    yardstick: str = "quick"


class Published(NamedTuple):
    """A published curve.

    Attributes:
      label: of the curve.
      metric: what it shows, for its axis.
      source: paper and table.
      points: {knob or variant: value}.
    """

    label: str
    metric: str
    source: str
    points: Mapping[Any, float]


class Figure(NamedTuple):
    """The ablated metric against the ablated knob.

    Attributes:
      metric: a column of `results.frame`, "eval/loss" or "yardstick/blimp/accuracy".
      title: of the figure.
      better: which direction is good.
      knob: the config key on the x axis; "" = one place for each variant.
      series: {label: {config key: value}}: one curve each, of the runs whose config says so;
        {} = one curve of all runs.
      published: drawn in a panel beside, each on its own scale.
    """

    metric: str
    title: str
    better: Literal["lower", "higher"]
    knob: str = ""
    series: Mapping[str, Mapping[str, Any]] = {}
    published: tuple[Published, ...] = ()


class Question(NamedTuple):
    """What `sweep.py` defines, with its folder.

    Attributes:
      folder: of the question.
      title: the first line of the docstring of `sweep.py`.
      protocols: {name: Protocol}, its PROTOCOLS.
      baseline: its BASELINE, the variant that the others are compared to.
      figures: its FIGURES.
      runs: protocol -> runs, a function.
    """

    folder: pathlib.Path
    title: str
    protocols: dict[str, Protocol]
    baseline: str
    figures: tuple[Figure, ...]
    runs: Callable[[str], list[Run]]


# -------------------------------------------------------------------------------- for sweep.py


def product(**axes: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of overrides: one of each axis, the last axis fastest."""
    for combination in itertools.product(*axes.values()):
        yield {key: value for part in combination for key, value in part.items()}


def values(key: str, *choices: Any) -> list[dict[str, Any]]:
    """An axis: one override for each value of a key."""
    return [{key: choice} for choice in choices]


def seeds(number: int) -> dict[str, int]:
    """Overrides of repetition `number`: parameters, masks and dropout differ; the rows do not."""
    return {f"seed.{name}": number for name in ("init", "corruption", "dropout")}


def repeat(variant: str, config: str, overrides: Mapping[str, Any], count: int) -> list[Run]:
    """`count` runs of a variant that differ in their seeds."""
    return [Run(variant, n, config, {**overrides, **seeds(n)}) for n in range(count)]


# -------------------------------------------------------------------------------------- loading


def load(folder: str | pathlib.Path) -> Question:
    """Reads `<folder>/sweep.py`.

    Raises:
      UserError: there is no such folder or file, or it lacks a part.
    """
    folder = pathlib.Path(folder)
    path = folder / FILE
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {FILE} in it"
        raise UserError(f"question {str(folder)!r}: {what}; there are {', '.join(_shipped())}")
    module = _execute(path)
    for part in ("PROTOCOLS", "BASELINE", "FIGURES", "runs"):
        if not hasattr(module, part):
            raise UserError(f"{path} defines no {part}")
    title = (module.__doc__ or folder.name).strip().split("\n")[0]
    return Question(
        folder, title, module.PROTOCOLS, module.BASELINE, tuple(module.FIGURES), module.runs
    )


def runs(question: Question, protocol: str) -> list[Run]:
    """The runs of a protocol, checked.

    Raises:
      UserError: no such protocol, no runs, a name twice or one that cannot be that of a folder, or
        no run of the baseline.
    """
    if protocol not in question.protocols:
        names = ", ".join(question.protocols)
        raise UserError(f"--protocol={protocol}: {question.folder} has {names}")
    try:
        found = list(question.runs(protocol))
    except UserError:
        raise
    except Exception as error:
        raise UserError(_told(question.folder / FILE, error)) from error
    where = f"{question.folder / FILE}, protocol {protocol}:"
    if not found:
        raise UserError(f"{where} the sweep is empty, it has no runs")
    names = [run.name for run in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where} two runs are called {name!r}")
        if not re.fullmatch(r"[A-Za-z0-9._=+-]+", name):
            raise UserError(f"{where} {name!r} cannot be the name of a folder")
    if question.baseline not in {run.variant for run in found}:
        raise UserError(f"{where} no run is of the BASELINE {question.baseline!r}")
    return found


def _shipped() -> list[str]:
    here = pathlib.Path(__file__).parent
    return sorted(f"experiments/{path.parent.name}" for path in here.glob(f"*/{FILE}"))


def _execute(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location("_sweep", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_told(path, error)) from error
    return module


def _told(path: pathlib.Path, error: Exception) -> str:
    line = traceback.extract_tb(error.__traceback__)[-1]
    first = str(error).split("\n")[0]
    return f"{path}: {type(error).__name__}: {first} ({line.filename} line {line.lineno})"
