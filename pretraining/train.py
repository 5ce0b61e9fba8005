"""Trains one objective: prepares the data, resumes if the folder holds a run, and reports.

    python -m pretraining.train --config=configs/masked_lm.py:tiny --workdir=runs/mlm

Running the same line again resumes, after a crash too, and gives the same run bit for bit. Exit
status: 0 at the end; 143 and 130 after SIGTERM and SIGINT, which save at the current step, and 75
where another process was lost: run the same line again; 2 for a mistake or a full disk, told in one
line. Several hosts: experiments/launch/README.md.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.train",
        __doc__,
        workdir="required: folder of the run; a folder that holds this run is resumed",
        distributed="flag: several processes, as SLURM, Open MPI, Kubernetes or a TPU pod says",
        coordinator="several processes without those: host:port of process 0",
        process_count="and how many they are",
        process_index="and which this one is, from 0",
    )

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pretraining import (
    checkpoint,
    compilation_cache,
    evaluate,
    flops,
    goodput,
    init_from,
    metrics,
    processes,
    run_folder,
    sharding,
    signals,
    signs,
)
from pretraining import config as config_lib
from pretraining import guard as guard_lib
from pretraining import optimizer as optimizer_lib
from pretraining import program as program_lib
from pretraining import report as report_lib
from pretraining import state as state_lib
from pretraining import step as step_lib
from pretraining.data import loader, prepare
from pretraining.errors import UserError


def main(
    config,
    workdir: str,
    distributed: bool = False,
    coordinator: str | None = None,
    process_count: str | None = None,
    process_index: str | None = None,
) -> int:
    """The command; returns the exit status."""
    age = goodput.process_age()
    guard_lib.check(config)
    compilation_cache.use(config.data)
    silence = config.guard.silence
    processes.initialize(distributed, coordinator, process_count, process_index, silence)
    folder = run_folder.locate(workdir)
    with ending_at_sigterm(), run_folder.lock(folder):
        ledger = goodput.Ledger(age, signs.read(folder, jax.process_index()))
        with processes.Monitor(folder, silence, ledger.status) as monitor:
            monitor.check_shared()
            with memory_errors():
                return train(config, folder, ledger, monitor)


def train(config, folder: pathlib.Path, ledger: goodput.Ledger, monitor) -> int:
    """Trains to the end, or to a signal; goes back to a checkpoint where `config.guard` says so."""
    with contextlib.ExitStack() as stack:
        run = open_run(stack, config, folder, ledger, monitor)
        rewinds, stopped = guard_lib.read_rewinds(folder), None
        while stopped is None:
            try:
                state, step, stopped = loop(run, rewinds)
            except guard_lib.Spike as spike:
                ledger.enter("start")
                last = run.checkpoints.newest() or 0
                rewinds = guard_lib.rewind(folder, rewinds, spike, last)
                ledger.go_back(_totals(run.checkpoints, last))
    ledger.enter("start")
    ledger.finished = step == run.config.train.steps
    if ledger.finished:
        objective, prepared = run.program.objective, run.prepared
        evaluate.print_summary(folder, objective, state.params, prepared, run.config)
    else:
        print(f"stopped by a signal at step {step}; run the same command again to go on")
    if jax.process_index() == 0:
        print(goodput.summary(ledger.totals()))
    return 0 if ledger.finished else 128 + stopped


def open_run(stack: contextlib.ExitStack, config, folder: pathlib.Path, ledger, monitor) -> "Run":
    """Prepares all that the loop works with; refuses what can be refused.

    Args:
      stack: takes what is to be closed at the end of the run.
    """
    config, prepared = read_data(config, folder, ledger)
    program = program_lib.build(config, prepared.vocabulary)
    processes.check_alike(
        "the config, the vocabulary or the corpus",
        config_lib.to_json(config) + prepared.vocabulary.fingerprint + prepared.fingerprint,
    )
    checkpoints = open_checkpoints(stack, folder, config, prepared)
    stack.push(monitor.tell)  # before the closing above waits for processes that have ended
    start = checkpoints.newest() or 0
    if start and jax.process_index() == 0:
        print(f"going on from the checkpoint of step {start}")
    own = Resumable(
        folder=folder,
        config=config,
        prepared=prepared,
        program=program,
        checkpoints=checkpoints,
        ledger=ledger,
    )
    check_schedules(own, start)
    own.begin_folder(start)

    # ------------------------------------------------------------------------------------ compile
    ledger.enter("compile")
    finished = start == config.train.steps
    update = None if finished else program_lib.compile_update(program, config)
    terms = step_lib.evaluation_step(program.objective)
    evaluator = evaluate.Evaluator(terms, program.seeds, config, program.mesh, prepared.vocabulary)
    ledger.enter("start")
    stop = listen(stack, program.mesh)
    return Run(**vars(own), update=update, evaluator=evaluator, stop=stop)


def read_data(config, folder: pathlib.Path, ledger) -> tuple[Any, prepare.Prepared]:
    """(the config with its durations in steps, the token stores); what is refused is so before."""
    config = init_from.adopt(config, folder)
    readable = init_from.with_own_tokenizer(config, folder)
    program_lib.rehearse(readable)
    ledger.enter("prepare")
    prepared = prepare.prepare(readable)
    ledger.enter("start")
    config = config_lib.resolve_durations(config, program_lib.rows_per_epoch(prepared, config))
    loader.check(prepared.train, config)
    return config, prepared


def open_checkpoints(
    stack: contextlib.ExitStack, folder: pathlib.Path, config, prepared, retires: bool = True
) -> checkpoint.Checkpoints:
    """Those of a run folder, which holds this run or none."""
    run_folder.check_same_run(folder, config, prepared.vocabulary, prepared.fingerprint)
    place, kept = folder / run_folder.CHECKPOINTS, config.checkpoint.keep
    checkpoints = checkpoint.Checkpoints(place, kept, config.checkpoint.keep_every, retires)
    return stack.enter_context(contextlib.closing(checkpoints))


def listen(stack: contextlib.ExitStack, mesh) -> Callable[[], int]:
    """What is asked once a step: the signal that stops the run, on all processes, or 0."""
    received, agreement = stack.enter_context(signals.received()), processes.StopAgreement(mesh)
    return lambda: agreement.push(received[0] if received else 0)


def loop(run, rewinds: list[dict]) -> tuple[state_lib.State, int, int]:
    """Trains from the newest checkpoint; returns the last state, its step, and a signal or 0.

    The order of operations at each step, which exact resume rests on:
      evaluate -> write and sync metrics -> save -> next batch -> update.
    A resumed run cuts its metrics back to the checkpoint and enters the loop after the save.

    Args:
      run: a Run, or a Population (population/runs.py).
    """
    config, ledger = run.config, run.ledger
    start, total = run.checkpoints.newest() or 0, config.train.steps
    with contextlib.ExitStack() as stack:
        # --------------------------------------------------------------------------------- resume
        batches = stack.enter_context(contextlib.closing(run.batches(start, rewinds)))
        state = run.begin(start)
        report = report_lib.Report(run.lines(start, rewinds), run.folder, config, start)
        stack.enter_context(contextlib.closing(report))

        # ----------------------------------------------------------------------------------- loop
        for step in range(start, total + 1):
            ledger.step, stopped = step, run.stop()
            ending = step == total or stopped > 0
            if step > start:
                evaluating = _due(step, config.evaluate.every) or step == total
                saving = _due(step, config.checkpoint.every) or ending
                if evaluating or saving:
                    report.wait()
                    ledger.enter("evaluate")
                    report.flush(run.evaluator(state, run.prepared) if evaluating else {})
                if saving:
                    ledger.enter("save")
                    run.save(step, state)
            if ending:
                break
            ledger.enter("data_wait")
            rows = next(batches)
            ledger.enter("step")
            state, figures = run.update(state, run.put(rows), run.program.seeds)
            report.push(step + 1, figures, rows)
            run.checkpoints.raise_failure()
        ledger.enter("save")
        run.checkpoints.wait()
    return state, step, stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumable:
    """A run that can go on from any of its checkpoints; what updates it is not part of it."""

    folder: pathlib.Path
    config: Any
    prepared: prepare.Prepared
    program: program_lib.Program
    checkpoints: checkpoint.Checkpoints
    ledger: goodput.Ledger

    def begin_folder(self, start: int, population: str = "") -> None:
        """Notes in the run folder that the run goes on from `start`; see `run_folder.record`."""
        self.ledger.go_back(_totals(self.checkpoints, start))
        vocabulary, fingerprint = self.prepared.vocabulary, self.prepared.fingerprint
        run_folder.record(self.folder, self.config, vocabulary, fingerprint, start, population)

    def begin(self, step: int) -> state_lib.State:
        """The state of the checkpoint of `step`, or that of step 0."""
        config, program = self.config, self.program
        if step:
            return self.checkpoints.restore(step, program.state)
        state = state_lib.init(program.objective, program.optimizer, config, program.mesh)
        return init_from.start(config, state, self.prepared.vocabulary)

    def batches(self, step: int, rewinds: list[dict]):
        """The batches from `step` on, as far as this process reads them."""
        config, skips = self.config, guard_lib.skips(rewinds)
        places = sharding.local_places(self.program.mesh, config.train.batch_size)
        return loader.train_batches(self.prepared.train, config, step, places, skips)

    def make_lines(self, step: int, rewinds: list[dict], speed: metrics.Speed) -> report_lib.Lines:
        """What writes the metrics of the updates after `step`."""
        config, train, skips = self.config, self.prepared.train, guard_lib.skips(rewinds)
        guard = guard_lib.Guard(self.folder, config, train, skips, self.checkpoints)
        return report_lib.Lines(self.folder, config, step, self.ledger, guard, speed)

    def save(self, step: int, state: state_lib.State) -> None:
        """Starts to write the checkpoint of `step`."""
        self.checkpoints.save(step, state, {"totals": self.ledger.totals()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Resumable):
    """What the loop works with, the same after every rewind.

    Attributes:
      update: the compiled `(state, rows, seeds) -> (state, metrics)`; None = the run is at its end.
      stop: asked once a step: the signal that stops the run, or 0.
    """

    update: Callable | None
    evaluator: evaluate.Evaluator
    stop: Callable[[], int]

    def put(self, rows):
        """A batch on the devices."""
        return sharding.put_rows(rows, self.program.mesh, self.config.train.batch_size)

    def lines(self, step: int, rewinds: list[dict]) -> report_lib.Lines:
        """What writes the metrics of the updates after `step`."""
        work = report_lib.work(self.config, self.prepared.vocabulary)
        speed = metrics.Speed(self.ledger, peak=flops.peak_flops(self.config), **work)
        return self.make_lines(step, rewinds, speed)


def _totals(checkpoints: checkpoint.Checkpoints, step: int) -> dict[str, float]:
    """Those of the ledger when the checkpoint of `step` was saved."""
    return checkpoints.notes(step)["totals"] if step else {}


def check_schedules(run: Resumable, step: int) -> None:
    """Refuses durations under which an update already made would have been another one."""
    folder, config, program = run.folder, run.config, run.program
    changed = config_lib.differences(run_folder.stored_config(folder), config) if step else {}
    if not changed:
        return
    old = run_folder.stored_config(folder)
    knobs = config_lib.build_objective(old, run.prepared.vocabulary).schedule
    rate = optimizer_lib.schedule(old.optimizer, old.train.steps)
    steps = jnp.arange(step)
    same = jax.tree.map(
        lambda a, b: bool(jnp.all(a == b)),
        (jax.vmap(rate)(steps), jax.vmap(knobs)(steps)),
        (jax.vmap(program.learning_rate)(steps), jax.vmap(program.objective.schedule)(steps)),
    )
    if step > config.train.steps or not all(jax.tree.leaves(same)):
        listed = "; ".join(f"{key}: {change}" for key, change in changed.items())
        raise UserError(
            f"--workdir={folder} is at step {step}, and its learning rate or knobs until there "
            f"would have been others: {listed}"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def memory_errors(instead: str = "") -> Iterator[None]:
    """One line where a device has too little memory; `instead` is what to try first."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device's memory is too small: {str(error).splitlines()[0]}; what to change: "
            f"{instead}"
            "python -m pretraining.plan --topology=here and the same --config"
        ) from error


@contextlib.contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Outside the loop SIGTERM ends the program by an exception, as SIGINT does, so that the other
    processes are told; and the first process of a container would ignore it."""
    old = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
