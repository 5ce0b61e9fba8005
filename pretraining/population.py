"""Trains runs that differ only in traced scalars as one program: a population.

    python -m pretraining.population --config=R --config.seed.init=0 --workdir=runs/a \\
        -- --config=R --config.seed.init=1 --config.optimizer.learning_rate=2e-3 --workdir=runs/b

Between the "--" stand the arguments of one training command each. Its members may differ in the
keys of `config.untraced`: seeds, learning rate and its schedule, and the knobs of the objective.
Each has the rows and masks of its own single run exactly and its losses to float32 rounding, and an
ordinary run folder, with which every other program works.

Running the same line again resumes, bit for bit, from the newest step that all members hold; what
one of them saved after it is deleted. A member that cannot go on, because its updates are not
finite or a loss spike takes it back, leaves for good: a line says so, and so does a file in its
folder, `left_population`; nothing more is written there, the others go on, in later starts too, and
`python -m pretraining.train` with its arguments goes on with it alone, at once if need be. Exit
status: 0 at the end, also where some have left; 2 where all have, and for a mistake or a full disk;
143 and 130 after SIGTERM and SIGINT, which save. One process alone trains a population.

Each member is charged its share of the program's time, 1 / N, so that the members' times add up;
`time/tokens_per_s` and `time/mfu` are then those of the whole program.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.population",
        __doc__,
        several=True,
        workdir="required: folder of the run; a folder that holds this run is resumed",
    )

import contextlib
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pretraining import (
    checkpoint,
    compilation_cache,
    evaluate,
    goodput,
    init_from,
    metrics,
    processes,
    random,
    run_folder,
    sharding,
    signs,
    train,
)
from pretraining import config as config_lib
from pretraining import guard as guard_lib
from pretraining import optimizer as optimizer_lib
from pretraining import program as program_lib
from pretraining import report as report_lib
from pretraining import state as state_lib
from pretraining import step as step_lib
from pretraining.data import tokenizer
from pretraining.errors import UserError


def main(members: Sequence[Mapping[str, Any]]) -> int:
    """The command; returns the exit status."""
    age = goodput.process_age()
    configs = [each["config"] for each in members]
    folders = [run_folder.locate(each["workdir"]) for each in members]
    check(configs, folders)
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


def train_together(configs, folders: Sequence[pathlib.Path], held, ledger: "Ledgers") -> int:
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
    ledger: "Ledgers",
) -> "Population":
    """Prepares all that the loop works with; refuses what can be refused.

    Args:
      stack: takes what is to be closed at the end.
      configs: of the members, as written; they differ in nothing but what `config.untraced` leaves.
      held: of each member, what is to be closed when it leaves.
    """
    configs = [init_from.adopt(*each) for each in zip(configs, folders, strict=True)]
    _, vocabulary, _ = program_lib.rehearse(init_from.with_own_tokenizer(configs[0], folders[0]))
    _programs([config_lib.without_epochs(config) for config in configs], vocabulary)
    _, prepared = train.read_data(configs[0], folders[0], ledger)
    rows = program_lib.rows_per_epoch(prepared, configs[0])
    configs = [config_lib.resolve_durations(config, rows) for config in configs]
    lead, programs = _programs(configs, prepared.vocabulary)

    # -------------------------------------------------------------------------------- run folders
    members = []
    for config, folder, program, own, closes in zip(
        configs, folders, programs, ledger.members, held, strict=True
    ):
        checkpoints = train.open_checkpoints(closes, folder, config, prepared, retires=False)
        members.append(Member(folder, config, prepared, program, checkpoints, own, held=closes))
    left: dict[int, str] = {}
    checkpoints = Checkpoints(members, left)
    if reason := apart(folders, configs[0].checkpoint.every):
        raise UserError(f"{reason}: what is behind is to be trained alone (pretraining.train)")
    start = checkpoints.newest() or 0
    if any(map(_steps, folders)):
        print(f"going on from step {start}, the newest that all members hold")
    for each in members:
        train.begin_folder(
            each.folder, each.config, prepared, each.program, each.checkpoints, each.ledger, start
        )
    checkpoints.discard_after(start)

    # ------------------------------------------------------------------------------------ compile
    ledger.enter("compile")
    program = _stacked(programs[lead], [each.seeds for each in programs])
    which = _streams(configs)
    functions = Functions(configs[lead], programs, which)
    finished = start == configs[0].train.steps
    update = None if finished else _compile(functions, program, configs[lead], max(which) + 1)
    evaluator = Evaluator(
        functions.terms, program.seeds, configs[lead], program.mesh, prepared.vocabulary
    )
    ledger.enter("start")
    stop = train.listen(stack, program.mesh)
    return Population(
        folders[0], configs[lead], prepared, program, checkpoints, ledger, update, evaluator, stop,
        tuple(members), which, left,
    )  # fmt: skip


# ------------------------------------------------------------------------------- what the loop uses


@dataclasses.dataclass(frozen=True)
class Member(train.Run):
    """An ordinary run, without an update of its own.

    Attributes:
      held: closed when the member leaves: its lock, signs of life and checkpoints.
    """

    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


@dataclasses.dataclass(frozen=True)
class Population(train.Run):
    """N runs as one: every array of the state has a leading axis [N], every figure is a list.

    The folder, for a profile, is that of the first member; config and program are those of the one
    with the most slots for what is predicted, see `_programs`.

    Attributes:
      members: in the order of the command.
      which: [N], for each member which of the streams of rows it reads.
      left: {number of a member that cannot go on: why}; grows.
    """

    members: tuple[Member, ...] = ()
    which: tuple[int, ...] = ()
    left: dict[int, str] = dataclasses.field(default_factory=dict)

    def begin(self, step: int) -> state_lib.State:
        """The states of the checkpoints of `step`, or those of step 0.

        One after the other takes its place: beside them all lies one at a time.
        """
        program, vocabulary = self.program, self.prepared.vocabulary
        create = state_lib.jit_init(program.objective, program.optimizer, self.config, program.mesh)
        where = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        place = jax.jit(_with_member, donate_argnums=0, out_shardings=where)
        state = jax.jit(functools.partial(_zeros, program.state), out_shardings=where)()

        def own(member: Member) -> state_lib.State:
            if step:
                return member.begin(step)
            return init_from.start(member.config, create(member.program.seeds.init), vocabulary)

        for number, each in enumerate(self.members):
            state = place(state, own(each), number)
        return state

    def batches(self, step: int, rewinds: list[dict]) -> "Streams":
        readers = [self.members[self.which.index(n)] for n in range(max(self.which) + 1)]
        return Streams([reader.batches(step, rewinds) for reader in readers])

    def put(self, rows: Sequence[Any]) -> Any:
        where = NamedSharding(self.program.mesh, PartitionSpec(None, *sharding.ROWS))
        return jax.device_put(jax.tree.map(lambda *parts: np.stack(parts), *rows), where)

    def lines(self, step: int, rewinds: list[dict]) -> "Lines":
        work = report_lib.work(self.config, self.prepared.vocabulary)
        work["share"] = 1 / len(self.members)
        speeds = [metrics.Speed(each.ledger, **work) for each in self.members]
        lines = [
            each.make_lines(step, rewinds, speed)
            for each, speed in zip(self.members, speeds, strict=True)
        ]
        return Lines(lines, self)

    def save(self, step: int, state: state_lib.State) -> None:
        """Starts to write the checkpoints of `step`, each as that of a single run.

        At most one member's state lies on the devices beside those of all.
        """
        self.checkpoints.wait()
        for number, each in enumerate(self.members):
            if number not in self.left:
                each.save(step, self._cut_out(state, number))

    @functools.cached_property
    def _cut_out(self) -> Callable[[state_lib.State, int], state_lib.State]:
        """(states [N], number) -> the state of one member, which lies as in a single run."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.members[0].program.state)
        return jax.jit(_member, out_shardings=where)

    def leave(self, number: int, reason: Exception) -> None:
        """Takes a member that cannot go on out, for good; its folder is free for others.

        Raises:
          UserError: it was the last one, or its last checkpoint could not be written.
        """
        why = str(reason) if isinstance(reason, UserError) else f"a loss spike at step {reason}"
        self.left[number] = why
        member = self.members[number]
        run_folder.mark_left(member.folder, why)
        print(f"{member.folder} leaves the population, train it alone: {why}", flush=True)
        member.held.close()
        if len(self.left) == len(self.members):
            raise UserError(f"no member of the population can go on; the last one: {why}")


