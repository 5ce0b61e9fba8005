"""The runs of a sweep before any of them starts: their commands, checked, and what they cost."""

import fnmatch
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from experiments import question as question_lib
from experiments.machine import Share, bind
from experiments.question import Question, Run, SameFlops
from pretraining import cli
from pretraining import config as config_lib
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError

_STEPS = "train.steps"
# What the runs of one sweep may differ in and still read one token store.
_OWN = ("sequence_length", "copies", "workers", "prefetch", "threads")


class Planned(NamedTuple):
    """A run and what it takes.

    Attributes:
      run: as the question has it.
      overrides: of the run and of the command line of the sweep, which wins.
      folder: the run folder.
      config: checked, with everything overridden.
      yardstick: options of the evaluation that follows the training; () = none follows.
      cost: see `Cost`.
    """

    run: Run
    overrides: dict[str, Any]
    folder: pathlib.Path
    config: Any
    yardstick: tuple[str, ...]
    cost: "Cost"

    @property
    def name(self) -> str:
        return self.run.name

    def commands(self, python: str = sys.executable) -> list[list[str]]:
        """The words of each command, as a user would type them; each after the one before."""
        workdir = f"--workdir={self.folder}"
        train = [python, "-m", "pretraining.train", *_config_words(self), workdir]
        if not self.yardstick:
            return [train]
        return [train, [python, "-m", "pretraining.evaluate", workdir, *self.yardstick]]

    def preparation(self) -> list[str]:
        """The words of the command that prepares its token store."""
        return [sys.executable, "-m", "pretraining.data.prepare", *_config_words(self)]


class Cost(NamedTuple):
    """What a run takes.

    Attributes:
      steps: updates.
      tokens: positions of text that they consume, copies counted.
      flops: of all updates, see `pretraining.flops.step_flops`.
      peak: FLOP/s of the devices of one run.
    """

    steps: int
    tokens: int
    flops: float
    peak: float


def plan(
    question: Question,
    protocol: str,
    overrides: Mapping[str, str],
    workdir: pathlib.Path,
    share: Share,
    tasks: str = "",
) -> list[Planned]:
    """All runs of a sweep, each of which could start; nothing is written.

    Args:
      overrides: of every run, values as typed.
      share: the part of the machine that one run gets.
      tasks: folder of the yardstick's tasks; "" = none.

    Raises:
      UserError: a config that would be refused, named by its run; runs that do not share one token
        store or the order of its rows; an override of what the sweep varies.
    """
    runs = question_lib.runs(question, protocol)
    _check_overrides(runs, overrides)
    sample = question.protocols[protocol].yardstick
    yardstick = ("--suite=yardstick", f"--sample={sample}") if sample else ()
    if tasks and not sample:
        raise UserError(f"--tasks={tasks}: protocol {protocol} has no yardstick")
    yardstick += (f"--tasks={tasks}",) if tasks else ()
    found = []
    for run in runs:
        folder = workdir / "runs" / run.name
        merged = {**run.overrides, **overrides}
        if isinstance(like := run.overrides.get(_STEPS), SameFlops):
            merged[_STEPS] = _find(runs, like, run).overrides[_STEPS]  # for the time being
            merged |= overrides
        found.append(_checked(Planned(run, merged, folder, None, yardstick, None)))
    _check_shared(found)
    costs = _rehearse(found, share)
    found = [each._replace(cost=cost) for each, cost in zip(found, costs, strict=True)]
    return [_matched(each, found) for each in found]


