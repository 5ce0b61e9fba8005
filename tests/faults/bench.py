"""Runs of the real program: how they are started, and what two of them must have in common."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pretraining import checkpoint, metrics, run_folder
from tests.running import Ended, finish, last_step, start, wait_for

STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 7, 10

# Any recipe's model and data, as small as a test wants them.
SMALL = {
    "data.validation": 0.1,
    "data.sequence_length": 32,
    "data.workers": 1,
    "tokenizer.size": 300,
    "tokenizer.byte_fallback": True,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp_width": 64,
    "train.batch_size": 16,
    "train.steps": STEPS,
    "evaluate.rows": 16,
    "evaluate.batch_size": 8,
    "log.tensorboard": False,
    "log.peak_flops": 1e12,
}

# The same with everything on that a resumed run could get wrong.
OVERRIDES = SMALL | {
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "train.accumulation": 2,
    "train.ema": 0.9,
    "checkpoint.every": SAVE_EVERY,
    "checkpoint.keep_every": 2 * SAVE_EVERY,
    "evaluate.every": EVALUATE_EVERY,
    "log.every": 1,
}


class Bench(NamedTuple):
    """What all runs of one objective share.

    Attributes:
      folder: of this objective's runs.
      objective: its name.
      overrides: of its tiny recipe.
      compiled: folder in which JAX keeps compiled programs: compiling takes most of the time of a
        start, and what comes out of that folder is the same program. None = every start compiles.
      recipe: another recipe than the objective's own.
      python_path: a folder with more objectives.
      prefix: words before each command.
    """

    folder: pathlib.Path
    objective: str
    overrides: Mapping[str, Any]
    compiled: pathlib.Path | None
    recipe: str = ""
    python_path: str = ""
    prefix: tuple[str, ...] = ()


def generator(bench: Bench, seed: int) -> np.random.Generator:
    """Of the moments and places of one objective's faults."""
    return np.random.default_rng([seed, *bench.objective.encode()])


def create(folder: pathlib.Path, objective: str) -> Bench:
    """A bench below `folder`, where corpus, token store and compiled programs are shared."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    overrides = OVERRIDES | {"data.corpus": corpus, "data.cache": folder / "cache"}
    (folder / objective).mkdir(exist_ok=True)
    return Bench(folder / objective, objective, overrides, folder / "compiled")


def write_corpus(path: pathlib.Path) -> None:
    """600 documents in which a word tells much about the next one."""
    words = ["the", "a", "of", "value", "returns", "object", "list", "string", "each", "with"]
    generator = np.random.default_rng(0)
    follows = {word: generator.choice(words, 3, replace=False) for word in words}
    documents = []
    for number in range(600):
        text, word = [f"Document {number}."], "the"
        for _ in range(int(generator.integers(20, 80))):
            word = generator.choice(follows[word])
            text.append(word)
        documents.append(" ".join(text) + ".")
    path.write_text("\n\n".join(documents))


# ----------------------------------------------------------------------------------------- running


def launch(
    bench: Bench, folder: pathlib.Path, changes: Mapping[str, Any] | None = None
) -> subprocess.Popen:
    """Starts to train in `folder`, with further overrides."""
    recipe = bench.recipe or f"configs/{bench.objective}.py:tiny"
    words = ["pretraining.train", f"--config={recipe}", f"--workdir={folder}"]
    overrides = {**bench.overrides, **(changes or {})}
    return _start(bench, words + [f"--config.{key}={value}" for key, value in overrides.items()])


def _start(bench: Bench, words: list[str]) -> subprocess.Popen:
    given = [bench.python_path, os.environ.get("PYTHONPATH", "")]
    return start(
        [*bench.prefix, sys.executable, "-m", *words],
        PYTHONPATH=os.pathsep.join(filter(None, given)),
        JAX_ENABLE_COMPILATION_CACHE=str(bench.compiled is not None),
        JAX_COMPILATION_CACHE_DIR=str(bench.compiled) if bench.compiled else None,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


def train(bench: Bench, folder: pathlib.Path, changes: Mapping[str, Any] | None = None) -> Ended:
    """Trains in `folder` until the program ends."""
    return finish(launch(bench, folder, changes))


def replay(bench: Bench, folder: pathlib.Path, step: int) -> Ended:
    """Makes update `step` again."""
    return finish(_start(bench, ["pretraining.replay", f"--workdir={folder}", f"--step={step}"]))


def reference(bench: Bench) -> pathlib.Path:
    """The folder of the run that nothing disturbs, trained at the first call."""
    folder = bench.folder / "reference"
    if last_step(folder) != STEPS:
        ended = train(bench, folder)
        if problem := ended.problem():
            raise RuntimeError(f"the undisturbed run of {bench.objective} fails: {problem}")
    return folder


def kill_when(process: subprocess.Popen, sign: Callable[[], bool]) -> str | None:
    """`kill -9` at the sign; what is wrong if it did not come."""
    came = wait_for([process], sign)
    process.kill()
    ended = finish(process)
    return None if came else f"the sign to kill it at did not come: {ended}"


# ----------------------------------------------------------------------------------------- reading


def starting_steps(folder: pathlib.Path) -> list[int]:
    """The step that each start of a run began from."""
    path = folder / run_folder.PROVENANCE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def checkpoints(folder: pathlib.Path) -> pathlib.Path:
    return folder / run_folder.CHECKPOINTS


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Those of the sealed checkpoints, ascending."""
    sealed = checkpoints(folder).glob(f"*/{checkpoint.MANIFEST}")
    return sorted(int(path.parent.name) for path in sealed if path.parent.name.isdigit())


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def untimed(folder: pathlib.Path) -> list[dict[str, str]]:
    """Every value of every metrics line that is not a timing, as it is written."""
    return [
        {key: json.dumps(value) for key, value in line.items() if not key.startswith("time/")}
        for line in metrics.read(folder / metrics.FILE)
    ]