class Streams:
    """Batches of several streams of rows, one list at each step."""

    def __init__(self, streams: Sequence[Any]):
        self._streams = streams

    def __next__(self) -> list[Any]:
        return [next(each) for each in self._streams]

    def close(self) -> None:
        for each in self._streams:
            each.close()


class Lines:
    """Those of all members that have not left; see `report.Lines`."""

    def __init__(self, lines: Sequence[report_lib.Lines], population: Population):
        self._lines, self._population = lines, population

    def stepped(self) -> None:
        for each in self._present():
            each.stepped()

    def write(self, step: int, figures: dict, rows, evaluation: dict) -> dict[str, float]:
        """Writes a line for each member; the mean of them, and of how many `runs` it is."""
        written, which = [], self._population.which
        for number, each in enumerate(self._lines):
            if number in self._population.left:
                continue
            own, evaluated = _own(figures, number), _own(evaluation, number)
            try:
                written.append(each.write(step, own, rows[which[number]], evaluated))
            except (UserError, guard_lib.Spike) as reason:
                each.close()
                self._population.leave(number, reason)
        if not all(written):  # some had a line of their own, because of an unusual update
            return {}
        mean = {key: statistics.fmean(line[key] for line in written) for key in written[0]}
        return mean | {"runs": len(written)} if mean else {}

    def sync(self) -> None:
        for each in self._present():
            each.sync()

    def close(self) -> None:
        for each in self._present():
            each.close()

    def _present(self) -> list[report_lib.Lines]:
        left = self._population.left
        return [each for number, each in enumerate(self._lines) if number not in left]


