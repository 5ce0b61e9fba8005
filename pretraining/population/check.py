"""Which runs one program can train, and which can go on together."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from pretraining import checkpoint, run_folder
from pretraining import config as config_lib
from pretraining import guard as guard_lib
from pretraining import optimizer as optimizer_lib
from pretraining import program as program_lib
from pretraining.data import tokenizer
from pretraining.errors import UserError
from pretraining.population import vmapped

_OBJECTIVE = "objective.name"  # told first where it differs: other keys then differ because of it


def apart(folders: Sequence[pathlib.Path], every: int) -> str:
    """`why_apart`, as far as can be told without reading whole checkpoints."""
    held = [{0, *steps(folder)} for folder in folders]
    newest, common = [max(each) for each in held], max(set.intersection(*held))
    return why_apart(folders, newest, common, every)


def why_apart(
    folders: Sequence[pathlib.Path], newest: Sequence[int], common: int, every: int
) -> str:
    """Why these runs cannot go on together from the newest step that all hold; "" = they can.

    They can unless one has left a population, or has gone back from a spike, to read other rows.
    What one of them holds beyond that step is deleted: it must be what members have that were
    killed in the middle of a save, which are one save apart and began together the last time. (If
    the program saved at a signal alone, `every` 0, or `every` was lowered since, they are further
    apart, and refused.)

    Args:
      newest: step of each.
      common: the newest step that all hold.
      every: steps between two saves.
    """
    for folder in folders:
        if why := run_folder.why_left(folder):
            return f"{folder} has left a population: {why}"
        if guard_lib.read_rewinds(folder):
            return f"{folder} has gone back from a loss spike"
    first, last = (folders[newest.index(which(newest))] for which in (max, min))
    told = f"{first} is at step {max(newest)}, {last} at step {min(newest)}"
    if max(newest) - common > every:
        return f"{told}, and the newest step that all hold is {common}"
    if max(newest) > common and len(set(map(_last_start, folders))) > 1:
        return f"{told}, and they were not trained together last"
    return ""


def _last_start(folder: pathlib.Path) -> str:
    """What the newest start of a run had in common with those of the other members."""
    begun = (folder / run_folder.CONFIG).exists()
    return (begun and run_folder.provenance(folder, -1)["population"]) or str(folder)


def steps(folder: pathlib.Path) -> list[int]:
    """Those of which a run holds a checkpoint."""
    return checkpoint.sealed(folder / run_folder.CHECKPOINTS)


def one_program(configs, folders: Sequence[pathlib.Path]) -> None:
    """Refuses members that one program cannot train.

    Args:
      configs: as written.

    Raises:
      UserError: what they differ in, or a value that is out of range.
    """
    if len(set(folders)) < len(folders):
        raise UserError("--workdir: two members of a population have the same folder")
    for config, folder in zip(configs, folders, strict=True):
        with _named(folder):
            config_lib.validate(config)
            if config.log.wandb:  # of which a process has one run at a time
                raise UserError(
                    f"config.log.wandb={config.log.wandb!r}: members of a population write to no "
                    "W&B"
                )
    vocabulary = tokenizer.stand_in(configs[0].tokenizer.size)
    first = config_lib.build_objective(config_lib.without_epochs(configs[0]), vocabulary)
    knobs = program_lib.knobs(first)
    alike = [config_lib.untraced(config, knobs) for config in configs]
    for other, folder in zip(alike, folders, strict=True):
        for key in sorted(alike[0] | other, key=lambda key: (key != _OBJECTIVE, key)):
            if key not in alike[0] or key not in other or alike[0][key] != other[key]:
                raise UserError(
                    f"{folders[0]} and {folder} cannot train in one program: config.{key} is "
                    f"{alike[0].get(key)!r} and {other.get(key)!r}; members may differ in seeds, "
                    f"in the learning rate and its schedule{_listed(knobs)}"
                )
    short = [config_lib.without_epochs(config) for config in configs]
    for config, folder in zip(short, folders, strict=True):
        with _named(folder):  # both refuse what is out of range
            optimizer_lib.schedule(config.optimizer, config.train.steps)
            config_lib.build_objective(config, vocabulary)
    vmapped.lead(short, vocabulary)


@contextlib.contextmanager
def _named(folder: pathlib.Path) -> Iterator[None]:
    """Says whose mistake it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _listed(knobs: Sequence[str]) -> str:
    """What `config.untraced` leaves of an objective."""
    named = ", ".join(f"config.objective.{name}" for name in knobs)
    return f", and in {named} and their schedules" if knobs else ""
