"""The runs of a sweep before any of them starts: their commands, checked, and what they cost."""

import fnmatch
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from experiments import question as question_lib
from experiments.question import Question, Run, SameFlops
from experiments.running.machine import Share, bind
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
      sample: of the yardstick that follows the training; "" = none follows.
      tasks: folder of the yardstick's tasks; "" = without tasks.
      digests: of the files of these tasks, see `pretraining.yardstick.tasks.Tasks`.
      cost: see `Cost`.
    """

    run: Run
    overrides: dict[str, Any]
    folder: pathlib.Path
    config: Any
    sample: str
    tasks: str
    digests: Mapping[str, str]
    cost: "Cost"

    @property
    def name(self) -> str:
        return self.run.name

    def commands(self, python: str = sys.executable) -> list[list[str]]:
        """The words of each command, as a user would type them; each after the one before."""
        workdir = f"--workdir={self.folder}"
        train = [python, "-m", "pretraining.train", *self.arguments()]
        if not self.sample:
            return [train]
        options = ["--suite=yardstick", f"--sample={self.sample}"]
        options += [f"--tasks={self.tasks}"] if self.tasks else []
        return [train, [python, "-m", "pretraining.evaluate", workdir, *options]]

    def arguments(self) -> list[str]:
        """The words of the training command, behind its name."""
        return [*_words(self.run, self.overrides), f"--workdir={self.folder}"]

    def preparation(self) -> list[str]:
        """The words of the command that prepares its token store."""
        words = _words(self.run, self.overrides)
        return [sys.executable, "-m", "pretraining.data.prepare", *words]


class Cost(NamedTuple):
    """What a run takes.

    Attributes:
      steps: updates.
      tokens: positions of text that they consume, copies counted.
      flops: of all updates, see `pretraining.flops.step_flops`.
      peak: FLOP/s of the devices of one run.
      knobs: names of those of its objective.
    """

    steps: int
    tokens: int
    flops: float
    peak: float
    knobs: tuple[str, ...] = ()


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
        store or the order of its rows; an override of what the sweep varies; files of tasks that
        cannot be read.
    """
    runs = question_lib.runs(question, protocol)
    _check_overrides(runs, overrides)
    sample = question.protocols[protocol].yardstick
    if tasks and not sample:
        raise UserError(f"--tasks={tasks}: protocol {protocol} has no yardstick")
    digests = _digests(tasks, sample) if tasks else {}
    typed = [{**_with_steps(run, runs).overrides, **overrides} for run in runs]
    configs = [_parse(run, own) for run, own in zip(runs, typed, strict=True)]
    _check_shared(runs, configs)
    costs = {
        run.name: cost for run, cost in zip(runs, _rehearse(runs, configs, share), strict=True)
    }
    found = []
    for run, own, config in zip(runs, typed, configs, strict=True):
        cost = costs[run.name]
        if isinstance(run.overrides.get(_STEPS), SameFlops):
            cost = _scaled(cost, costs[_find(runs, run).name].flops)
            own = own | {_STEPS: cost.steps}
            config = _parse(run, own)
        flat = config_lib.flatten(config)
        parsed = {key: flat[key] for key in own}
        folder = workdir / "runs" / run.name
        found.append(
            Planned(
                run=run,
                overrides=parsed,
                folder=folder,
                config=config,
                sample=sample,
                tasks=tasks,
                digests=digests,
                cost=cost,
            )
        )
    return found


def choose(runs: Sequence[Run], only: str | None) -> list[str]:
    """The names of the runs that are chosen; all for None.

    Args:
      only: names, variants, or patterns of either: "mask-15,*-seed0".

    Raises:
      UserError: one chooses nothing.
    """
    names = [run.name for run in runs]
    if only is None:
        return names
    chosen: set[str] = set()
    for pattern in only.split(","):
        texts = ((run, text) for run in runs for text in (run.name, run.variant))
        more = {run.name for run, text in texts if fnmatch.fnmatchcase(text, pattern)}
        if not more:
            raise UserError(
                f"--only={only}: {pattern!r} is none of the {len(names)} runs, nor a variant or a "
                f"pattern (*-seed0) of them: {_listed(names)}"
            )
        chosen |= more
    return [name for name in names if name in chosen]