def choose(names: Sequence[str], only: str | None) -> list[str]:
    """The names that one of the patterns, "*-seed0,random", is a part of or matches; all for None.

    Raises:
      UserError: there is none.
    """
    if only is None:
        return list(names)
    patterns = [pattern for pattern in only.split(",") if pattern]
    chosen = [n for n in names if any(p in n or fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not chosen:
        raise UserError(f"--only={only} matches none of the {len(names)} runs: {_listed(names)}")
    return chosen


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _config_words(planned: Planned) -> list[str]:
    words = [f"--config.{key}={value}" for key, value in planned.overrides.items()]
    return [f"--config={planned.run.config}", *words]


# -------------------------------------------------------------------------------------- checking


def _checked(planned: Planned) -> Planned:
    """The same with its config, and with the overrides as they stand in it."""
    config = _named(planned.name, _parse, planned)
    flat = config_lib.flatten(config)
    return planned._replace(config=config, overrides={key: flat[key] for key in planned.overrides})


def _find(runs: Sequence[Run], like: SameFlops, run: Run) -> Run:
    """The run of that variant that has the same number."""
    for other in runs:
        fixed = not isinstance(other.overrides.get(_STEPS), SameFlops)
        if (other.variant, other.seed) == (like.variant, run.seed) and fixed:
            return other
    raise UserError(f"{run.name}: {like}: no run of that variant and seed has its own {_STEPS}")


def _matched(planned: Planned, everything: Sequence[Planned]) -> Planned:
    """The same with its own number of updates, where that follows from another run."""
    like = planned.run.overrides.get(_STEPS)
    if not isinstance(like, SameFlops):
        return planned
    target = _find([each.run for each in everything], like, planned.run).name
    wanted = next(each.cost for each in everything if each.name == target)
    cost = planned.cost
    steps = max(1, round(cost.steps * wanted.flops / cost.flops))
    scaled = cost._replace(
        steps=steps, tokens=cost.tokens // cost.steps * steps, flops=cost.flops / cost.steps * steps
    )
    overrides = {**planned.overrides, _STEPS: steps}
    return _checked(planned._replace(overrides=overrides, cost=scaled))


def _named(name: str, function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _parse(planned: Planned):
    """The config as the training command will read it."""
    config = cli.parse(["train", *_config_words(planned)], "", {})["config"]
    config_lib.validate(config)
    if "epoch" in str(config.train.steps):
        raise UserError(f"config.train.steps={config.train.steps!r}: a sweep wants steps or tokens")
    return config


def _check_overrides(runs: Sequence[Run], overrides: Mapping[str, str]) -> None:
    for key in overrides:
        own = [run.overrides.get(key, "as in the recipe") for run in runs]
        choices = {str(value) for value in own if not isinstance(value, SameFlops)}
        if len(choices) > 1:
            listed = ", ".join(sorted(choices))
            raise UserError(f"--config.{key}={overrides[key]}: the sweep varies it ({listed})")


def _check_shared(planned: Sequence[Planned]) -> None:
    """One token store for all; one order of rows for all runs of the same repetition."""
    for each in planned:
        pair = next(other for other in planned if other.run.seed == each.run.seed)
        for other, keys in ((planned[0], _store_keys), (pair, _order_keys)):
            ours, theirs = keys(each.config), keys(other.config)
            for key in ours:
                if ours[key] != theirs[key]:
                    raise UserError(
                        f"{other.name} and {each.name} would not see the same rows: "
                        f"config.{key}={theirs[key]!r} and {ours[key]!r}"
                    )


def _store_keys(config) -> dict[str, Any]:
    flat = config_lib.flatten(config)
    own = {f"data.{name}" for name in _OWN}
    return {k: v for k, v in flat.items() if k.startswith(("data.", "tokenizer.")) and k not in own}


def _order_keys(config) -> dict[str, Any]:
    return {"seed.data": config.seed.data, "seed.evaluation": config.seed.evaluation}


# ------------------------------------------------------------------------------------------- cost


def _rehearse(planned: Sequence[Planned], share: Share) -> list[Cost]:
    """The costs; configs that differ in seeds alone are looked at once.

    In a process of its own: it takes the devices, which the runs want.
    """
    keys = [_key(each.config) for each in planned]
    first = dict(reversed(list(zip(keys, planned, strict=True))))
    items = [(each.name, config_lib.to_json(each.config)) for each in first.values()]
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (share, os.getcwd())) as pool:
        costs = dict(zip(first, pool.submit(_costs, items).result(), strict=True))
    return [costs[key] for key in keys]


def _key(config) -> str:
    flat = config_lib.flatten(config)
    return json.dumps({k: v for k, v in flat.items() if not k.startswith("seed.")}, default=str)


def _begin(share: Share, folder: str) -> None:
    os.chdir(folder)
    os.environ.update(share.environment)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    bind(share.cores)


def _costs(items: Sequence[tuple[str, str]]) -> list[Cost]:
    from pretraining import flops, program

    peak, costs = None, []
    for name, text in items:
        config = config_lib.from_json(text)
        config, vocabulary, _ = _named(name, program.rehearse, config)
        peak = peak or flops.peak_flops(config)
        steps = config.train.steps
        tokens = steps * config.train.batch_size * (config.data.sequence_length - SPECIAL_POSITIONS)
        costs.append(Cost(steps, tokens, steps * flops.step_flops(config, vocabulary), peak))
    return costs
