"""Starting a new run from a step of another one: longer rows, a cooldown branch, another objective.

The new run begins at step 0 with its own schedule, data order and masks.
"""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from pretraining import checkpoint, program, run_folder, sharding
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError
from pretraining.state import State

# More learned positions than the other run had: the first rows are taken over, the rest stay as
# initialised (BERT's 128 -> 512). The path of optimizer statistics contains that of the parameter.
_GROWS = "position/embedding"


def pin(config, folder: pathlib.Path):
    """The config with the step of `init_from` written out, so that every start takes the same.

    A run that has begun keeps the step that it began from, however far the other run has come.
    """
    path, step = _parse(config.init_from)
    if not config.init_from or step is not None:
        return config
    if (folder / run_folder.CONFIG).exists():
        began = _parse(run_folder.stored_config(folder).init_from)
        step = began[1] if began[0] == path else None
    if step is None:
        run_folder.stored_config(path)  # refuses a folder without a run
        _, step = checkpoint.load_parameters(path / run_folder.CHECKPOINTS)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = f"{path}@{step}"
    return config.lock()


def start(config, state: State, vocabulary) -> State:
    """The state of step 0 with parameters from `config.init_from`.

    With `config.init_optimizer` the optimizer's statistics and the moving average come along too;
    the counters of its schedule begin anew.

    Args:
      config: resolved config; `init_from` is "" (nothing is done), "workdir" or "workdir@step".
      state: the initialised state of the new run; gives shapes and shardings.
      vocabulary: of the new run; must be the other run's.

    Raises:
      UserError: no such run or step, another vocabulary, or leaves that do not fit, all listed.
    """
    if not config.init_from:
        return state
    folder, step = _parse(config.init_from)
    other = run_folder.stored_config(folder)
    if Vocabulary.load(folder / run_folder.VOCABULARY).fingerprint != vocabulary.fingerprint:
        raise UserError(
            f"config.init_from={config.init_from!r} was trained with another tokenizer; take its "
            f"own: --config.tokenizer.model={folder / run_folder.VOCABULARY}/tokenizer.model"
        )
    checkpoints = folder / run_folder.CHECKPOINTS
    params, step = checkpoint.load_parameters(checkpoints, step)
    state = state.replace(params=fit(params, state.params, config.init_from))
    if not config.init_optimizer:
        ema = None if state.ema is None else jax.tree.map(np.copy, params)
        return state.replace(ema=None if ema is None else fit(ema, state.ema, config.init_from))
    with other.unlocked():  # only the shapes of its state matter, and those must fit here
        other.mesh = config.mesh
        other.model.attention = config.model.attention
        other.train.batch_size = config.train.batch_size
        other.train.accumulation = config.train.accumulation
        other.evaluate.batch_size = config.evaluate.batch_size
    with contextlib.closing(checkpoint.Checkpoints(checkpoints, keep=1)) as reader:
        old = reader.restore(step, program.build(other, vocabulary).state)
    optimizer = _restart_schedule(old.optimizer)
    state = state.replace(optimizer=fit(optimizer, state.optimizer, config.init_from))
    if state.ema is not None:
        ema = old.ema if old.ema is not None else old.params
        state = state.replace(ema=fit(ema, state.ema, config.init_from))
    return state


def _parse(written: str) -> tuple[pathlib.Path, int | None]:
    path, at, step = written.rpartition("@")
    if at and step.isdigit():
        return run_folder.locate(path), int(step)
    return run_folder.locate(written), None


def fit(old: Any, new: Any, source: str) -> Any:
    """The leaves of `old` in the shapes and shardings of `new`, matched by path.

    Raises:
      UserError: leaves are missing, left over or of another shape; every one is listed.
    """
    found = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(old)}
    wanted = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(new)}
    wrong = [f"{name}: {found[name].shape} has no place here" for name in found.keys() - wanted]
    wrong += [f"{name}: missing there" for name in wanted.keys() - found]
    wrong += [
        f"{name}: {found[name].shape} there, {leaf.shape} here"
        for name, leaf in wanted.items()
        if name in found and found[name].shape != leaf.shape and not _grows(name, found[name], leaf)
    ]
    if wrong:
        raise UserError(f"config.init_from={source!r} does not fit: {'; '.join(sorted(wrong))}")

    def place(path, leaf):
        value = np.array(found[sharding.path_name(path)])
        if value.shape != leaf.shape:
            whole = np.array(leaf)
            whole[: len(value)] = value
            value = whole
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(place, new)


def _grows(name: str, old, new) -> bool:
    return (
        name.endswith(_GROWS)
        and old.ndim == new.ndim == 2
        and old.shape[1:] == new.shape[1:]
        and old.shape[0] < new.shape[0]
    )


def _restart_schedule(optimizer: Any) -> Any:
    """Sets the step counters of learning-rate schedules to 0; those of Adam's moments stay."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    return jax.tree.map(
        lambda node: node._replace(count=np.zeros_like(node.count)) if is_schedule(node) else node,
        optimizer,
        is_leaf=is_schedule,
    )
