"""What lies on the disk is damaged, or the disk is full."""

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from pretraining import checkpoint, metrics, signs
from pretraining import config as config_lib
from pretraining.data import cache, tokenizer
from tests.faults import bench as runs
from tests.faults import disk
from tests.faults.bench import Bench
from tests.faults.outcome import Outcome
from tests.running import ROOT

# ------------------------------------------------------------------------------------- checkpoints


def damage_checkpoints(
    bench: Bench, seed: int, kinds=("truncated", "deleted", "flipped"), flips: int = 20
) -> Outcome:
    """The newest checkpoint damaged: it is named, the one before is used, the end is the same.

    Every flip of one bit is found without starting the program; one of each kind is gone through.
    """
    outcome, generator = Outcome("checkpoint damaged", bench.objective), runs.generator(bench, seed)
    wanted = runs.reference(bench)
    for kind in kinds:
        folder = bench.folder / f"checkpoint_{kind}"
        shutil.copytree(wanted, folder)
        victim = _spoil(runs.checkpoints(folder) / str(runs.STEPS), kind, generator)
        ended = runs.train(bench, folder)
        before = runs.saved_steps(wanted)[-2]
        outcome.count(ended.problem(), *_not_told(ended.err, victim, before))
        if runs.starting_steps(folder) != [0, before]:
            outcome.complaints.append(f"starts at {runs.starting_steps(folder)}, not at {before}")
        outcome.compare(folder, wanted)
    for complaint in _flips(wanted, bench.folder / "checkpoint_flips", generator, flips):
        outcome.count(complaint)
    return outcome


def _spoil(folder: pathlib.Path, kind: str, generator: np.random.Generator) -> pathlib.Path:
    """Damages one file of a checkpoint, and returns it."""
    arrays = [path for path in runs.files(folder) if path.parent.name == "d"]
    victim = arrays[generator.integers(len(arrays))]
    if kind == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    elif kind == "deleted":
        victim.unlink()
    else:
        flip(victim, int(generator.integers(victim.stat().st_size)), 1)
    return victim


def flip(path: pathlib.Path, place: int, bit: int) -> None:
    """Flips one bit; the same call again repairs it."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def _not_told(text: str, victim: pathlib.Path, instead: int) -> list[str]:
    """Complaints unless one line names the file and the step that is used instead."""
    told = [line for line in text.splitlines() if victim.name in line and "not used" in line]
    if len(told) == 1 and f"step {instead} is used instead" in told[0]:
        return []
    return [f"{victim} is not named in one line with step {instead}: {text[-1000:]}"]


def _flips(wanted, folder: pathlib.Path, generator, count: int) -> Iterator[str | None]:
    """Of each flip at a random place of all files of the newest checkpoint: was it missed?"""
    shutil.copytree(runs.checkpoints(wanted), folder)
    damaged, before = runs.STEPS, runs.saved_steps(wanted)[-2]
    files = runs.files(folder / str(damaged))
    ends = np.cumsum([path.stat().st_size for path in files])
    for place in generator.integers(ends[-1], size=count).tolist():
        which = int(np.searchsorted(ends, place, side="right"))
        path, offset = files[which], place - int(ends[which]) + files[which].stat().st_size
        bit = int(generator.integers(8))
        flip(path, offset, bit)
        with _logged("pretraining.checkpoint") as lines:
            used = checkpoint.newest(folder)
        flip(path, offset, bit)
        said = any(path.name in line for line in lines)
        yield None if said and used == before else f"bit {bit} of byte {offset} of {path}: {used}"
    if checkpoint.newest(folder) != damaged:
        yield "a checkpoint that was repaired is not used again"


@contextlib.contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """The lines that a logger gets, instead of where they went."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


# ---------------------------------------------------------------------------------------- the disk


