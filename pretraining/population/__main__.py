"""Trains runs that differ only in traced scalars as one program: a population.

    python -m pretraining.population \\
        --config=configs/masked_lm.py:tiny --workdir=runs/a -- \\
        --config=configs/masked_lm.py:tiny --config.objective.mask_rate=0.4 --workdir=runs/b

Between the "--" stand the arguments of one training command each. Its members may differ in seeds,
in the learning rate and its schedule (not in the other keys of the optimizer), and in the knobs of
the objective, which are the rates that have a schedule and the like; a mistake lists them. Where
rates differ all have slots for the highest, empty in the others. Each has the rows and masks of its
own single run exactly and its losses to float32 rounding, and an ordinary run folder, with which
every other program works.

Running the same line again resumes from the newest step that all members hold, bit for bit while
they are the same members: a program of fewer rounds float32 otherwise. What one of them saved after
that step, killed in the middle of a save, is deleted. The line is refused where a member is more
than one save ahead, has gone on without the others, or has gone back from a spike: leave it out,
and train it alone. A member that cannot go on, because its updates
are not finite or a loss spike takes it back, leaves for good: a line says so, and so does a file in
its folder, `left_population`; nothing more is written there, the others go on, in later starts too,
and `python -m pretraining.train` with its arguments goes on with it alone, at once if need be. Exit
status: 0 at the end, also where some have left; 2 where all have, and for a mistake or a full disk;
143 and 130 after SIGTERM and SIGINT, which save. One process alone trains a population.

Each member is charged its share of the program's time, 1 / N, so that the members' times add up:
`time/tokens_per_s` is then that of the whole program. `time/mfu` counts the FLOPs of the member's
own single run, and the mean of all members is that of the program. Until the next start what has
left is still computed, and its share is charged to nobody.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.population.__main__",
        __doc__,
        several=True,
        workdir="required: folder of the run; a folder that holds this run is resumed",
    )

import contextlib
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pretraining import (
    compilation_cache,
    evaluate,
    goodput,
    init_from,
    processes,
    run_folder,
    signs,
    train,
)
from pretraining import config as config_lib
from pretraining import program as program_lib
from pretraining.errors import UserError
from pretraining.population import check, vmapped
from pretraining.population.runs import Checkpoints, Evaluator, Ledgers, Member, Population


def main(members: Sequence[Mapping[str, Any]]) -> int:
    """The command; returns the exit status."""
    age = goodput.process_age()
    configs = [each["config"] for each in members]
    folders = [run_folder.locate(each["workdir"]) for each in members]
    check.one_program(configs, folders)
    compilation_cache.use(configs[0].data)
    configs, folders = _without_those_that_left(configs, folders)
    with train.ending_at_sigterm(), contextlib.ExitStack() as stack:
        held = [stack.enter_context(contextlib.ExitStack()) for _ in folders]
        for own, folder in zip(held, folders, strict=True):
            own.enter_context(run_folder.lock(folder))
        signs_of_life = [signs.read(folder) for folder in folders]
        share = 1 / len(folders)
        ledgers = [goodput.Ledger(age, sign, share=share) for sign in signs_of_life]
        for own, folder, ledger in zip(held, folders, ledgers, strict=True):
            own.enter_context(processes.Monitor(folder, 0.0, ledger.status))
        stack.enter_context(train.memory_errors("fewer members, or what is said by "))
        return train_together(configs, folders, held, Ledgers(ledgers))


def _without_those_that_left(configs, folders: Sequence[pathlib.Path]) -> tuple[list, list]:
    """(configs, folders) of the members that are still members; a line for each other one.

    Raises:
      UserError: there is none.
    """
    present = []
    for config, folder in zip(configs, folders, strict=True):
        if why := run_folder.why_left(folder):
            print(f"{folder} has left the population, train it alone: {why}", flush=True)
        else:
            present.append((config, folder))
    if not present:
        raise UserError("all members of the population have left it: train them alone")
    configs, folders = zip(*present, strict=True)
    return list(configs), list(folders)


def train_together(configs, folders: Sequence[pathlib.Path], held, ledger: Ledgers) -> int:
    """Trains to the end, or to a signal; see `open_population`."""
    with contextlib.ExitStack() as stack:
        population = open_population(stack, configs, folders, held, ledger)
        _, step, stopped = train.loop(population, [])
    finished = step == population.config.train.steps
    ledger.enter("start")
    for number, member in enumerate(population.members):
        if number not in population.left:
            member.ledger.finished = finished
            print(f"{member.folder}: {evaluate.last(member.folder)}")
    if not finished:
        print(f"stopped by a signal at step {step}; run the same command again to go on")
    print(goodput.summary(ledger.together()))
    return 0 if finished else 128 + stopped


def open_population(
    stack: contextlib.ExitStack,
    configs,
    folders: Sequence[pathlib.Path],
    held: Sequence[contextlib.ExitStack],
    ledger: Ledgers,
) -> Population:
    """Prepares all that the loop works with; refuses what can be refused.

    Args:
      stack: takes what is to be closed at the end.
      configs: of the members, as written; they differ in nothing but what `config.untraced` leaves.
      held: of each member, what is to be closed when it leaves.
    """
    others = [init_from.adopt(*each) for each in zip(configs[1:], folders[1:], strict=True)]
    first, prepared = train.read_data(configs[0], folders[0], ledger)
    rows = program_lib.rows_per_epoch(prepared, first)
    configs = [first, *(config_lib.resolve_durations(each, rows) for each in others)]
    lead, programs = vmapped.of_members(configs, prepared.vocabulary)

    # -------------------------------------------------------------------------------- run folders
    members = [
        Member(
            folder=folder,
            config=config,
            prepared=prepared,
            program=program,
            checkpoints=train.open_checkpoints(own, folder, config, prepared, retires=False),
            ledger=charged,
            held=own,
        )
        for folder, config, program, charged, own in zip(
            folders, configs, programs, ledger.members, held, strict=True
        )
    ]
    left: dict[int, str] = {}
    checkpoints = Checkpoints(members, left)
    start = starting_step(members, checkpoints, configs[0].checkpoint.every)
    if any(map(check.steps, folders)):
        print(f"going on from step {start}, the newest that all members hold")
    begin_folders(members, checkpoints, start)

    # ------------------------------------------------------------------------------------ compile
    ledger.enter("compile")
    whole = vmapped.stack(programs[lead], [each.seeds for each in programs])
    which = vmapped.streams(configs)
    functions = vmapped.Functions(configs[lead], programs, which)
    finished = start == configs[0].train.steps
    update = None if finished else functions.compile_update(whole)
    evaluator = Evaluator(
        functions.terms, whole.seeds, configs[lead], whole.mesh, prepared.vocabulary
    )
    ledger.enter("start")
    return Population(
        folder=folders[0],
        config=configs[lead],
        prepared=prepared,
        program=whole,
        checkpoints=checkpoints,
        ledger=ledger,
        update=update,
        evaluator=evaluator,
        stop=train.listen(stack, whole.mesh),
        members=tuple(members),
        which=which,
        left=left,
    )


def begin_folders(members: Sequence[Member], checkpoints: Checkpoints, start: int) -> None:
    """Notes in all run folders that the runs go on from step `start`; in none if one is refused.

    What lies beyond it goes first: killed between two notes, members that had not begun together
    any more would else be refused as apart.
    """
    for each in members:
        train.check_schedules(each, start)
    checkpoints.discard_after(start)
    common = uuid.uuid4().hex
    for each in members:
        each.begin_folder(start, population=common)


def starting_step(members: Sequence[Member], checkpoints: Checkpoints, every: int) -> int:
    """The newest step that all members hold whole; nothing is deleted yet.

    Raises:
      UserError: they are too far apart. One damaged checkpoint must not cost all others theirs.
    """
    folders = [each.folder for each in members]
    reason = check.apart(folders, every)  # before whole checkpoints are read
    if not reason:
        common = checkpoints.newest() or 0
        newest = [each.checkpoints.newest() or 0 for each in members]
        reason = check.why_apart(folders, newest, common, every)
    if reason:
        raise UserError(f"{reason}: leave one of them out, and train it alone (pretraining.train)")
    return common
