"""Starting a new run from a step of another one: longer rows, a cooldown branch, another objective.
Or from a folder in the layout of `transformers`: continued pretraining.

The new run begins at step 0 with its own schedule, data order and masks.
"""

import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from pretraining import checkpoint, program, run_folder, sharding
from pretraining import config as config_lib
from pretraining import state as state_lib
from pretraining.data import piece_model, tokenizer
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError
from pretraining.hugging_face import folder as hugging_face
from pretraining.hugging_face import load
from pretraining.state import State

# More learned positions than the other run had: the first rows are taken over, the rest stay as
# initialised (BERT's 128 -> 512). The path of optimizer statistics contains that of the parameter.
_GROWS = "position/embedding"


def adopt(config, folder: pathlib.Path | None):
    """The config with what `init_from` leaves open written out, so that every start takes the same.

    That is the step of another run, or the tokenizer of a folder of transformers. A run that has
    begun keeps what it began with, however far the other run has come and wherever the folder is.
    Otherwise the parameters are read once, so that nothing is refused after hours of preparation.

    Args:
      config: a recipe's config, as written.
      folder: the run folder; None = there is none.

    Raises:
      UserError: `config_lib.validate` refuses the config; `init_from` names neither a run nor a
        folder of transformers, or one that does not fit.
    """
    config_lib.validate(config)
    if not config.init_from:
        return config
    began = _began(config, folder)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if began:
            _keep(config, began)
        elif _is_hugging_face(config):
            _adopt_hugging_face(config)
        else:
            _adopt_run(config)
    return config.lock()


def with_own_tokenizer(config, folder: pathlib.Path):
    """An adopted config that reads the tokenizer in the run folder, where there is one already.

    The file or folder that it was imported from may be gone when the run is resumed.
    """
    began = _began(config, folder)
    if not began or not config.tokenizer.model or config.tokenizer.model != began.tokenizer.model:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.tokenizer.model = str(folder / run_folder.VOCABULARY)
    return config.lock()


def _began(config, folder: pathlib.Path | None):
    """The stored config of a run in `folder` that began from this source; None = there is none."""
    if not config.init_from or folder is None or not (folder / run_folder.CONFIG).exists():
        return None
    stored = run_folder.stored_config(folder)
    (path, step), (old, old_step) = _parse(config.init_from), _parse(stored.init_from)
    return stored if path == old and step in (None, old_step) else None


def _keep(config, began) -> None:
    config.init_from = began.init_from
    if _parse(began.init_from)[1] is None:  # a folder of transformers, whose tokenizer was taken
        config.tokenizer.model = config.tokenizer.model or began.tokenizer.model


def _is_hugging_face(config) -> bool:
    path, step = _parse(config.init_from)
    return step is None and bool(hugging_face.find(path))


def _adopt_hugging_face(config) -> None:
    path = _parse(config.init_from)[0]
    config.init_from = str(path)
    if config.init_optimizer:
        raise UserError(
            f"config.init_optimizer=True: {path} is a folder of transformers, without an optimizer"
        )
    vocabulary = _adopt_tokenizer(config, path)
    _from_hugging_face(config, _zeros(config, vocabulary), vocabulary)


def _adopt_run(config) -> None:
    path, step = _parse(config.init_from)
    if not (path / run_folder.CONFIG).is_file():
        raise _refusal(config)
    params, step = checkpoint.load_parameters(path / run_folder.CHECKPOINTS, step)
    config.init_from = f"{path}@{step}"
    # Its vocabulary has to be ours, which is checked as soon as ours is there.
    vocabulary = Vocabulary.load(path / run_folder.VOCABULARY)
    fit(params, _zeros(config, vocabulary), config.init_from)


def _refusal(config) -> UserError:
    return UserError(
        f"config.init_from={config.init_from!r} is neither a run (config.json, checkpoints/) nor a "
        "folder of transformers (config.json with a model_type, *.safetensors)"
    )


