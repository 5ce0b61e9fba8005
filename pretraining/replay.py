"""Makes one update of a run again, and says what went wrong in it.

    python -m pretraining.replay --workdir=runs/mlm --step=N [--rows=3]

Starts from the newest checkpoint before update N (numbered as in metrics.jsonl), repeats the
updates after it, and prints the figures of update N beside those that were kept when it happened
(<workdir>/offending), the rows with the highest losses, those that are not finite first, with their
text, and the parameters whose gradient is not finite. Nothing in the run folder changes.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.replay",
        __doc__,
        with_config=False,
        workdir="required: folder of the run",
        step="required: number of the update, from 1",
        rows="rows that are shown (default 3)",
    )

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pretraining import (
    checkpoint,
    compilation_cache,
    guard,
    init_from,
    metrics,
    program,
    random,
    run_folder,
    sharding,
)
from pretraining import state as state_lib
from pretraining import step as step_lib
from pretraining.data import loader, prepare
from pretraining.data.row import Row
from pretraining.errors import UserError

SHOWN = 12  # parameters listed by name
SHOWN_TOKENS = 24  # of a row


def main(workdir: str, step: str | None, rows: str | None) -> int:
    """The command; see the module's docstring."""
    folder = run_folder.locate(workdir)
    number, shown = cli.number("step", step, None, 1), cli.number("rows", rows, 3)
    config = program.for_these_devices(run_folder.stored_config(folder))
    compilation_cache.use(config.data)
    if number > config.train.steps:
        raise UserError(f"--step={step}: the run has {config.train.steps} updates")
    prepared = prepare.prepare(init_from.with_own_tokenizer(config, folder))
    run_folder.check_same_data(folder, config, prepared.fingerprint)
    built = program.build(config, prepared.vocabulary)
    kept = guard.load_batch(folder, number)  # before a rewind, rows were others
    rewinds = guard.read_rewinds(folder)
    skips = kept.skips if kept else guard.skips(rewinds)
    # The checkpoints after a later rewind are of another course.
    at_most = min([number - 1, *(each["checkpoint"] for each in rewinds[len(skips) :])])
    with jax.set_mesh(built.mesh):
        update = program.compile_update(built, config)
        state, batch, began = _reach(
            folder, config, prepared, built, update, skips, number - 1, at_most
        )
        losses, finite = jax.device_get(
            _inspect(built.objective, config)(state, batch, built.seeds)
        )
        figures = metrics.fetch(update(state, batch, built.seeds)[1])
    print(f"update {number}, reached from step {began}:")
    _print_figures(figures, kept, batch)
    addresses = loader.row_addresses(prepared.train, config, number - 1, skips)
    _print_rows(losses, batch, addresses, prepared.vocabulary, config.data.copies, shown)
    _print_gradients(finite)
    return 0


def _reach(folder, config, prepared, built, update, skips, step: int, at_most: int):
    """(the state at `step`, the rows of the next update, the step of the checkpoint)."""
    found = checkpoint.newest(folder / run_folder.CHECKPOINTS, at_most)
    start = found or 0
    if found:
        checkpoints = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, keep=1)
        state = checkpoints.restore(found, built.state)
        checkpoints.close()
    else:
        state = state_lib.init(built.objective, built.optimizer, config, built.mesh)
        state = init_from.start(config, state, prepared.vocabulary)
    size = config.train.batch_size
    places = sharding.local_places(built.mesh, size)
    batches = loader.train_batches(prepared.train, config, start, places, skips)
    for _ in range(start, step):
        rows = sharding.put_rows(next(batches), built.mesh, size)
        state, _ = update(state, rows, built.seeds)
    batch = sharding.put_rows(next(batches), built.mesh, size)
    batches.close()
    return state, batch, start


def _inspect(objective, config):
    """Jitted (state, rows [B], seeds) -> (loss of each row alone, without dropout [B]; {path: is
    its gradient, that of the update, finite?})."""

    @jax.jit
    def inspect(state, rows: Row, seeds: random.Seeds):
        examples, knobs, dropout = step_lib.inputs(objective, seeds, state.step, rows)

        def row_loss(example):
            one = jax.tree.map(lambda x: x[None], example)
            return step_lib.total(
                objective.loss(objective.model.apply, state.params, one, knobs, dropout, False)
            )

        gradients, _ = step_lib.gradients(
            objective, state.params, examples, knobs, dropout, config.train.accumulation
        )
        finite = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradients)
        return jax.lax.map(row_loss, examples), finite

    return inspect


def _print_figures(figures: dict[str, Any], kept: guard.Batch | None, batch: Row) -> None:
    for name, value in sorted(figures.items()):
        compared = ""
        if kept and name in kept.figures:
            before = kept.figures[name]
            same = np.array_equal(before, value, equal_nan=True)
            compared = f"  then {before!r}, {'equal' if same else 'NOT equal'}"
        print(f"  {name:<24} {value!r}{compared}")
    if kept:
        same = all(map(np.array_equal, batch, kept.rows))
        print(f"  the rows are {'those' if same else 'NOT those'} that were kept")


def _print_rows(losses, batch: Row, addresses, vocabulary, copies: int, shown: int) -> None:
    bad = ~np.isfinite(losses)
    print(f"{bad.sum()} of {losses.size} rows have a loss that is not finite")
    for place in np.argsort(np.where(bad, np.inf, losses))[::-1][:shown]:
        store, number = addresses[place // copies]
        tokens = np.asarray(batch.tokens)[place][:SHOWN_TOKENS]
        text = vocabulary.decode(tokens.tolist())
        print(f"  loss {losses[place]:.4g}: row {number} of store {store.name}: {text!r}...")


def _print_gradients(finite) -> None:
    flat = {
        sharding.path_name(path): ok for path, ok in jax.tree_util.tree_leaves_with_path(finite)
    }
    bad = [name for name, ok in flat.items() if not ok]
    print(f"{len(bad)} of {len(flat)} parameters have a gradient that is not finite")
    for name in bad[:SHOWN]:
        print(f"  {name}")
    if len(bad) > SHOWN:
        print(f"  ... and {len(bad) - SHOWN} more")
