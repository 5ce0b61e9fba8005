"""A disk of a few megabytes: a tmpfs in a mount namespace of its own."""

import contextlib
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple


class Disk(NamedTuple):
    """A tmpfs that is gone with the process that holds it.

    Attributes:
      folder: where commands see it that begin with the words of `enter`.
      enter: words before a command.
      seen: where it is seen from outside.
    """

    folder: pathlib.Path
    enter: list[str]
    seen: pathlib.Path

    def resize(self, size: int) -> None:
        """To so many bytes."""
        words = ["mount", "-o", f"remount,size={size}", str(self.folder)]
        subprocess.run([*self.enter, *words], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(folder: pathlib.Path, size: int, directory: pathlib.Path) -> Iterator[Disk]:
    """A disk of `size` bytes at an empty folder; commands start in `directory`.

    Raises:
      PermissionError: none can be mounted here, neither directly nor in a user namespace.
    """
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("nsenter"):
        raise PermissionError("a small tmpfs needs Linux with unshare and nsenter")
    told = []
    for user, join in (([], []), (["-r"], ["-U", "--preserve-credentials"])):
        with _holder(folder, size, user) as holder:
            if holder.stdout.readline() == "ready\n":
                enter = ["nsenter", "-t", str(holder.pid), "-m", *join, f"--wd={directory}"]
                yield Disk(folder, enter, pathlib.Path(f"/proc/{holder.pid}/root{folder}"))
                return
            told.append(holder.stderr.read().strip())
    raise PermissionError(f"a small tmpfs cannot be mounted: {'; '.join(told)}")


@contextlib.contextmanager
def _holder(folder: pathlib.Path, size: int, user: list[str]) -> Iterator[subprocess.Popen]:
    """Mounts it, says "ready" and keeps it until its input is closed: as long as we live."""
    mount = 'mount -t tmpfs -o "size=$1" none "$0" && echo ready && exec cat'
    words = ["unshare", "-m", *user, "sh", "-c", mount, str(folder), str(size)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    holder = subprocess.Popen(words, text=True, **pipes)
    try:
        yield holder
    finally:
        holder.communicate()
