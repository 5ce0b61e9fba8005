"""Trains one objective: prepares the data, resumes if the folder holds a run, and reports.

    python -m pretraining.train --config=configs/masked_lm.py:tiny --workdir=runs/mlm

Running the same line again resumes, after a crash too, and gives the same run bit for bit. SIGTERM
and SIGINT save at the current step and exit with 143 and 130, the codes by which schedulers know
that a job was stopped and may be started again; 2 means a mistake, told in one line.
"""

import collections
import contextlib
import pathlib
import signal
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pretraining import checkpoint, cli, evaluate, flops, init_from, metrics, run_folder, sharding
from pretraining import config as config_lib
from pretraining import optimizer as optimizer_lib
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining.data import loader, prepare
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError


def main(config, workdir: str, distributed: bool = False) -> int:
    """The command; returns the exit status."""
    if distributed:
        jax.distributed.initialize()
    folder = run_folder.locate(workdir)
    with run_folder.lock(folder):
        return train(config, folder)


def train(config, folder: pathlib.Path) -> int:
    """Trains to the end, or to a signal.

    The order of operations at each step, which exact resume rests on:
      evaluate -> write and sync metrics -> save -> next batch -> update.
    A resumed run cuts its metrics back to the checkpoint and enters the loop after the save.
    """
    # ------------------------------------------------------------------ data, program, run folder
    config = init_from.adopt(config, folder)
    readable = init_from.with_own_tokenizer(config, folder)
    program_lib.check(readable)
    prepared = prepare.prepare(readable)
    config = config_lib.resolve_durations(config, program_lib.rows_per_epoch(prepared, config))
    run_folder.check_same_run(folder, config, prepared.vocabulary, prepared.fingerprint)
    program = program_lib.build(config, prepared.vocabulary)

    with contextlib.ExitStack() as stack:
        # --------------------------------------------------------------------------------- resume
        checkpoints = checkpoint.Checkpoints(
            folder / run_folder.CHECKPOINTS, config.checkpoint.keep, config.checkpoint.keep_every
        )
        stack.enter_context(contextlib.closing(checkpoints))
        start, total = checkpoints.newest() or 0, config.train.steps
        check_schedules(folder, config, program, prepared.vocabulary, start)
        batches = loader.train_batches(
            prepared.train, config, start, jax.process_index(), jax.process_count()
        )
        stack.enter_context(contextlib.closing(batches))
        state = _begin(config, program, prepared.vocabulary, checkpoints, start)
        run_folder.record(folder, config, prepared.vocabulary, prepared.fingerprint, start)

        # ----------------------------------------------------------------------------------- loop
        stack.enter_context(jax.set_mesh(program.mesh))  # kernels that partition themselves ask it
        update = program_lib.jit_update(program, config)
        evaluator = evaluate.Evaluator(program.objective, config, program.mesh, prepared.vocabulary)
        report = Report(folder, config, prepared, start, checkpoints)
        stack.enter_context(contextlib.closing(report))
        stop = stack.enter_context(_signals())
        for step in range(start, total + 1):
            ending = step == total or bool(stop)
            if step > start:
                evaluating = _due(step, config.evaluate.every) or step == total
                saving = _due(step, config.checkpoint.every) or ending
                if evaluating or saving:
                    report.wait()
                    report.flush(evaluator(state, prepared) if evaluating else {})
                if saving:
                    checkpoints.save(step, state)
            if ending:
                break
            report.clock.resume()
            rows = sharding.put_rows(next(batches), program.mesh)
            report.clock.waited()
            state, figures = update(state, rows)
            report.push(step + 1, figures)

    # ---------------------------------------------------------------------------------------- end
    if stop and step < total:
        print(f"stopped by a signal at step {step}; run the same command again to go on")
        return 128 + stop[0]
    evaluate.print_summary(folder, program.objective, state.params, prepared, config)
    return 0