class Checkpoints:
    """Those of all members that have not left.

    What is too old goes only after the new ones of all members are whole: whenever the program is
    killed, there is a step that all of them hold.
    """

    def __init__(self, members: Sequence[train.Run], left: Mapping[int, str]):
        self._members, self._left = members, left

    def newest(self) -> int | None:
        """The newest step whose checkpoints are whole in all members; None if there is none."""
        steps = [each.checkpoints.newest() or 0 for each in self._members]
        while len(set(steps)) > 1:
            least = min(steps)
            places = [each.folder / run_folder.CHECKPOINTS for each in self._members]
            steps = [checkpoint.newest(place, at_most=least) or 0 for place in places]
        return steps[0] or None

    def discard_after(self, step: int) -> None:
        """Deletes what some hold beyond `step`.

        Otherwise it would count as one of the newest ones to keep, and the step that all hold would
        go too early; and updates would be made that its member takes for done.
        """
        for each in self._present():
            each.discard_after(step)

    def raise_failure(self) -> None:
        for each in self._present():
            each.raise_failure()

    def wait(self) -> None:
        """Returns when the last saves are verified and what is too old is gone."""
        for each in self._present():
            each.wait()
        for each in self._present():
            each.retire()

    def _present(self) -> list[checkpoint.Checkpoints]:
        numbered = enumerate(self._members)
        return [each.checkpoints for number, each in numbered if number not in self._left]


class Ledgers:
    """The ledgers of all members, of which each counts its share."""

    def __init__(self, members: Sequence[goodput.Ledger]):
        self.members = members

    @property
    def step(self) -> int:
        return self.members[0].step

    @step.setter
    def step(self, step: int) -> None:
        for each in self.members:
            each.step = step

    def enter(self, phase: str) -> None:
        for each in self.members:
            each.enter(phase)

    def together(self) -> dict[str, float]:
        """The sums of all totals."""
        totals = [each.totals() for each in self.members]
        return {phase: sum(each[phase] for each in totals) for phase in totals[0]}


