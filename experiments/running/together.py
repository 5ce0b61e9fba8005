"""Which runs of a sweep train in one program: `--population`, see pretraining/population."""

import sys
from collections.abc import Sequence

from experiments.running import table
from experiments.running.planned import Planned
from pretraining import config as config_lib
from pretraining.errors import UserError

Group = list[Planned]


def populations(planned: Sequence[Planned], most: int) -> list[Group]:
    """Runs that one program can train, from 2 to `most` in each group; the others are left out.

    One program does not refuse them, and they are as far as each other.
    """
    groups: list[Group] = []
    for each in planned:
        if table.is_trained(each):
            continue
        open_ = (group for group in groups if len(group) < most and _fits(each, group))
        group = next(open_, None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return [group for group in groups if len(group) > 1]


def name(group: Group) -> str:
    """What the group is called: "a-seed0+2" is that run and two others."""
    return f"{group[0].name}+{len(group) - 1}"


def command(group: Group, python: str = sys.executable) -> list[str]:
    """The words of the command that trains the group."""
    words = [word for each in group for word in ("--", *each.arguments())]
    return [python, "-m", "pretraining.population", *words[1:]]


def describe(groups: Sequence[Group]) -> str:
    """Which runs go together, a line for each program."""
    lines = ["  " + ", ".join(each.name for each in group) for group in groups]
    return "\n".join([f"Programs of several runs: {len(lines)}; the others train alone.", *lines])


def _fits(run: Planned, group: Group) -> bool:
    from pretraining.population import check  # what it imports takes seconds

    if _shared(run) != _shared(group[0]):  # what most differ in is found without a rehearsal
        return False
    configs, folders = zip(*[(each.config, each.folder) for each in [*group, run]], strict=True)
    every = config_lib.without_epochs(run.config).checkpoint.every
    try:
        check.one_program(configs, folders)
        return not check.apart(folders, every)
    except UserError:  # also a folder that is damaged: its own start will say so
        return False


def _shared(run: Planned) -> dict:
    return config_lib.untraced(run.config, run.cost.knobs)