def duration(seconds: float) -> str:
    """For people: "45 s", "12 min", "3 h 05 min", "4 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 72 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(minutes / 1440):,} days"


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _words(run: Run, overrides: Mapping[str, Any]) -> list[str]:
    return [f"--config={run.config}", *(f"--config.{k}={v}" for k, v in overrides.items())]


# -------------------------------------------------------------------------------------- checking


def _digests(folder: str, sample: str) -> dict[str, str]:
    from pretraining.yardstick import tasks

    return tasks.read(pathlib.Path(folder), tasks.SAMPLES[sample]).digests


def _with_steps(run: Run, runs: Sequence[Run]) -> Run:
    """The same with updates that can be compiled: those of the run whose FLOPs it will cost."""
    if not isinstance(run.overrides.get(_STEPS), SameFlops):
        return run
    of_other = {k: v for k, v in _find(runs, run).overrides.items() if k == _STEPS}
    rest = {k: v for k, v in run.overrides.items() if k != _STEPS}
    return run._replace(overrides=rest | of_other)


def _find(runs: Sequence[Run], run: Run) -> Run:
    """The run of the same number whose FLOPs this one is to cost."""
    like = run.overrides[_STEPS]
    for other in runs:
        fixed = not isinstance(other.overrides.get(_STEPS), SameFlops)
        if (other.variant, other.seed) == (like.variant, run.seed) and fixed:
            return other
    raise UserError(f"{run.name}: {like}: no run of that variant and seed has its own {_STEPS}")


def _scaled(cost: Cost, flops: float) -> Cost:
    """That of as many updates as cost so many FLOPs."""
    steps = max(1, round(cost.steps * flops / cost.flops))
    tokens, of_one = cost.tokens // cost.steps, cost.flops / cost.steps
    return cost._replace(steps=steps, tokens=tokens * steps, flops=of_one * steps)


def _named(name: str, function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _parse(run: Run, overrides: Mapping[str, Any]):
    """The config as the training command will read it."""
    words = ["train", *_words(run, overrides)]
    config = _named(run.name, lambda: cli.parse(words, "", {})["config"])
    _named(run.name, config_lib.validate, config)
    if "epoch" in str(config.train.steps):
        steps = config.train.steps
        raise UserError(f"{run.name}: config.train.steps={steps!r}: a sweep wants steps or tokens")
    return config


def _check_overrides(runs: Sequence[Run], overrides: Mapping[str, str]) -> None:
    for key in overrides:
        own = [run.overrides.get(key, "as in the recipe") for run in runs]
        choices = {str(value) for value in own if not isinstance(value, SameFlops)}
        if len(choices) > 1:
            listed = ", ".join(sorted(choices))
            raise UserError(f"--config.{key}={overrides[key]}: the sweep varies it ({listed})")


def _check_shared(runs: Sequence[Run], configs: Sequence[Any]) -> None:
    """One token store for all; one order of rows for all runs of the same repetition."""
    first = {}  # of each repetition
    for run, config in zip(runs, configs, strict=True):
        pair = first.setdefault(run.seed, (run, config))
        for (other, like), keys in (((runs[0], configs[0]), _store_keys), (pair, _order_keys)):
            ours, theirs = keys(config), keys(like)
            for key in ours:
                if ours[key] != theirs[key]:
                    raise UserError(
                        f"{other.name} and {run.name} would not see the same rows: "
                        f"config.{key}={theirs[key]!r} and {ours[key]!r}"
                    )


def _store_keys(config) -> dict[str, Any]:
    flat = config_lib.flatten(config)
    own = {f"data.{name}" for name in _OWN}
    return {k: v for k, v in flat.items() if k.startswith(("data.", "tokenizer.")) and k not in own}


def _order_keys(config) -> dict[str, Any]:
    return {"seed.data": config.seed.data, "seed.evaluation": config.seed.evaluation}


# ------------------------------------------------------------------------------------------- cost


def _rehearse(runs: Sequence[Run], configs: Sequence[Any], share: Share) -> list[Cost]:
    """The costs; configs that differ in seeds alone are looked at once.

    In a process of its own: it takes the devices, which the runs want.
    """
    keys, items = [config_lib.without_seeds(config) for config in configs], {}
    for key, run in zip(keys, runs, strict=True):
        items.setdefault(key, (run.name, key))
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (share, os.getcwd())) as pool:
        costs = pool.submit(_costs, list(items.values())).result()
    return [dict(zip(items, costs, strict=True))[key] for key in keys]


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
        config, vocabulary, built = _named(name, program.rehearse, config)
        knobs = program.knobs(built.objective)
        peak = peak or flops.peak_flops(config)
        steps = config.train.steps
        tokens = steps * config.train.batch_size * (config.data.sequence_length - SPECIAL_POSITIONS)
        of_all = steps * flops.step_flops(config, vocabulary)
        costs.append(Cost(steps, tokens, of_all, peak, knobs))
    return costs
