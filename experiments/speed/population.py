"""Runs that train as one program against the same runs, each by itself.

    python -m experiments.speed.population [--members=8] [--steps=100] [--rounds=2] [--output=FILE]
        [--config.SECTION.KEY=VALUE ...]

Rounds A B C D A B C D, as `experiments.run` would start them, each from an empty folder of compiled
programs that its runs share, with a token store that is there:

  A  one population on all cores
  B  the runs one after another on all cores
  C  the same with one learning rate: they differ in seeds alone, and one compiled program serves
     them all, where those of B, whose learning rates differ, compile one each
  D  the runs of B two at once, each on half of the cores (not with GPUs, nor an odd number of runs)

of configs/masked_lm.py:tiny with the overrides of the protocol tiny (experiments/sizes.py), members
that differ in all seeds, so that each reads a stream of rows of its own, and in the learning rate,
an evaluation and a checkpoint at the end.

`all` is everything from the start of the first process to the end of the last; `updates` is the
time in the phases step and data_wait of the runs' own ledgers (of two at once, half of their sum).
Seconds of every round; throughput, in payload tokens of all runs together, of the median.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.speed.population",
        __doc__,
        with_config=False,
        with_overrides=True,
        members="runs (default 8)",
        steps="updates of each (default 100)",
        rounds="of each kind (default 2)",
        output="file that is written (default: experiments/speed/measured/population.md)",
    )

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import sizes
from experiments.running import launchers, machine, together
from experiments.running.launchers import Job
from experiments.running.planned import Cost, Planned, Run
from experiments.speed import fresh, page
from pretraining import config as config_lib
from pretraining import metrics
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError
from pretraining.goodput import PREFIX

RECIPE = "configs/masked_lm.py:tiny"
OVERRIDES = sizes.TINY | {"evaluate.every": 0, "checkpoint.every": 0}


class Kind(NamedTuple):
    """A way to train the runs: in one program or not, and how many programs at once."""

    name: str
    population: bool
    at_once: int
    one_rate: bool = False


class Timed(NamedTuple):
    """Seconds of one round: from start to end, and of updates alone."""

    all: float
    updates: float


def main(
    overrides: Mapping[str, str],
    members: str | None,
    steps: str | None,
    rounds: str | None,
    output: str | None,
) -> int:
    """The command."""
    counts = {
        "members": cli.number("members", members, 8, at_least=2),
        "steps": cli.number("steps", steps, 100, at_least=2),
        "rounds": cli.number("rounds", rounds, 2, at_least=1),
    }
    if "data.cache" in overrides:
        raise UserError(f"config.data.cache={overrides['data.cache']!r}: each round has its own")
    path = page.place("population", output)
    options = counts | {f"config.{key}": value for key, value in overrides.items()}
    origin = page.origin("population", options, ("jax", "jaxlib", "flax"))
    chosen = {**OVERRIDES, "train.steps": counts["steps"], **overrides}
    rows, payload = measure(counts["members"], chosen, counts["rounds"])
    page.write(path, "# Sweeps in one program", origin, table(rows, payload))
    return 0


def measure(
    count: int, overrides: Mapping[str, Any], rounds: int
) -> tuple[dict[str, list[Timed]], int]:
    """({kind: its rounds}, payload tokens of all runs together)."""
    kinds = [
        Kind("one population", True, 1),
        Kind("one after another", False, 1),
        Kind("one after another, one learning rate", False, 1, one_rate=True),
    ]
    share = machine.shares(None)[0]
    if not share.environment and len(share.cores) > 1 and count % 2 == 0:
        kinds.append(Kind("two at once", False, 2))
    rows: dict[str, list[Timed]] = {kind.name: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        planned = plan(pathlib.Path(folder), count, overrides)
        subprocess.run(planned[0].preparation(), check=True, stdout=subprocess.DEVNULL)
        for number in range(rounds):
            for kind in kinds:
                place = pathlib.Path(folder) / f"{number}-{kinds.index(kind)}"
                members = plan(place, count, overrides, kind.one_rate)
                rows[kind.name].append(time_round(kind, members, place))
                print(number, kind.name, rows[kind.name][-1], file=sys.stderr, flush=True)
    return rows, tokens(planned)


def plan(
    folder: pathlib.Path, count: int, overrides: Mapping[str, Any], one_rate: bool = False
) -> list[Planned]:
    """The runs: each has seeds of its own and, unless they have one, a learning rate of its own."""
    found, peak, config = [], float(overrides["optimizer.learning_rate"]), config_lib.load(RECIPE)
    for number in range(count):
        seeds = {f"seed.{name}": number for name in config.seed}
        rate = {"optimizer.learning_rate": peak * (1 if one_rate else 1 + number / count)}
        own = {**overrides, **seeds, **rate}
        found.append(
            Planned(
                run=Run(f"member{number}", 0, RECIPE, own),
                overrides=own,
                folder=folder / f"member{number}",
                config=config,
                sample="",
                tasks="",
                digests={},
                cost=Cost(steps=0, tokens=0, flops=0.0, peak=0.0),
            )
        )
    return found


def tokens(planned: list[Planned]) -> int:
    """Payload tokens of all updates of all runs."""
    own = planned[0].overrides
    row = int(own["data.sequence_length"]) - SPECIAL_POSITIONS
    return len(planned) * int(own["train.steps"]) * int(own["train.batch_size"]) * row


def time_round(kind: Kind, planned: list[Planned], folder: pathlib.Path) -> Timed:
    """Trains them all.

    Raises:
      UserError: a run failed.
    """
    folder.mkdir(parents=True)
    commands = [each.commands()[0] for each in planned]
    if kind.population:
        commands = [together.command(planned)]
    jobs = [Job(str(n), [words], folder / f"{n}.log") for n, words in enumerate(commands)]
    cache = fresh.environment(folder / "cache")
    shares = [
        share._replace(environment=share.environment | cache)
        for share in machine.shares(kind.at_once)
    ]
    began = time.perf_counter()
    with open(os.devnull) as held:
        started = launchers.local(jobs, shares, held.fileno(), lambda: False)
        *_, statuses = started
    seconds = time.perf_counter() - began
    for job in jobs:
        if statuses[job.name]:
            raise UserError(f"{kind.name}: a run failed: {job.log.read_text()[-1000:]}")
    lines = [metrics.read(each.folder / metrics.FILE)[-1] for each in planned]
    updates = sum(line[f"{PREFIX}step"] + line[f"{PREFIX}data_wait"] for line in lines)
    return Timed(seconds, updates / kind.at_once)


def table(rows: Mapping[str, list[Timed]], count: int) -> str:
    """Markdown; ratios are of throughputs, to the runs one after another."""
    median = {
        name: Timed(*(statistics.median(column) for column in zip(*timed, strict=True)))
        for name, timed in rows.items()
    }
    base = median["one after another"]
    cells = []
    for name, timed in median.items():
        cells.append([name])
        for listed, value, first in zip(zip(*rows[name], strict=True), timed, base, strict=True):
            seconds = " ".join(f"{each:.0f}" for each in listed)
            cells[-1] += [seconds, f"{count / value:,.0f}", f"{first / value:.2f}"]
    header = ("runs", "all, s", "tokens/s", "ratio", "updates, s", "tokens/s", "ratio")
    return page.markdown(header, cells)
