"""The manifest of a folder of files: their sizes and SHA-256, by which it is known to be whole."""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pretraining import files

MANIFEST = "manifest.json"


def write(folder, arrays: dict[str, str], notes: dict[str, Any]) -> None:
    """Writes the manifest of a folder; when this returns, all that lies in it is on the disk.

    Args:
      folder: an epath.Path.
      arrays: {name: dtype and shape} of what its files hold.
      notes: whatever else is to be known of it, as JSON has it.
    """
    found = {}
    for path in _files(folder):
        files.sync(path)
        found[str(path.relative_to(folder))] = {
            "size": path.stat().length,
            "sha256": _sha256(path),
        }
    content = {"arrays": arrays, "notes": notes, "files": found}
    text = json.dumps({"sha256": _digest(content), **content}, indent=1) + "\n"
    files.write_atomically(folder / MANIFEST, text)
    files.sync(folder.parent)


def _files(folder) -> Iterator[Any]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
            files.sync(path)
        else:
            yield path


def read(folder) -> dict[str, Any]:
    """The manifest of one checkpoint; ValueError where it is not what was written."""
    content = json.loads((folder / MANIFEST).read_text())
    if content.pop("sha256") != _digest(content):
        raise ValueError("its own checksum differs")
    return content


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder, item: str = "") -> str | None:
    """What differs from the manifest, in the whole checkpoint or in one item; None if nothing."""
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing: the save was not finished"
    try:
        listed = read(folder)["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    names = [name for name in listed if not item or name.startswith(f"{item}/")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _file_damage(folder, name, **listed[name]), names)
        return next(filter(None, found), None)


def _file_damage(folder, name: str, size: int, sha256: str) -> str | None:
    try:
        if (present := (folder / name).stat().length) != size:
            return f"{name} has {present} bytes instead of {size}"
        if _sha256(folder / name) != sha256:
            return f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None
