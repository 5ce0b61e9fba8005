"""A page of measured figures: where it goes, where its figures come from, and its tables."""

import datetime
import os
import pathlib
import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import psutil

from pretraining import processes
from pretraining.errors import UserError
from pretraining.files import write_atomically

MEASURED = pathlib.Path(__file__).parent / "measured"
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def place(name: str, output: str | None) -> pathlib.Path:
    """The file of a page: measured/<name>.md, or the option --output.

    Raises:
      UserError: no page can be written there; to be told before anything is measured.
    """
    path = pathlib.Path(output) if output else MEASURED / f"{name}.md"
    if path.suffix != ".md" or path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output={str(path)!r}: a file *.md in a folder that is there")
    return path


def origin(
    name: str,
    options: Mapping[str, Any],
    packages: Sequence[str],
    others: Mapping[str, str] | None = None,
) -> str:
    """The command, the date, the machine, how busy it is now, and versions.

    Args:
      name: of the module in experiments.speed.
      options: of the command; those that are None are left out. Of an absolute path only the name
        is told: where something lies on a machine is of no use elsewhere.
      packages: whose versions here are told, beside Python's.
      others: {name: version} of what runs under another interpreter.
    """
    found = {"Python": platform.python_version()}
    found |= {package: metadata.version(package) for package in packages} | dict(others or {})
    versions = ", ".join(f"{package} {version}" for package, version in found.items())
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"`{_command(name, options)}`\n\n{datetime.date.today()}; {_machine()}; load average at the"
        f" start {load} (1, 5, 15 minutes); {versions}."
    )


def _command(name: str, options: Mapping[str, Any]) -> str:
    words = [f"--{key}={_told(str(value))}" for key, value in options.items() if value is not None]
    return shlex.join(["python", "-m", f"experiments.speed.{name}", *words])


def _told(value: str) -> str:
    return pathlib.PurePath(value).name if os.path.isabs(value) else value


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{processes.cores()} CPU cores, {_cpu()}, {memory:.0f} GiB"


def _cpu() -> str:
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    model = re.search(r"model name\s*: (.+)", text)
    return model[1] if model else platform.processor() or platform.machine()


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: pathlib.Path, *paragraphs: str) -> None:
    """Replaces the page by these paragraphs, and prints it."""
    text = "\n\n".join(paragraphs)
    write_atomically(path, f"{text}\n")
    print(text)
