"""A question: a folder with `sweep.py`, which says what is run, and what of it is drawn.

    experiments/<question>/
      README.md   question, protocol, decision rule, published numbers, what was run and its result
      sweep.py    PROTOCOLS, BASELINE, FIGURES and `runs(protocol)`, see `Question`; and, where not
                  every variant is tested against BASELINE, CONTRASTS

A report executes sweep.py, too: what it says must not change once runs have begun. A question
outside this folder works the same way: `python -m experiments.run my/question`.
"""

import importlib.util
import itertools
import pathlib
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from pretraining import config as config_lib
from pretraining.errors import UserError

FILE = "sweep.py"
Better = Literal["lower", "higher"]


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
      series: {label: {config key: value}}: one curve each, of the runs whose config says so, or
        {label: {"variant": names}}; {} = one curve of all runs.
      published: drawn in a panel beside, each on its own scale.
    """

    metric: str
    title: str
    better: Better
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
      contrasts: its CONTRASTS, {variant: the variant it is tested against}, chosen before any run;
        {} = every other variant against the baseline. See `contrasts`.
    """

    folder: pathlib.Path
    title: str
    protocols: dict[str, Protocol]
    baseline: str
    figures: tuple[Figure, ...]
    runs: Callable[[str], list[Run]]
    contrasts: Mapping[str, str] = {}


# -------------------------------------------------------------------------------- for sweep.py

Variants = dict[str, dict[str, Any]]  # {name: overrides}


def values(key: str, choices: Mapping[str, Any]) -> Variants:
    """One variant for each value of a key: {"low": 0.1} -> {"low": {key: 0.1}}."""
    return {name: {key: value} for name, value in choices.items()}


def product(*axes: Variants) -> Variants:
    """Every combination, the last axis fastest: "mask" and "15" make "mask-15"; "" adds nothing."""
    return {
        "-".join(filter(None, names)): _merged(a[name] for a, name in zip(axes, names, strict=True))
        for names in itertools.product(*axes)
    }


def together(*axes: Variants) -> Variants:
    """The variants of one name as one: what each axis gives that name.

    Raises:
      UserError: an axis lacks a name that another one has.
    """
    for axis in axes[1:]:
        if axis.keys() != axes[0].keys():
            raise UserError(f"together: {', '.join(axes[0])} do not go with {', '.join(axis)}")
    return {name: _merged(axis[name] for axis in axes) for name in axes[0]}


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


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
    folder = locate(folder)
    path = folder / FILE
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {FILE} in it"
        raise UserError(f"question {str(folder)!r}: {what}; there are {', '.join(_shipped())}")
    module = _execute(path)
    for part, (told, fits) in _PARTS.items():
        if not hasattr(module, part):
            raise UserError(f"{path} defines no {part}")
        if not fits(getattr(module, part)):
            raise UserError(f"{path}: {part} is not {told}")
    contrasts = getattr(module, "CONTRASTS", {})
    if not _is_mapping(contrasts, str, empty=True):
        raise UserError(f"{path}: CONTRASTS is not {{variant: variant}}")
    title = (module.__doc__ or folder.name).strip().split("\n")[0]
    parts = (module.PROTOCOLS, module.BASELINE, tuple(module.FIGURES), module.runs)
    return Question(folder, title, *parts, contrasts)


def locate(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder of a question: as typed, or else from the root of the repository."""
    folder, root = pathlib.Path(folder), pathlib.Path(__file__).parents[1]
    return folder if folder.is_dir() or not (root / folder).is_dir() else root / folder


def runs(question: Question, protocol: str) -> list[Run]:
    """The runs of a protocol, checked.

    Raises:
      UserError: no such protocol, no runs, a name twice or one that cannot be that of a folder, or
        no run of the baseline.
    """
    if protocol not in question.protocols:
        names = ", ".join(question.protocols)
        raise UserError(f"--protocol={protocol}: {question.folder} has {names}")
    found = _made(question, protocol)
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
    if question.contrasts:
        _check_contrasts(question)
    _check_figures(question, found[0].config)
    return found


def contrasts(question: Question, variants: Collection[str]) -> dict[str, str]:
    """The comparisons that were planned, {variant: the variant it is tested against}.

    Args:
      variants: those of the protocol; a comparison of another one is left out.
    """
    if not question.contrasts:
        others = [name for name in dict.fromkeys(variants) if name != question.baseline]
        return dict.fromkeys(others, question.baseline) if question.baseline in variants else {}
    return {one: other for one, other in question.contrasts.items() if {one, other} <= {*variants}}


def plan_of(question: Question) -> dict[str, Any]:
    """What decides: {"baseline", "contrasts", "metric", "better"}, which a sweep keeps from its
    beginning, so that nobody changes it after the results unnoticed."""
    first = question.figures[0]
    return {
        "baseline": question.baseline,
        "contrasts": dict(question.contrasts),
        "metric": first.metric,
        "better": first.better,
    }


def _made(question: Question, protocol: str) -> list[Run]:
    path = question.folder / FILE
    try:
        found = list(question.runs(protocol))
    except UserError:
        raise
    except Exception as error:
        raise UserError(_told(path, error)) from error
    for run in found:
        if not (isinstance(run, Run) and all(map(isinstance, run, (str, int, str, dict)))):
            raise UserError(
                f"{path}, protocol {protocol}: {run!r} is not Run(variant, seed, config, overrides)"
            )
    return found


def _check_contrasts(question: Question) -> None:
    variants = {run.variant for name in question.protocols for run in _made(question, name)}
    for one, other in question.contrasts.items():
        for name in {one, other} - variants:
            raise UserError(
                f"{question.folder / FILE}: CONTRASTS has {one!r}: {other!r}, and no protocol has "
                f"the variant {name!r}"
            )
        if one == other:
            raise UserError(f"{question.folder / FILE}: CONTRASTS has {one!r} against itself")


def _check_figures(question: Question, recipe: str) -> None:
    """Args: a recipe of the question, whose keys the knobs are of."""
    for figure in question.figures:
        where = f"{question.folder / FILE}: Figure({figure.metric!r}, ...):"
        if figure.better not in get_args(Better):
            raise UserError(f"{where} better is {figure.better!r}, not {get_args(Better)}")
        known = config_lib.flatten(config_lib.load(recipe)) if figure.knob else {}
        if figure.knob and figure.knob not in known:
            nearest = config_lib.nearest(figure.knob, known)
            raise UserError(f"{where} the knob {figure.knob!r} is no config key{nearest}")


def _is_mapping(value: Any, kind: type, empty: bool = False) -> bool:
    """Whether it is {str: kind}."""
    if not isinstance(value, Mapping) or not (value or empty):
        return False
    return all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def _are_figures(value: Any) -> bool:
    is_some = isinstance(value, list | tuple) and len(value) > 0
    return is_some and all(isinstance(figure, Figure) for figure in value)


_PARTS = {  # of a sweep.py: what each is, and whether one is that
    "PROTOCOLS": ("{name: Protocol}, with one at least", lambda v: _is_mapping(v, Protocol)),
    "BASELINE": ("the name of a variant", lambda v: isinstance(v, str)),
    "FIGURES": ("a tuple of Figure, with one at least", _are_figures),
    "runs": ("a function", callable),
}


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
    where = "" if isinstance(error, SyntaxError) else f" ({line.filename} line {line.lineno})"
    return f"{path}: {type(error).__name__}: {first}{where}"