def _begin(config, program, vocabulary, checkpoints, step: int) -> state_lib.State:
    """The state of the newest checkpoint, or that of step 0."""
    if step:
        return checkpoints.restore(step, program.state)
    state = state_lib.init(program.objective, program.optimizer, config, program.mesh)
    return init_from.start(config, state, vocabulary)


class Report:
    """Writes the figures of each update one step late, so that the device never waits for them."""

    def __init__(self, folder: pathlib.Path, config, prepared, start: int, checkpoints):
        self._config, self._prepared, self._checkpoints = config, prepared, checkpoints
        payload = config.data.sequence_length - SPECIAL_POSITIONS
        self._step_tokens = config.train.batch_size * payload
        self._step_flops = flops.step_flops(config, prepared.vocabulary)
        self._peak = flops.peak_flops(config)
        self._writer = metrics.Writer(folder, config, start)
        self._progress = metrics.Progress(start, config.train.steps)
        self._profile = metrics.Profile(folder, config)
        self._pending = None
        self._compiled = False
        self.clock = metrics.Clock()

    def push(self, step: int, figures: dict) -> None:
        """Takes the device figures of update `step` and writes those of the one before."""
        if not self._compiled:  # the first call compiled: its time is no step's time
            self._compiled = True
            self.clock.reset()
        if self._pending:
            self._write({})
        self._pending = step, figures
        self.clock.worked(steps=1)
        self._profile.reached(step, figures)

    def wait(self) -> None:
        """Waits for the last update, so that its time counts as that of a step."""
        jax.block_until_ready(self._pending)
        self.clock.worked()

    def flush(self, evaluation: dict[str, float]) -> None:
        """Writes the last update's figures together with an evaluation's, and syncs the file."""
        if self._pending:
            self._write(evaluation)
        self._writer.sync()

    def _write(self, evaluation: dict[str, float]) -> None:
        (step, figures), self._pending = self._pending, None
        figures = metrics.fetch(figures)
        if not evaluation:
            self.clock.worked()
        if not figures.pop("finite"):
            self._stop_not_finite(step, figures)
        if not evaluation and not _due(step, self._config.log.every):
            return
        line = {f"train/{name}": value for name, value in figures.items()} | evaluation
        line |= self.clock.figures(
            self._step_tokens, self._step_flops, self._peak, self._config.train.steps - step
        )
        self.clock.reset()
        self._writer.write(step, line)
        self._progress.show(step, line)

    def _stop_not_finite(self, step: int, figures: dict) -> None:
        addresses = loader.row_addresses(self._prepared.train, self._config, step - 1)
        rows = collections.defaultdict(list)
        for store, number in addresses:
            rows[store.name].append(number)
        listed = " and ".join(f"{_shorten(found)} of store {name}" for name, found in rows.items())
        saved = self._checkpoints.newest()
        raise UserError(
            f"update {step} is not finite (loss {figures['loss']}, gradient norm "
            f"{figures['gradient_norm']}) on training rows {listed}; the last good checkpoint is "
            f"{'that of step ' + str(saved) if saved else 'none'}"
        )

    def close(self) -> None:
        self._profile.close()
        self._progress.close()
        self._writer.close()


def check_schedules(folder: pathlib.Path, config, program, vocabulary, step: int) -> None:
    """Refuses durations under which an update already made would have been another one."""
    changed = config_lib.differences(run_folder.stored_config(folder), config) if step else {}
    if not changed:
        return
    old = run_folder.stored_config(folder)
    knobs = config_lib.build_objective(old, vocabulary).schedule
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


def _shorten(numbers: list[int], most: int = 16) -> str:
    listed = ", ".join(map(str, numbers[:most]))
    return listed + (f", ... ({len(numbers)} in all)" if len(numbers) > most else "")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; a second one acts as usual."""
    received: list[int] = []

    def note(number, _frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    cli.run(
        main,
        sys.modules[__name__].__doc__,
        workdir="required: folder of the run; a folder that holds this run is resumed",
        distributed="flag: several hosts: calls jax.distributed.initialize() first",
    )
