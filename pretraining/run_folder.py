"""A run folder: what identifies a run, and the refusal to mix two of them.

`config.json` (durations resolved to steps), `vocabulary/`, `provenance.jsonl` (one line per start),
`metrics.jsonl`, `tensorboard/`, `checkpoints/<step>/`; `left_population` (pretraining/population).
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator

import jax

from pretraining import config as config_lib
from pretraining import processes
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError
from pretraining.files import write_atomically

CONFIG, PROVENANCE, VOCABULARY, CHECKPOINTS = (
    "config.json",
    "provenance.jsonl",
    "vocabulary",
    "checkpoints",
)
LEFT = "left_population"  # says why, in a run that a population goes on without
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "sentencepiece",
    "numpy",
)


def locate(workdir: str | pathlib.Path, option: str = "workdir") -> pathlib.Path:
    """The absolute folder of a run; refuses a URL, which would become a folder of that name."""
    if "://" in str(workdir):
        raise UserError(f"--{option}={workdir}: a mounted folder is needed, not a URL")
    return pathlib.Path(os.path.abspath(workdir))  # Orbax takes no other


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this process; it is free again when the process ends, however it ends.

    Process 0 takes it for all processes of the run.

    Raises:
      UserError: another run trains in it, or it cannot be written; on all processes.
    """
    with contextlib.ExitStack() as stack:
        refusal = _take(folder, stack) if jax.process_index() == 0 else ""
        if not processes.agree(lambda: not refusal):
            raise UserError(refusal or f"--workdir={folder} is refused to process 0")
        yield


def _take(folder: pathlib.Path, stack: contextlib.ExitStack) -> str:
    """Locks the folder until the stack is closed; why that cannot be, or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(folder / ".lock", "w"))  # noqa: SIM115
    except OSError as error:
        return f"--workdir={folder} cannot be written: {error.strerror}"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"--workdir={folder}: another process is training in it"
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): train in it only once at a time")
    return ""


def stored_config(folder: pathlib.Path):
    """The resolved config of a run.

    Raises:
      UserError: the folder holds no run.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"--workdir={folder}: there is no run here (no {CONFIG})")
    try:
        return config_lib.from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def mark_left(folder: pathlib.Path, reason: str) -> None:
    """Notes that a population goes on without this run from now on, whatever becomes of it."""
    write_atomically(folder / LEFT, reason + "\n")


def why_left(folder: pathlib.Path) -> str:
    """What `mark_left` noted; "" = the run has left no population."""
    path = folder / LEFT
    return path.read_text().strip() if path.exists() else ""


def check_same_run(folder: pathlib.Path, config, vocabulary, data_fingerprint: str) -> None:
    """Refuses to go on in the folder of a run with another config, vocabulary or data.

    A change of durations is not refused here: whether it changes anything that has already
    happened is known only once the newest checkpoint is (`train.check_schedules`).
    """
    if not (folder / CONFIG).exists():
        return
    changed = config_lib.differences(stored_config(folder), config)
    changed = {key: change for key, change in changed.items() if key not in config_lib.SCHEDULE}
    if changed:
        listed = "; ".join(f"{key}: {change}" for key, change in changed.items())
        raise UserError(f"--workdir={folder} holds a run with another config: {listed}")
    if Vocabulary.load(folder / VOCABULARY).fingerprint != vocabulary.fingerprint:
        raise UserError(f"--workdir={folder} holds a run with another tokenizer")
    check_same_data(folder, config, data_fingerprint)


def check_same_data(folder: pathlib.Path, config, data_fingerprint: str) -> None:
    """Refuses data other than those that the run began with."""
    began = provenance(folder, 0)["data"]
    if began != data_fingerprint:
        raise UserError(
            f"--workdir={folder} holds a run on other data: its token stores were {began[:12]}, "
            f"and {config.data.corpus!r} now gives {data_fingerprint[:12]}"
        )


def provenance(folder: pathlib.Path, number: int) -> dict:
    """What `record` wrote at one start of a run: the first is 0, the last -1."""
    try:
        entry = json.loads((folder / PROVENANCE).read_text().splitlines()[number])
        if "data" in entry:
            return entry
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{folder / PROVENANCE} is missing or damaged")


def record(
    folder: pathlib.Path,
    config,
    vocabulary,
    data_fingerprint: str,
    step: int,
    population: str = "",
) -> None:
    """Writes what identifies the run (config.json last) and one line of provenance.

    Args:
      population: what this start has in common with those of the other members; "" = it is alone.
    """
    if jax.process_index() > 0:
        return
    if not (folder / CONFIG).exists():
        vocabulary.save(folder / VOCABULARY)
    # Without a config there was no start but one that a full disk ended, in the middle of a line.
    with open(folder / PROVENANCE, "a" if (folder / CONFIG).exists() else "w") as file:
        file.write(json.dumps(_provenance(data_fingerprint, step, population)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    write_atomically(folder / CONFIG, config_lib.to_json(config))


def _provenance(data_fingerprint: str, step: int, population: str) -> dict:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "population": population,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [jax.device_count(), jax.devices()[0].device_kind],
        "processes": jax.process_count(),
        "cores": processes.cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "data": data_fingerprint,
    }


def _commit() -> str | None:
    """The commit of the code, with "+" when the tree has changes; None outside a repository."""
    root = pathlib.Path(__file__).parent.parent

    def git(*arguments):
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
