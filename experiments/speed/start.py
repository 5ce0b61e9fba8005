"""How long a start takes: to the first update, to `--help`, and to compile deep networks.

    python -m experiments.speed.start [--times=3] [--output=FILE]

First update: `python -m pretraining.train --config=configs/<objective>.py:tiny` as a process of its
own in a new run folder, with a token store that is there. What is told is the sum of `time/total/*`
in the first line of metrics.jsonl: seconds from the birth of the process until the figures of
update 1 have been read on the host, by which time update 2 has been sent off. "cold" has an empty
folder of compiled programs, "second" the one that the cold start before it left. The median, and
the phases of that start.

Help: from starting `python -m <command> --help` to its end, the median of five.

Compiling: `python -m pretraining.plan --topology=cpu:1` (tracing, lowering and compiling the
update) of masked_lm at ELECTRA-small's width (256, 4 heads, 1,024), 8 rows of 128.

CPU seconds are those of the process, with all its threads: unlike the others they hardly depend on
what else the machine does.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.speed.start",
        __doc__,
        with_config=False,
        times="starts of each kind, of which the median is told (default 3)",
        output="file that is written (default: experiments/speed/measured/start.md)",
    )

import ast
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from experiments.speed import fresh, page
from pretraining import metrics
from pretraining.config import objective_names
from pretraining.errors import UserError
from pretraining.goodput import PREFIX

ROOT = pathlib.Path(__file__).parent.parent.parent
PHASES = ("start", "prepare", "compile", "step")  # those of the ledger before the second update
DEPTHS = (12, 24)
_HELP_TIMES = 5


class Timed(NamedTuple):
    """Seconds of a process: of the clock, and of all cores together."""

    wall: float
    cpu: float


class Start(NamedTuple):
    """Seconds to the first update: all of them, by phase, and of all cores until the end."""

    total: float
    phases: dict[str, float]
    cpu: float


def main(times: str | None, output: str | None) -> int:
    """The command."""
    count, path = cli.number("times", times, 3, at_least=1), page.place("start", output)
    parts = ["# Time to start", page.origin("start", {"times": count}, ("jax", "jaxlib", "flax"))]
    for rows in (_first_updates(count), _helps(), _depths(count)):
        parts.append(_table(rows))
        print(parts[-1], file=sys.stderr, flush=True)
    page.write(path, *parts)
    return 0


def _table(rows: Iterator[tuple]) -> str:
    """Of a header, and of rows of words and seconds."""
    header, *rest = rows
    texts = [[cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row] for row in rest]
    return page.markdown(header, texts)


# ------------------------------------------------------------------------------------ first update


def _first_updates(count: int) -> Iterator[tuple]:
    """The table: a row for each objective and kind of start."""
    yield ("objective", "start", "first update, s", *PHASES, "CPU s of the run")
    for objective in objective_names():
        recipe = f"configs/{objective}.py:tiny"
        _run("pretraining.data.prepare", f"--config={recipe}")
        kinds = {"cold": [], "second": []}
        for _ in range(count):
            with tempfile.TemporaryDirectory() as folder:
                environment = fresh.environment(pathlib.Path(folder, "cache"))
                for kind, starts in kinds.items():
                    starts.append(first_update(recipe, pathlib.Path(folder, kind), environment))
        for kind, starts in kinds.items():
            start = sorted(starts)[len(starts) // 2]
            yield (objective, kind, start.total, *(start.phases[p] for p in PHASES), start.cpu)


def first_update(recipe: str, workdir: pathlib.Path, environment: dict[str, str]) -> Start:
    """Trains two updates in a new folder, as a process with these variables beside its own."""
    words = [f"--config={recipe}", f"--workdir={workdir}", "--config.log.every=1"]
    timed = _run("pretraining.train", *words, "--config.train.steps=2", **environment)
    line = metrics.read(workdir / metrics.FILE)[0]
    totals = {k.removeprefix(PREFIX): v for k, v in line.items() if k.startswith(PREFIX)}
    return Start(sum(totals.values()), totals, timed.cpu)


# -------------------------------------------------------------------------------------------- help


def _helps() -> Iterator[tuple]:
    """The table: a row for each command."""
    yield ("command", "--help, s", "CPU s")
    for command in commands():
        found = [_run(command, "--help") for _ in range(_HELP_TIMES)]
        yield (f"`{command}`", *map(statistics.median, zip(*found, strict=True)))


def commands() -> list[str]:
    """Every module that is a command line: `python -m <module>`."""
    found = []
    for package in ("pretraining", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if _is_command(path.read_text()):
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return [name.removesuffix(".__main__") for name in found]


def _is_command(source: str) -> bool:
    """Whether a module has an `if __name__ == "__main__":` that goes through pretraining.cli."""
    return any(
        isinstance(name, ast.Name) and name.id == "cli"
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for name in ast.walk(node)
    )


# ------------------------------------------------------------------------------------------- depth


def _depths(count: int) -> Iterator[tuple]:
    """The table: a row for each execution; the last column is the deepest over the shallowest."""
    yield ("execution", *(f"{depth} layers, s" for depth in DEPTHS), "ratio")
    for execution in ("scanned", "unrolled"):
        seconds = [
            statistics.median(compile_seconds(depth, execution) for _ in range(count))
            for depth in DEPTHS
        ]
        yield (execution, *seconds, seconds[-1] / seconds[0])


def compile_seconds(layers: int, execution: str) -> float:
    """Of the update, in a process that finds nothing compiled."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {"model.layers": layers, "model.execution": execution, "train.batch_size": 8}
        words = ["--config=configs/masked_lm.py:small", "--topology=cpu:1"]
        words += [f"--config.{key}={value}" for key, value in keys.items()]
        _run("pretraining.plan", *words, f"--json={folder}/plan.json")
        return json.loads(pathlib.Path(folder, "plan.json").read_text())["compile_s"]


# ---------------------------------------------------------------------------------------- processes


def _run(module: str, *words: str, **environment: str) -> Timed:
    """Runs a command to its end, with no compiled programs but those of the cache it is given."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", module, *words]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=own | environment, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise UserError(f"{' '.join(command)}: {said.read().decode().strip()}")
    return Timed(wall, usage.ru_utime + usage.ru_stime)
