"""Runs a question: all its runs, as a table that can be stopped and gone on with.

    python -m experiments.run experiments/masking_ratio --workdir=runs/masking_ratio --dry
    python -m experiments.run experiments/masking_ratio --workdir=runs/masking_ratio --jobs=2

Running the same line again runs what is missing or failed, and nothing else; a run that was stopped
or killed goes on from its last checkpoint, bit for bit. With --tasks, which may be added or changed
later (and need not be repeated), the yardstick has the figures of those tasks.

With --population=N runs that differ only in seeds, learning rate, mask rate and the like train as
one program, up to N of them, much faster where one alone leaves the device idle; what remains of
them, those of a program that failed, and runs that fit with nobody, follow one by one. Printed
lines (--launcher=print) are those of single runs in any case.

In the folder: sweep.json, runs.csv (the table), runs/<name>/ (ordinary run folders),
logs/<name>.log. Exit status: 0 when all runs are done, 1 when one failed, 130 and 143 after SIGINT
and SIGTERM, at which the runs save; 2 for a mistake.
Then: python -m experiments.report runs/masking_ratio
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.run",
        __doc__,
        with_config=False,
        positional="question",
        with_overrides=True,
        workdir="required: folder of the sweep; a folder that holds this sweep is gone on with",
        protocol="the size at which the question is asked (default tiny)",
        launcher="local (this machine, default) | slurm | print (a line for each missing run)",
        jobs="runs at once, which share the cores (default: one per GPU, or one)",
        population="runs that train as one program, at most (default: each by itself)",
        only="names of runs, variants, or patterns of them: a,*-seed0",
        dry="flag: print runs, tokens, FLOPs and estimated time; write nothing",
        tasks="folder of the tasks of the yardstick; may be added later",
        slurm="parameters of its tasks: partition=gpu,time=60; time, in minutes, is required",
    )

import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments import question as question_lib
from experiments.running import claim, launchers, machine, table, together
from experiments.running import cost as cost_lib
from experiments.running import planned as planned_lib
from experiments.running import slurm as slurm_lib
from experiments.running.follow import Sweep
from experiments.running.launchers import Job, Snapshot
from experiments.running.machine import Share
from experiments.running.planned import Planned
from pretraining import signals
from pretraining.errors import UserError

_POLL_S = 0.1


def main(
    question: str,
    overrides: Mapping[str, str],
    workdir: str,
    protocol: str | None = None,
    launcher: str | None = None,
    jobs: str | None = None,
    population: str | None = None,
    only: str | None = None,
    dry: bool = False,
    tasks: str | None = None,
    slurm: str | None = None,
) -> int:
    """The command; returns the exit status."""
    launcher, protocol = launcher or "local", protocol or "tiny"
    at_once = cli.number("jobs", jobs, None, at_least=1)
    at_most = cli.number("population", population, 1, at_least=2)
    options = _check_options(launcher, slurm)
    folder = pathlib.Path(workdir)
    asked = question_lib.load(question)
    sweep = {
        "question": str(pathlib.Path(question)),
        "protocol": protocol,
        "overrides": dict(overrides),
        "tasks": tasks or "",
        "planned": question_lib.plan_of(asked),
    }
    tasks = claim.agreed(folder, sweep)["tasks"]
    if tasks and not pathlib.Path(tasks).is_dir():
        raise UserError(f"--tasks={tasks}: there is no such folder")
    shares = machine.shares(at_once if launcher == "local" else None)
    planned = planned_lib.plan(asked, protocol, overrides, folder, shares[0], tasks)
    chosen = set(planned_lib.choose([each.run for each in planned], only))
    table.check_unchanged(planned)
    missing = lambda: [p for p in planned if p.name in chosen and not table.is_done(p)]
    if dry:
        print(cost_lib.describe([p for p in planned if p.name in chosen], len(shares)))
        if population:
            print(together.describe(together.populations(missing(), at_most)))
        return 0
    _warn_of_cores(planned, shares[0])
    with claim.claim(folder, sweep) as held, signals.received() as received:
        state = Sweep(folder, planned, asked.figures[0].metric, chosen)
        if launcher == "print":
            for each in missing():
                print(launchers.command_line(table.commands_left(each, "python")))
            return 0
        stop = lambda: received
        if launcher == "slurm":
            options |= {"slurm_array_parallelism": at_once} if at_once else {}
            launch = lambda jobs: slurm_lib.slurm(jobs, folder / "submitit", options, stop)
        else:
            launch = lambda jobs: launchers.local(jobs, shares, held, stop)
        if missing():
            _prepare(missing()[0], shares[0], held, stop)
            _train(state, missing, launch, at_most, stop)
        return _end(state, received)


def _check_options(launcher: str, parameters: str | None) -> dict[str, Any]:
    """The parameters of SLURM; refuses options that do not go together."""
    if launcher not in launchers.NAMES:
        raise UserError(f"--launcher={launcher}: there are {', '.join(launchers.NAMES)}")
    if launcher == "slurm":
        return slurm_lib.parse_options(parameters)
    if parameters:
        raise UserError(f"--slurm={parameters}: it goes with --launcher=slurm")
    return {}


def _warn_of_cores(planned: Sequence[Planned], share: Share) -> None:
    """The last bits of a run depend on how many cores it has."""
    others = {table.cores(each) for each in planned} - {None, len(share.cores)}
    if others and share.cores:
        had = " and ".join(map(str, sorted(others)))
        print(
            f"warning: runs of this sweep had {had} cores each, those of this start get "
            f"{len(share.cores)}: their last bits differ, and the report will name it; see --jobs",
            file=sys.stderr,
        )


def _prepare(planned: Planned, share: Share, held: int, stop: Callable[[], Any]) -> None:
    """Makes the token store of all runs, or finds it; ends early when `stop()` says so."""
    every_core = share._replace(cores=())
    process = launchers.start(planned.preparation(), every_core, held)
    try:
        while process.poll() is None and not stop():
            time.sleep(_POLL_S)
    finally:
        process.terminate()
        process.wait()
    if process.returncode and not stop():
        raise UserError(f"the token store could not be prepared (exit status {process.returncode})")


def _train(
    state: Sweep,
    missing: Callable[[], list[Planned]],
    launch: Callable[[list[Job]], Iterator[Snapshot]],
    at_most: int,
    stop: Callable[[], Any],
) -> None:
    """Runs that fit together as populations, then one by one all that is still missing.

    That is also those whose population failed: one run that it broke on must not keep the others
    from being trained.
    """
    groups = [] if stop() else together.populations(missing(), at_most)
    if groups and not stop():
        named = {together.name(group): group for group in groups}
        jobs = [Job(name, [together.command(g)], state.log(name)) for name, g in named.items()]
        runs = {name: [each.name for each in group] for name, group in named.items()}
        state.follow(launch(jobs), stop, runs)
    left = missing()
    if left and not stop():
        jobs = [Job(p.name, table.commands_left(p), state.log(p.name)) for p in left]
        state.follow(launch(jobs), stop)


def _end(state: Sweep, received: Sequence[int]) -> int:
    """Says how it stands; the exit status."""
    print(state.summary())
    if received:
        print("stopped by a signal; run the same command again to go on")
        return 128 + received[0]
    return 1 if state.failed() else 0