class Evaluator(evaluate.Evaluator):
    """That of all members: every figure is a list."""

    def combine(self, parts: list[dict]) -> dict[str, Any]:
        count = len(jax.tree.leaves(parts[0], is_leaf=_is_list)[0])
        each = [evaluate.combine([_member(part, n) for part in parts]) for n in range(count)]
        return {name: [figures[name] for figures in each] for name in each[0]}


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def _own(figures: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The figures of one member; those that are no list are the same for all."""
    return {name: v[number] if _is_list(v) else v for name, v in figures.items()}


def _member(tree: Any, number: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: x[number], tree, is_leaf=_is_list)


def _with_member(states: state_lib.State, own: state_lib.State, number: int | jax.Array) -> Any:
    """The states [N] of which that of member `number` is `own`."""
    return jax.tree.map(lambda all_, one: all_.at[number].set(one), states, own)


def _zeros(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


# -------------------------------------------------------------------------------- the one program


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
            return update(state, _member(rows, jnp.asarray(self._which)[number]), seeds)

        return jax.vmap(one)(self._numbers, state, seeds)

    def terms(self, params, rows, seeds) -> step_lib.Terms:
        """(params [N], rows [B], seeds [N]) -> terms [N]."""

        def one(number, params, seeds):
            return step_lib.evaluation_step(self._objective(number))(params, rows, seeds)

        return jax.vmap(one)(self._numbers, params, seeds)

    def _objective(self, number: jax.Array):
        objectives = [each.objective for each in self._programs]
        knobs = [_float32(each.evaluation_knobs) for each in objectives]
        return self._static._replace(
            schedule=self._switch(number, [each.schedule for each in objectives]),
            evaluation_knobs=_member(jax.tree.map(lambda *x: jnp.stack(x), *knobs), number),
        )

    def _switch(self, number: jax.Array, functions: Sequence[Callable]) -> Callable:
        branches = [lambda step, own=own: _float32(own(step)) for own in functions]
        return lambda step: jax.lax.switch(number, branches, step)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _programs(configs, vocabulary) -> tuple[int, list[program_lib.Program]]:
    """The program of each member alone, with the static parts of one of them, see `_lead`."""
    lead, objectives = _lead(configs, vocabulary)
    program = program_lib.build(configs[lead], vocabulary)
    return lead, [
        program._replace(
            objective=program.objective._replace(
                schedule=objective.schedule, evaluation_knobs=objective.evaluation_knobs
            ),
            learning_rate=optimizer_lib.schedule(config.optimizer, config.train.steps),
            seeds=random.seeds(config),
        )
        for objective, config in zip(objectives, configs, strict=True)
    ]


def _lead(configs, vocabulary) -> tuple[int, list]:
    """Whose static parts are those of the program, and the objectives.

    It is the one whose examples are the largest: slots for what is predicted that another one does
    not fill have no weight.

    Raises:
      UserError: the examples differ in more than the number of slots.
    """
    objectives = [config_lib.build_objective(config, vocabulary) for config in configs]
    examples = [_example(*each) for each in zip(objectives, configs, strict=True)]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(example)) for example in examples]
    lead = int(np.argmax(sizes))
    for number, example in enumerate(examples):
        _check_example(example, examples[lead], configs[number], configs[lead])
    return lead, objectives


def _example(objective, config) -> Any:
    def corrupt():
        rows, knobs = state_lib.empty_rows(config), objective.evaluation_knobs
        return state_lib.corrupt_rows(objective, jax.random.key(0), rows, knobs)

    return jax.eval_shape(corrupt)


def _stacked(program: program_lib.Program, seeds: Sequence[random.Seeds]) -> program_lib.Program:
    """The program with a state and seeds [N, ...]; each member lies as a single run does."""

    def stack(leaf):
        where = NamedSharding(program.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((len(seeds), *leaf.shape), leaf.dtype, sharding=where)

    return program._replace(
        state=jax.tree.map(stack, program.state),
        seeds=jax.tree.map(lambda *each: np.stack(each), *seeds),
    )


def _compile(functions: Functions, program: program_lib.Program, config, streams: int):
    """The compiled update of all members; the state's buffers are donated."""
    where = NamedSharding(program.mesh, PartitionSpec(None, *sharding.ROWS))
    rows = jax.eval_shape(lambda: state_lib.empty_rows(config, config.train.batch_size))
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((streams, *x.shape), x.dtype, sharding=where), rows
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    with jax.set_mesh(program.mesh):
        update = jax.jit(functions.update, donate_argnums=0, out_shardings=(shardings, None))
        return update.lower(program.state, rows, program.seeds).compile()


def _streams(configs) -> tuple[int, ...]:
    """For each member the number of its stream of rows: one for each `config.seed.data`."""
    seeds = [config.seed.data for config in configs]
    distinct = list(dict.fromkeys(seeds))
    return tuple(distinct.index(seed) for seed in seeds)


# ---------------------------------------------------------------------------------------- refusals


def apart(folders: Sequence[pathlib.Path], every: int) -> str:
    """Why these runs cannot go on together; "" = they can.

    They can unless one has left a population, has gone back from a spike, to read other rows, or is
    more than one save, `every` steps, beyond the newest step that all of them hold: so are none
    that were killed in the middle of a save.
    """
    for folder in folders:
        if why := run_folder.why_left(folder):
            return f"{folder} has left a population: {why}"
        if guard_lib.read_rewinds(folder):
            return f"{folder} has gone back from a loss spike"
    held = [{0, *_steps(folder)} for folder in folders]
    common, newest = max(set.intersection(*held)), [max(steps) for steps in held]
    if max(newest) - common <= every:
        return ""
    first, last = (folders[newest.index(which(newest))] for which in (max, min))
    return (
        f"{first} is at step {max(newest)}, {last} at step {min(newest)}, and the newest step that "
        f"all hold is {common}"
    )


def _steps(folder: pathlib.Path) -> list[int]:
    """Those of which a run holds a checkpoint."""
    return checkpoint.sealed(folder / run_folder.CHECKPOINTS)


def check(configs, folders: Sequence[pathlib.Path]) -> None:
    """Refuses members that one program cannot train.

    Args:
      configs: as written.

    Raises:
      UserError: what they differ in, or a value that is out of range.
    """
    if len(set(folders)) < len(folders):
        raise UserError("--workdir: two members of a population have the same folder")
    for config in configs:
        config_lib.validate(config)
        if config.log.wandb:  # of which a process has one run at a time
            raise UserError(
                f"config.log.wandb={config.log.wandb!r}: members of a population write to no W&B"
            )
    vocabulary = tokenizer.stand_in(configs[0].tokenizer.size)
    first = config_lib.build_objective(config_lib.without_epochs(configs[0]), vocabulary)
    knobs = program_lib.knobs(first)
    alike = [config_lib.untraced(config, knobs) for config in configs]
    for other, folder in zip(alike, folders, strict=True):
        for key in sorted(alike[0] | other):
            if key not in alike[0] or key not in other or alike[0][key] != other[key]:
                raise UserError(
                    f"{folders[0]} and {folder} cannot train in one program: config.{key} is "
                    f"{alike[0].get(key)!r} and {other.get(key)!r}; members may differ in seeds, "
                    f"in the learning rate and its schedule, and in {', '.join(knobs)}"
                )
    _lead([config_lib.without_epochs(config) for config in configs], vocabulary)


def _check_example(example, largest, config, lead) -> None:
    same = jax.tree.structure(example) == jax.tree.structure(largest)
    pairs = zip(jax.tree.leaves(example), jax.tree.leaves(largest), strict=False)
    if not same or any(
        a.ndim != b.ndim or any(x > y for x, y in zip(a.shape, b.shape, strict=True))
        for a, b in pairs
    ):
        changes = config_lib.differences(lead, config).items()
        listed = "; ".join(f"{key}: {change}" for key, change in changes if "objective." in key)
        raise UserError(f"members whose examples differ cannot train in one program: {listed}")
