"""The one program of a population: the update and the evaluation of all its members at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pretraining import config as config_lib
from pretraining import optimizer as optimizer_lib
from pretraining import program as program_lib
from pretraining import random, sharding
from pretraining import state as state_lib
from pretraining import step as step_lib
from pretraining.errors import UserError


class Functions:
    """The update and the evaluation of all members at once.

    Everything that differs is a function of the member's number, which `vmap` traces: its schedules
    are branches of a switch, whatever functions of the step they are.

    Args:
      config: of the program.
      programs: of the members alone.
      which: see Population.
    """

    def __init__(self, config, programs: Sequence[program_lib.Program], which: Sequence[int]):
        self._config, self._programs, self._which = config, programs, which
        self._numbers = jnp.arange(len(programs))
        self._static = programs[0].objective  # but for schedule and evaluation knobs that of all

    def update(self, state, rows, seeds) -> tuple[state_lib.State, dict[str, jax.Array]]:
        """(state [N], streams of rows [S, B], seeds [N]) -> (state [N], metrics [N])."""

        def one(number, state, seeds):
            rate = self._switch(number, [each.learning_rate for each in self._programs])
            optimizer = optimizer_lib.create(self._config.optimizer, rate, state.params)
            update = step_lib.train_step(self._objective(number), optimizer, rate, self._config)
            return update(state, member_of(rows, jnp.asarray(self._which)[number]), seeds)

        return jax.vmap(one)(self._numbers, state, seeds)

    def terms(self, params, rows, seeds) -> step_lib.Terms:
        """(params [N], rows [B], seeds [N]) -> terms [N]."""

        def one(number, params, seeds):
            return step_lib.evaluation_step(self._objective(number))(params, rows, seeds)

        return jax.vmap(one)(self._numbers, params, seeds)

    def compile_update(self, program: program_lib.Program):
        """The compiled update; the state's buffers are donated.

        Args:
          program: what `stack` made.
        """
        where = sharding_of_streams(program.mesh)
        config, streams = self._config, max(self._which) + 1
        rows = jax.eval_shape(lambda: state_lib.empty_rows(config, config.train.batch_size))
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((streams, *x.shape), x.dtype, sharding=where), rows
        )
        return program_lib.compiled(program, program_lib.jitted(program, self.update), rows)

    def _objective(self, number: jax.Array):
        objectives = [each.objective for each in self._programs]
        knobs = [_float32(each.evaluation_knobs) for each in objectives]
        return self._static._replace(
            schedule=self._switch(number, [each.schedule for each in objectives]),
            evaluation_knobs=member_of(jax.tree.map(lambda *x: jnp.stack(x), *knobs), number),
        )

    def _switch(self, number: jax.Array, functions: Sequence[Callable]) -> Callable:
        branches = [lambda step, own=own: _float32(own(step)) for own in functions]
        return lambda step: jax.lax.switch(number, branches, step)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def of_members(configs, vocabulary) -> tuple[int, list[program_lib.Program]]:
    """The program of each member alone, with the static parts of one of them, see `lead`."""
    first, objectives = lead(configs, vocabulary)
    program = program_lib.build(configs[first], vocabulary)
    return first, [
        program._replace(
            objective=program.objective._replace(
                schedule=objective.schedule, evaluation_knobs=objective.evaluation_knobs
            ),
            learning_rate=optimizer_lib.schedule(config.optimizer, config.train.steps),
            seeds=random.seeds(config),
        )
        for objective, config in zip(objectives, configs, strict=True)
    ]


def lead(configs, vocabulary) -> tuple[int, list]:
    """Whose static parts are those of the program, and the objectives.

    It is the one whose examples are the largest: slots for what is predicted that another one does
    not fill have no weight.

    Raises:
      UserError: the examples differ in more than the number of slots.
    """
    objectives = [config_lib.build_objective(config, vocabulary) for config in configs]
    examples = [example(config, vocabulary) for config in configs]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(example)) for example in examples]
    largest = int(np.argmax(sizes))
    for own, config in zip(examples, configs, strict=True):
        _check_example(own, examples[largest], config, configs[largest])
    return largest, objectives


def example(config, vocabulary) -> Any:
    """The shapes of one example, in which members may differ; the sizes of all else they share."""
    return _example(config_lib.without_seeds(config), vocabulary)


@functools.cache  # a sweep asks for the same ones with every run that may join them
def _example(text: str, vocabulary) -> Any:
    config = config_lib.from_json(text)
    objective = config_lib.build_objective(config, vocabulary)

    def corrupt():
        rows, knobs = state_lib.empty_rows(config), objective.evaluation_knobs
        return state_lib.corrupt_rows(objective, jax.random.key(0), rows, knobs)

    return jax.eval_shape(corrupt)


def _check_example(own, largest, config, lead) -> None:
    same = jax.tree.structure(own) == jax.tree.structure(largest)
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(largest), strict=False)
    if not same or any(
        a.ndim != b.ndim or any(x > y for x, y in zip(a.shape, b.shape, strict=True))
        for a, b in pairs
    ):
        changes = config_lib.differences(lead, config).items()
        listed = "; ".join(f"{key}: {change}" for key, change in changes if "objective." in key)
        raise UserError(f"members whose examples differ cannot train in one program: {listed}")


def stack(program: program_lib.Program, seeds: Sequence[random.Seeds]) -> program_lib.Program:
    """The program with a state and seeds [N, ...]; each member lies as a single run does."""

    def stack_leaf(leaf):
        where = NamedSharding(program.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((len(seeds), *leaf.shape), leaf.dtype, sharding=where)

    return program._replace(
        state=jax.tree.map(stack_leaf, program.state),
        seeds=jax.tree.map(lambda *each: np.stack(each), *seeds),
    )


def streams(configs) -> tuple[int, ...]:
    """For each member the number of its stream of rows: one for each `config.seed.data`."""
    seeds = [config.seed.data for config in configs]
    distinct = list(dict.fromkeys(seeds))
    return tuple(distinct.index(seed) for seed in seeds)


def sharding_of_streams(mesh: Mesh) -> NamedSharding:
    """Of streams of rows [S, B]: each lies as the rows of a single run do."""
    return NamedSharding(mesh, PartitionSpec(None, *sharding.ROWS))


def is_list(x: Any) -> bool:
    """Whether a figure is a list, of one value for each member."""
    return isinstance(x, list)


def member_of(tree: Any, number: int | jax.Array) -> Any:
    """What belongs to one member, of a tree of arrays [N, ...] and of lists of N."""
    return jax.tree.map(lambda x: x[number], tree, is_leaf=is_list)