def fill_disk(bench: Bench) -> Outcome:
    """Room for two checkpoints and a half: the third save fails, with space the run goes on."""
    outcome, wanted = Outcome("disk full while saving", bench.objective), runs.reference(bench)
    size = max(_disk_use(path) for path in runs.checkpoints(wanted).iterdir())
    place = bench.folder / "full_disk"
    place.mkdir()
    try:
        with disk.mounted(place, size * 5 // 2 + 100_000, ROOT) as small:
            inside = bench._replace(prefix=tuple(small.enter))
            _fill(inside, small, outcome)
            small.resize(20 * size)
            outcome.complaints += filter(None, [runs.train(inside, place / "run").problem()])
            outcome.compare(small.seen / "run", wanted)
    except PermissionError as error:
        outcome.skipped = str(error)
    return outcome


def _fill(bench: Bench, small: disk.Disk, outcome: Outcome) -> None:
    ended = runs.train(bench, small.folder / "run")
    outcome.count(ended.problem(2), *_not_one_line(ended.err, "cannot be written"))
    saved = runs.saved_steps(small.seen / "run")
    if saved != [runs.SAVE_EVERY, 2 * runs.SAVE_EVERY]:
        outcome.complaints.append(f"checkpoints of steps {saved} are there")
    newest = checkpoint.newest(runs.checkpoints(small.seen / "run"))
    if newest not in saved[-1:]:
        outcome.complaints.append(f"of the steps {saved}, {newest} is the newest whole one")


def _disk_use(folder: pathlib.Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in [folder, *folder.rglob("*")])


def _not_one_line(text: str, part: str) -> list[str]:
    """Complaints unless one line says what is wrong, with no stack beside it."""
    told = [line for line in text.splitlines() if line.startswith("error: ")]
    if len(told) == 1 and part in told[0] and "Traceback" not in text:
        return []
    return [f"not told in one line with {part!r}: {text[-2000:]}"]


# --------------------------------------------------------------------------------------- the store


def damage_store(
    bench: Bench, seed: int, kinds=("shard deleted", "byte flipped", "vocabulary swapped")
) -> Outcome:
    """The token store damaged under a run that was killed: refused before training on it."""
    outcome, generator = Outcome("store damaged", bench.objective), runs.generator(bench, seed)
    wanted = runs.reference(bench)
    intact, place = bench.folder / "store_intact", bench.folder / "store_cache"
    folder, changes = bench.folder / "store_damaged", {"data.cache": place}
    process = runs.launch(bench, folder, changes)
    late = runs.kill_when(process, lambda: runs.last_step(folder) > runs.SAVE_EVERY)
    outcome.complaints += filter(None, [late])
    shutil.copytree(place, intact)
    kept = [path for path in runs.files(folder) if path.parent.name != signs.FOLDER]
    before = {path: path.read_bytes() for path in kept}
    for kind in kinds:
        shutil.rmtree(place)
        shutil.copytree(intact, place)
        _spoil_store(place, kind, generator)
        ended = runs.train(bench, folder, changes)
        outcome.count(ended.problem(2), *_not_one_line(ended.err, str(place)))
        changed = [path for path, content in before.items() if _differs(path, content)]
        outcome.complaints += [f"{kind}: {path} has changed" for path in changed]
    shutil.rmtree(place)
    shutil.copytree(intact, place)
    outcome.complaints += filter(None, [runs.train(bench, folder, changes).problem()])
    outcome.compare(folder, wanted)
    return outcome


def _differs(path: pathlib.Path, content: bytes) -> bool:
    return not path.exists() or path.read_bytes() != content


def _spoil_store(place: pathlib.Path, kind: str, generator: np.random.Generator) -> None:
    """Spoils the only store, or gives it another vocabulary, which is whole in itself."""
    (store,) = [path.parent for path in place.glob(f"stores/*/{cache.MANIFEST}")]
    shards = [path for path in runs.files(store) if path.parent.name == "c"]
    shard = shards[generator.integers(len(shards))]
    if kind == "shard deleted":
        shard.unlink()
    elif kind == "byte flipped":
        flip(shard, int(generator.integers(shard.stat().st_size)), int(generator.integers(8)))
    else:
        config = config_lib.base_recipe().get_config().tokenizer
        config.update(kind="bpe", size=280)
        tokenizer.train(["quite another text, " * 50], config).save(store / "vocabulary")


# ------------------------------------------------------------------------------------- the metrics


def cut_metrics(bench: Bench, seed: int) -> Outcome:
    """A killed run whose last line is cut at a random byte, and one whose save was not sealed."""
    outcome, generator = Outcome("metrics cut", bench.objective), runs.generator(bench, seed)
    wanted, killed = runs.reference(bench), bench.folder / "metrics"
    process = runs.launch(bench, killed)
    late = runs.kill_when(process, lambda: runs.last_step(killed) >= 2 * runs.SAVE_EVERY + 3)
    outcome.complaints += filter(None, [late])
    for kind in ("cut", "unsealed"):
        folder = bench.folder / f"metrics_{kind}"
        shutil.copytree(killed, folder)
        newest = checkpoint.newest(runs.checkpoints(folder))
        if kind == "cut":
            _cut(folder / metrics.FILE, newest, generator)
        else:
            (runs.checkpoints(folder) / str(newest) / checkpoint.MANIFEST).unlink()
        outcome.count(runs.train(bench, folder).problem())
        outcome.compare(folder, wanted)
    return outcome


def _cut(path: pathlib.Path, step: int, generator: np.random.Generator) -> None:
    """Cuts in a line after `step`: those until there were on the disk before the checkpoint was."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = sum(map(len, lines[:step]))
    os.truncate(path, int(generator.integers(kept + 1, path.stat().st_size)))
