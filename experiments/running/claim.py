"""The folder of a sweep: which sweep it is, and that one process at a time runs it.

`sweep.json` says which. `.sweep` is locked by the process that runs the sweep, `.runs` also by the
runs that it starts: where it was killed, the next start waits for those that have not ended yet.
"""

import contextlib
import fcntl
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

from experiments import question as question_lib
from pretraining import run_folder
from pretraining.errors import UserError
from pretraining.files import write_atomically

FILE = "sweep.json"
_KINDS = {"question": str, "protocol": str, "overrides": dict, "tasks": str, "planned": dict}


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the sweep in a folder is; None = there is none.

    Returns:
      {"question": folder as typed, "protocol", "overrides": {key: value as typed}, "tasks",
      "planned": see `question.plan_of`}.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    for key, kind in _KINDS.items():
        if not isinstance(stored, dict) or not isinstance(stored.get(key), kind):
            raise UserError(f"{path} is damaged: it has no {key}")
    return stored


def agreed(workdir: pathlib.Path, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep that the folder holds or shall hold; that without tasks may be given them later.

    A sweep of which no run has begun gives way to another.

    Raises:
      UserError: the folder holds another sweep, the difference is named, or is that of a run.
    """
    if (workdir / run_folder.CONFIG).exists():
        raise UserError(f"--workdir={workdir} is the folder of a run: a sweep wants its own")
    stored = read(workdir)
    if not stored or not any(workdir.glob(f"runs/*/{run_folder.CONFIG}")):
        return dict(sweep)
    for key in ("question", "protocol", "overrides", "planned"):  # the first explains the others
        if told := _difference(key, stored[key], sweep[key]):
            raise UserError(f"--workdir={workdir} holds another sweep: {told}")
    return {**stored, "tasks": sweep["tasks"] or stored["tasks"]}


def _difference(key: str, old: Any, new: Any) -> str:
    """What has changed; of dicts, in which of their keys."""
    if isinstance(old, dict):
        both = {name: (old.get(name), new.get(name)) for name in {**old, **new}}
        return "; ".join(f"{name}: {a!r} -> {b!r}" for name, (a, b) in both.items() if a != b)
    same = _place(old) == _place(new) if key == "question" else old == new
    return "" if same else f"{key}: {old!r} -> {new!r}"


@contextlib.contextmanager
def claim(workdir: pathlib.Path, sweep: Mapping[str, Any]) -> Iterator[int]:
    """Holds the folder; yields the file descriptor that the runs are to inherit.

    Raises:
      UserError: another sweep runs there, or it holds another one, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with open(workdir / ".sweep", "w") as own, open(workdir / ".runs", "w") as runs:
            if not _lock(own, fcntl.LOCK_NB):
                raise UserError(f"--workdir={workdir}: another process runs a sweep in it")
            if not _lock(runs, fcntl.LOCK_NB):
                print("waiting for the runs of an earlier start to end", file=sys.stderr)
                _lock(runs)
            write_atomically(workdir / FILE, json.dumps(agreed(workdir, sweep), indent=1) + "\n")
            yield runs.fileno()
    except OSError as error:
        if pathlib.Path(error.filename or "").parent != workdir and error.filename != str(workdir):
            raise
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


def _place(question: str) -> pathlib.Path:
    return question_lib.locate(question).resolve()


def _lock(file: IO, how: int = 0) -> bool:
    """Whether it is taken; true as well where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{file.name} cannot be locked ({error.strerror}): run one sweep at a time")
    return True
