"""Populations for tests: how they are started, beside the single runs that they must equal."""

import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tests import running

Members = Mapping[str, Mapping[str, Any]]  # {name of the folder: overrides}


def words(members: Members, folder: pathlib.Path, recipe: str = running.RECIPE) -> list[str]:
    """The command that trains the members in <folder>/<name>."""
    each = [arguments(own, folder / name, recipe) for name, own in members.items()]
    together = [word for arguments in each for word in ("--", *arguments)]
    return [sys.executable, "-m", "pretraining.population", *together[1:]]


def single(
    overrides: Mapping[str, Any], folder: pathlib.Path, recipe: str = running.RECIPE
) -> list[str]:
    """The command that trains a run alone."""
    return [sys.executable, "-m", "pretraining.train", *arguments(overrides, folder, recipe)]


def arguments(overrides: Mapping[str, Any], folder: pathlib.Path, recipe: str) -> list[str]:
    values = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [f"--config={recipe}", *values, f"--workdir={folder}"]


def complete(command: Sequence[str], devices: int = 1) -> running.Ended:
    """Runs a command that must end well."""
    ended = running.finish(running.start(command, devices))
    assert ended.status == 0, ended.err[-2000:]
    return ended


def start(members: Members, folder: pathlib.Path) -> subprocess.Popen:
    return running.start(words(members, folder))
