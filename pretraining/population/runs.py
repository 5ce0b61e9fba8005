"""The runs of a population as the training loop works with them: all as if they were one."""

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

from pretraining import (
    checkpoint,
    evaluate,
    flops,
    goodput,
    init_from,
    metrics,
    run_folder,
    train,
)
from pretraining import guard as guard_lib
from pretraining import program as program_lib
from pretraining import report as report_lib
from pretraining import state as state_lib
from pretraining.data import prepare
from pretraining.errors import UserError
from pretraining.population import vmapped
from pretraining.population.vmapped import is_list, member_of, sharding_of_streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member(train.Resumable):
    """An ordinary run, which is updated together with the other members.

    Attributes:
      held: closed when the member leaves: its lock, signs of life and checkpoints.
    """

    held: contextlib.ExitStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """N runs as one, with what the loop asks of a Run.

    Every array of the state has a leading axis [N], every figure is a list.

    Attributes:
      folder: that of the first member, for a profile.
      config, program: those of the member with the most slots for what is predicted, see
        `vmapped.lead`; the program as `vmapped.stack` makes it.
      update, evaluator, stop: see Run.
      members: in the order of the command.
      which: [N], for each member which of the streams of rows it reads.
      left: {number of a member that cannot go on: why}; grows.
    """

    folder: pathlib.Path
    config: Any
    prepared: prepare.Prepared
    program: program_lib.Program
    checkpoints: "Checkpoints"
    ledger: "Ledgers"
    update: Callable | None
    evaluator: "Evaluator"
    stop: Callable[[], int]
    members: tuple[Member, ...]
    which: tuple[int, ...]
    left: dict[int, str]

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
        """The batches of all streams from `step` on."""
        readers = [self.members[self.which.index(n)] for n in range(max(self.which) + 1)]
        return Streams([reader.batches(step, rewinds) for reader in readers])

    def put(self, rows: Sequence[Any]) -> Any:
        """A batch of each stream on the devices."""
        where = sharding_of_streams(self.program.mesh)
        return jax.device_put(jax.tree.map(lambda *parts: np.stack(parts), *rows), where)

    def lines(self, step: int, rewinds: list[dict]) -> "Lines":
        """What writes the metrics of the updates after `step`."""
        lines = [
            each.make_lines(step, rewinds, speed)
            for each, speed in zip(self.members, self._speeds(), strict=True)
        ]
        return Lines(lines, self)

    def _speeds(self) -> list[metrics.Speed]:
        """Each with the FLOPs of its own single run, counted once for all examples of one size."""
        share, peak = 1 / len(self.members), flops.peak_flops(self.config)
        vocabulary = self.prepared.vocabulary
        keys = [str(vmapped.example(each.config, vocabulary)) for each in self.members]
        distinct = dict(zip(keys, self.members, strict=True))
        works = {key: report_lib.work(each.config, vocabulary) for key, each in distinct.items()}
        return [
            metrics.Speed(each.ledger, peak=peak, share=share, **works[key])
            for key, each in zip(keys, self.members, strict=True)
        ]

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
        return jax.jit(member_of, out_shardings=where)

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

    def __init__(self, members: Sequence[Member], left: Mapping[int, str]):
        self._members, self._left = members, left

    def newest(self) -> int | None:
        """The newest step whose checkpoints are whole in all members; None if there is none."""
        steps = [each.checkpoints.newest() or 0 for each in self._members]
        while len(set(steps)) > 1:
            least = min(steps)
            steps = [each.checkpoints.newest(least) or 0 for each in self._members]
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
        count = len(jax.tree.leaves(parts[0], is_leaf=is_list)[0])
        each = [evaluate.combine([member_of(part, n) for part in parts]) for n in range(count)]
        return {name: [figures[name] for figures in each] for name in each[0]}


def _own(figures: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The figures of one member; those that are no list are the same for all."""
    return {name: v[number] if is_list(v) else v for name, v in figures.items()}


def _with_member(states: state_lib.State, own: state_lib.State, number: int | jax.Array) -> Any:
    """The states [N] of which that of member `number` is `own`."""
    return jax.tree.map(lambda all_, one: all_.at[number].set(one), states, own)


def _zeros(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
