"""Files that a crash, or a power cut, leaves whole."""

import os
import pathlib


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file as a whole: after a crash either the old content is there or the new."""
    temporary = path.with_name(f".{path.name}.new")  # one name: what a crash leaves is overwritten
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: str | pathlib.Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
