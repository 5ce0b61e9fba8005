"""Complete folders: built once, shared by every run, believed only when they are whole.

A folder is complete when its manifest is there. It is filled under another name by one process at a
time and renamed as a whole, so whatever is interrupted is never believed. The cache lies on a local
or network file system; several runs and hosts may share it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pretraining.errors import UserError

MANIFEST = "manifest.json"
HASHED = 1 << 30  # bytes of a folder all of which is hashed when it is opened, in about a second
_ABANDONED = 86_400  # seconds after which what another host has begun counts as dead


def root(data_config) -> pathlib.Path:
    """`config.data.cache`, else $PRETRAINING_CACHE, else ~/.cache/pretraining."""
    chosen = data_config.cache or os.environ.get("PRETRAINING_CACHE") or "~/.cache/pretraining"
    if "://" in chosen:
        raise UserError(f"config.data.cache={chosen!r}: expected a folder of a mounted file system")
    return pathlib.Path(chosen).expanduser().absolute()


def address(*parts: Any) -> str:
    """A folder's name: a hash of everything that determines its content."""
    return digest(parts)[:32]


def digest(value: Any) -> str:
    """sha256 (hex) of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------- building


def publish(folder: pathlib.Path, build: Callable[[pathlib.Path], dict[str, Any]]) -> None:
    """Makes `folder` complete, unless it is.

    One process at a time builds a folder; others wait, and find it. A process that dies leaves a
    `*.partial-*` folder beside it, which the next of its host to build it removes; others remove it
    after a day. Where the file system has no locks (then remains are left lying), or none between
    hosts, two may build at once: the first to finish wins.

    Args:
      folder: its name determines its content, see `address`.
      build: fills the empty folder that it is given; what it returns goes into the manifest.

    Raises:
      UserError: the disk is full, or the place is not writable.
    """
    if is_complete(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as alone:
            if alone:
                _remove_remains(folder)
            if not is_complete(folder):
                _build(folder, build)
    except OSError as error:
        raise UserError(f"config.data.cache: {folder} cannot be prepared: {error}") from None


def is_complete(folder: pathlib.Path) -> bool:
    return (folder / MANIFEST).is_file()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of a folder; False where the file system has none. Death releases it."""
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _remove_remains(folder: pathlib.Path):
    """What dead processes left, and a folder that someone half deleted."""
    for partial in folder.parent.glob(f"{folder.name}.partial-*"):
        own = partial.name.rpartition("-")[0] == f"{folder.name}.partial-{platform.node()}"
        if own or time.time() - _last_write(partial) > _ABANDONED:
            shutil.rmtree(partial, ignore_errors=True)
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)


def _last_write(folder: pathlib.Path) -> float:
    """Seconds since the epoch; now, if it changes meanwhile."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except FileNotFoundError:
        return time.time()


def _build(folder: pathlib.Path, build: Callable[[pathlib.Path], dict[str, Any]]):
    work = folder.with_name(f"{folder.name}.partial-{platform.node()}-{uuid.uuid4().hex}")
    try:
        work.mkdir()
        facts = build(work)
        body = {**facts, "name": folder.name, "files": _hashes(work)}
        with (work / MANIFEST).open("w") as file:
            json.dump({**body, "sha256": digest(body)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        try:
            work.rename(folder)
        except OSError:  # of a folder that is not empty: another was first
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _hashes(folder: pathlib.Path) -> dict[str, list]:
    """{path: [size, sha256]} of the files below; waits until they are on the disk."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        result[path.relative_to(folder).as_posix()] = [path.stat().st_size, sha256]
    return result


# --------------------------------------------------------------------------------------- checking


def read_manifest(folder: pathlib.Path, hashed: int = HASHED) -> dict[str, Any]:
    """The manifest, after checks: every file's size and hash; but no hash of shards that are large.

    Args:
      hashed: most bytes of a folder whose shards are hashed; of a larger one they are not.

    Raises:
      UserError: not complete, or damaged; names the file and says how to repair it.
    """
    for problem in _problems(folder, hashed):
        raise UserError(problem)
    return json.loads((folder / MANIFEST).read_text())


def verify(folder: pathlib.Path) -> list[str]:
    """What is wrong, every byte hashed; [] = nothing."""
    return list(_problems(folder, sys.maxsize))


def damaged(folder: pathlib.Path, problem: str) -> str:
    return f"{folder} is damaged: {problem}; delete the folder, and it will be prepared again"


def _problems(folder: pathlib.Path, hashed: int) -> Iterator[str]:
    """Shards are the files in folders named `c`, as in every zarr3 array."""
    if not is_complete(folder):
        yield f"{folder} is not prepared: it has no {MANIFEST}"
        return
    body = _manifest_body(folder)
    if body is None:
        yield damaged(folder, f"{MANIFEST} does not match its checksum")
        return
    if body["name"] != folder.name:
        yield damaged(folder, f"{MANIFEST} is that of {body['name']}")
        return
    files = body["files"]
    hash_shards = sum(size for size, _ in files.values()) <= hashed
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            yield damaged(folder, f"{name} is missing")
        elif path.stat().st_size != size:
            yield damaged(folder, f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif (hash_shards or "/c/" not in name) and _sha256(path) != sha256:
            yield damaged(folder, f"{name} does not match its checksum")


def _manifest_body(folder: pathlib.Path) -> dict[str, Any] | None:
    """All but the checksum; None = damaged."""
    try:
        body = json.loads((folder / MANIFEST).read_text())
        intact = body.pop("sha256") == digest(body) and {"name", "files"} <= body.keys()
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return body if intact else None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
