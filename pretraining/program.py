"""What a config means: the pure functions of a run, and where its arrays live."""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from pretraining import config as config_lib
from pretraining import guard, metrics, random, sharding, state, step
from pretraining import optimizer as optimizer_lib
from pretraining.data import tokenizer
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.models import attention


class Program(NamedTuple):
    """Everything that is compiled.

    Attributes:
      objective: of config.objective.name.
      optimizer: optax transformation.
      learning_rate: step -> learning rate.
      mesh: the devices.
      state: the State as ShapeDtypeStructs with their shardings.
      seeds: inputs of what is compiled.
    """

    objective: Any
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    mesh: Mesh
    state: state.State
    seeds: random.Seeds


def build(config, vocabulary, devices=None) -> Program:
    """Builds and checks all that a resolved config names; nothing is computed.

    Args:
      devices: see `sharding.make_mesh`.

    Raises:
      UserError: a contradiction among the config, the vocabulary and the devices.
    """
    mesh = sharding.make_mesh(config, devices)
    sharding.check_batch(config, mesh)
    attention.check_kernel(
        config.model.attention,
        dtype=config.model.dtype,
        dropout_rate=config.model.attention_dropout,
        by_document=config.model.document_attention,
        head_width=config.model.width // config.model.heads,
        sequence_length=config.data.sequence_length,
        platform=mesh.devices.flat[0].platform,
    )
    objective = config_lib.build_objective(config, vocabulary)
    learning_rate = optimizer_lib.schedule(config.optimizer, config.train.steps)
    params = jax.eval_shape(lambda: state.init_params(objective, config))
    optimizer = optimizer_lib.create(config.optimizer, learning_rate, params)
    shape = state.shape(objective, optimizer, config, mesh)
    return Program(objective, optimizer, learning_rate, mesh, shape, random.seeds(config))


def rehearse(config, devices=None) -> tuple[Any, tokenizer.Vocabulary, Program]:
    """The resolved config, a vocabulary and the program, all without a corpus.

    So that what can be refused is refused before a corpus is prepared, which may take hours. The
    vocabulary is that of `config.tokenizer.model`, or a stand-in of `config.tokenizer.size`; no
    phase is in epochs.

    Args:
      devices: see `sharding.make_mesh`.

    Raises:
      UserError: a value that is out of range, or a contradiction.
    """
    config_lib.validate(config)
    guard.check(config)
    metrics.check(config)
    tokenizer.check(config.tokenizer)
    if config.tokenizer.model:
        vocabulary = tokenizer.load_model(config.tokenizer.model)
    else:
        vocabulary = tokenizer.stand_in(config.tokenizer.size)
    config = config_lib.without_epochs(config)
    return config, vocabulary, build(config, vocabulary, devices)


def knobs(objective) -> tuple[str, ...]:
    """The names of an objective's knobs."""
    return tuple(jax.eval_shape(objective.schedule, jax.ShapeDtypeStruct((), "int32")))


def for_these_devices(config):
    """A copy of a stored config for the devices that are here: on its own mesh where that fits."""
    config = config.copy_and_resolve_references()
    sizes = [config.mesh[axis] for axis in sharding.AXES]
    if -1 not in sizes and math.prod(sizes) != jax.device_count():
        with config.unlocked():
            config.mesh.update(data=-1, fsdp=1, tensor=1)
    return config


def rows_per_epoch(prepared, config) -> int:
    """Training rows of all sources together."""
    payload = config.data.sequence_length - SPECIAL_POSITIONS
    return sum(store.train.rows(payload) for store, _ in prepared.train)


def compile_update(program: Program, config):
    """What `jit_update` gives, compiled."""
    rows = jax.eval_shape(lambda: state.empty_rows(config, config.train.batch_size))
    where = NamedSharding(program.mesh, sharding.ROWS)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), rows)
    return compiled(program, jit_update(program, config), rows)


def jit_update(program: Program, config):
    """The jitted `(state, rows, seeds) -> (state, metrics)`; the state's buffers are donated."""
    update = step.train_step(program.objective, program.optimizer, program.learning_rate, config)
    return jitted(program, update)


def jitted(program: Program, update):
    """An update of the program's state, jitted; new states take the places of the old ones."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def compiled(program: Program, update, rows):
    """What `jitted` gives, compiled for such rows; the mesh is that of the activations too."""
    with jax.set_mesh(program.mesh):
        return update.lower(program.state, rows, program.seeds).compile()