def _zeros(config, vocabulary) -> Any:
    """Parameters on the host to try things on; memory that nobody writes costs nothing."""
    config = config_lib.without_epochs(config)
    objective = config_lib.build_objective(config, vocabulary)
    shapes = jax.eval_shape(lambda: state_lib.init_params(objective, config))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _adopt_tokenizer(config, path: pathlib.Path):
    """Sets an empty `tokenizer.model`; returns the vocabulary, which must be the folder's."""
    own, named = hugging_face.find(path)[0], config.tokenizer.model
    if not any(list(own.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model")):
        if not named:
            raise UserError(f"{own} holds no tokenizer: name its own by config.tokenizer.model")
        return tokenizer.load_model(named)
    vocabulary = tokenizer.load_model(str(own))
    if not named:
        config.tokenizer.model = str(own)
        return vocabulary
    other = tokenizer.load_model(named)
    if _meaning(other) != _meaning(vocabulary):
        raise UserError(
            f"config.tokenizer.model={named!r} is another tokenizer than that of "
            f"config.init_from={str(path)!r}; leave it empty"
        )
    return other


def _meaning(vocabulary) -> tuple:
    """What the ids stand for."""
    special = [getattr(vocabulary, role) for role in piece_model.ROLES]
    return vocabulary.pieces(range(vocabulary.size)), special


def start(config, state: State, vocabulary) -> State:
    """The state of step 0 with parameters from `config.init_from`; the moving average is the same.

    With `config.init_optimizer` the optimizer's statistics and the moving average come along too;
    the counters of its schedule begin anew.

    Args:
      config: resolved config, of `adopt`; where `init_from` is "", nothing is done.
      state: the initialised state of the new run; gives shapes and shardings.
      vocabulary: of the new run; must be the other run's.

    Raises:
      UserError: no such run or step, another vocabulary, or leaves that do not fit, all listed.
    """
    if not config.init_from:
        return state
    state = state.replace(params=parameters(config, state.params, vocabulary))
    return _with_optimizer(config, state, vocabulary) if config.init_optimizer else _average(state)


def parameters(config, params: Any, vocabulary) -> Any:
    """`params` with those that `config.init_from` names in their places.

    Args:
      config: resolved config, of `adopt`.
      params: initialised; give shapes and shardings, and stay where the source holds none.
      vocabulary: must be that of the source.

    Raises:
      UserError: see `start`.
    """
    folder, step = _parse(config.init_from)
    if step is None:
        params, notes = _from_hugging_face(config, params, vocabulary)
        if jax.process_index() == 0:
            print("\n".join(notes))
        return params
    if Vocabulary.load(folder / run_folder.VOCABULARY).fingerprint != vocabulary.fingerprint:
        raise UserError(
            f"config.init_from={config.init_from!r} was trained with another tokenizer; take its "
            f"own: --config.tokenizer.model={folder / run_folder.VOCABULARY}"
        )
    found, _ = checkpoint.load_parameters(folder / run_folder.CHECKPOINTS, step)
    return fit(found, params, config.init_from)


def _average(state: State) -> State:
    """The moving average, if there is one, starts at the parameters."""
    ema = None if state.ema is None else jax.tree.map(jnp.copy, state.params)
    return state.replace(ema=ema)


def _with_optimizer(config, state: State, vocabulary) -> State:
    """The other run's optimizer state and moving average."""
    folder, step = _parse(config.init_from)
    other = run_folder.stored_config(folder)
    with other.unlocked():  # only the shapes of its state matter, and those must fit here
        other.mesh = config.mesh
        other.model.attention = config.model.attention
        other.train.batch_size = config.train.batch_size
        other.train.accumulation = config.train.accumulation
        other.evaluate.batch_size = config.evaluate.batch_size
    reader = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, keep=1)
    with contextlib.closing(reader):
        old = reader.restore(step, program.build(other, vocabulary).state)
    optimizer = _restart_schedule(old.optimizer)
    state = state.replace(optimizer=fit(optimizer, state.optimizer, config.init_from))
    if state.ema is not None:
        ema = old.ema if old.ema is not None else old.params
        state = state.replace(ema=fit(ema, state.ema, config.init_from))
    return state


def _from_hugging_face(config, params: Any, vocabulary) -> tuple[Any, list[str]]:
    """The parameters, with the networks of the folder in their places; one note for each."""
    path = _parse(config.init_from)[0]
    if not hugging_face.find(path):
        raise _refusal(config)
    resolved = config_lib.without_epochs(config)
    networks = config_lib.build_objective(resolved, vocabulary).hugging_face or {}
    load.check(path, config, networks)
    loaded, notes = {}, []
    for key, found in load.match(path, networks).items():
        network = networks[key].take(params)
        paths = traverse_util.flatten_dict(network, sep="/")
        values, said = load.read(found, networks[key], paths)
        notes.append("; ".join([f"{found.path}: {found.name}", *said]))
        values = traverse_util.unflatten_dict(values, sep="/")
        here = {part: network[part] for part in values}
        loaded[key] = network | fit(values, here, config.init_from)
        params = networks[key].put(params, loaded[key])
    for key, network in loaded.items():
        _check_put(key, network, networks[key].take(params), config)
    return params, notes


def _check_put(key: str, loaded: Any, kept: Any, config) -> None:
    """Networks that share parameters must agree in them."""
    same = jax.tree_util.tree_map_with_path(
        lambda path, a, b: None if jnp.array_equal(a, b) else sharding.path_name(path), loaded, kept
    )
    if lost := jax.tree.leaves(same):
        raise UserError(
            f"config.init_from={config.init_from!r}: the {key} shares parameters with another "
            f"network, which the folder lacks or has other values of: {', '.join(lost)}"
        )


def _parse(written: str) -> tuple[pathlib.Path, int | None]:
    path, at, step = written.rpartition("@")
    if at and step.isdigit():
        return run_folder.locate(path, "config.init_from"), int(step)
    return run_folder.locate(written, "config.init_from"), None


def fit(old: Any, new: Any, source: str) -> Any:
    """The leaves of `old` in the shapes and shardings of `new`, matched by path.

    Where a leaf of `new` is of numpy, so is that of the result.

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
        return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value

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