def leaves(folder: pathlib.Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by Orbax alone: parameters, optimizer, average, counters."""
    import orbax.checkpoint as ocp
    from flax import traverse_util

    place = checkpoints(folder) / str(step)
    names = json.loads((place / checkpoint.MANIFEST).read_text())["arrays"]
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = {}
    for item in sorted(path.name for path in place.iterdir() if path.is_dir()):
        inside = {n.removeprefix(f"{item}/") for n in names if n.startswith(f"{item}/")}
        inside = inside or {n for n in names if not (place / n.split("/")[0]).is_dir()}
        how = {tuple(n.split("/")): ocp.RestoreArgs(restore_type=np.ndarray) for n in inside}
        arguments = ocp.args.PyTreeRestore(restore_args=traverse_util.unflatten_dict(how))
        tree = reader.restore(place / item, args=arguments)
        flat = traverse_util.flatten_dict(tree, sep="/")
        found |= {f"{item}/{name}": np.asarray(leaf) for name, leaf in flat.items()}
    if len(found) != len(names):
        raise ValueError(f"{place} holds {len(found)} arrays of {len(names)}")
    return found


def differences(folder: pathlib.Path, wanted: pathlib.Path, steps: int = STEPS) -> list[str]:
    """What two runs of so many updates do not share bit for bit, timings apart; [] = nothing."""
    lines = _different_lines(untimed(folder), untimed(wanted))
    return [*lines, *_different_leaves(leaves(folder, steps), leaves(wanted, steps))]


def _different_lines(lines: list[dict], wanted: list[dict]) -> Iterator[str]:
    steps, expected = ([int(line["step"]) for line in each] for each in (lines, wanted))
    if steps != expected:
        yield f"metrics of the steps {steps} instead of {expected}"
        return
    for line, other in zip(lines, wanted, strict=True):
        if wrong := sorted(k for k in line | other if line.get(k) != other.get(k)):
            yield f"step {line['step']} differs in {', '.join(wrong)}"


def _different_leaves(found: Mapping, expected: Mapping) -> Iterator[str]:
    for name in sorted(found | expected):
        if name not in found or name not in expected:
            yield f"{name} is in one of them only"
        elif (found[name].dtype, found[name].shape) != (expected[name].dtype, expected[name].shape):
            yield f"{name} has another type or shape"
        elif found[name].tobytes() != expected[name].tobytes():
            yield f"{name} differs"


def remains(folder: pathlib.Path) -> list[str]:
    """Temporary files and folders that nobody has cleared away."""
    temporary = ("*.orbax-checkpoint-tmp*", "*.partial-*", "*.tmp", ".[!l]*")
    found = [str(path) for pattern in temporary for path in folder.rglob(pattern)]
    return [f"left lying: {name}" for name in sorted(found)]
