"""Real processes: how tests start them, and wait for them."""

import contextlib
import math
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pretraining import metrics

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 600  # seconds in which whatever does not hang is done
RECIPE = "configs/masked_lm.py:tiny"
MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")


def start(words: Sequence[str], devices: int = 1, **variables: str | None) -> subprocess.Popen:
    """Starts a command in the root of the repository, with pipes.

    Args:
      words: of the command.
      devices: simulated ones.
      variables: further ones of its environment; None removes one.
    """
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=_environment(devices, variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _environment(devices: int, variables: dict[str, str | None]) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    usual = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
    everything = os.environ | usual | variables
    return {name: value for name, value in everything.items() if value is not None}


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str

    def problem(self, status: int = 0) -> str | None:
        """What is wrong if it should have ended with `status`; None = nothing."""
        if self.status == status:
            return None
        return f"exit {self.status} instead of {status}: {self.err.strip()[-2000:]}"


def finish(process: subprocess.Popen, timeout_s: float = TIMEOUT) -> Ended:
    """Waits for the end; a process that hangs is killed, and has the status of that."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return Ended(process.returncode, out, err)


def wait_for(started: Sequence[subprocess.Popen], sign: Callable[[], bool]) -> bool:
    """Whether the sign came while all of them ran."""
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until and all(process.poll() is None for process in started):
        if sign():
            return True
        time.sleep(0.002)
    return False


@contextlib.contextmanager
def running(commands, devices=4):
    """The commands as processes, which are gone afterwards, whatever happened."""
    started = [start(words, devices) for words in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------- training


def free_port() -> int:
    """A port that nobody listens on, drawn below those that systems give to whoever asks for any.

    So nothing else takes it before process 0 does; two tests at once draw the same one of 12,000
    hardly ever.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port))
            return port
    raise RuntimeError("100 ports drawn at random are all in use")


def commands_of(folder, overrides, mesh, count):
    values = overrides | dict(zip(MESH, mesh, strict=True))
    words = [sys.executable, "-m", "pretraining.train", f"--config={RECIPE}"]
    words += [f"--config.{key}={value}" for key, value in values.items()]
    words += [f"--workdir={folder}"]
    if count == 1:
        return [words]
    words += [f"--coordinator=127.0.0.1:{free_port()}", f"--process_count={count}"]
    return [[*words, f"--process_index={process}"] for process in range(count)]


def training(folder, overrides, mesh, count):
    """The command in `count` processes, whose devices make up the mesh."""
    return running(commands_of(folder, overrides, mesh, count), math.prod(mesh) // count)


def train(folder, overrides, mesh, count):
    with training(folder, overrides, mesh, count) as started:
        for process in started:
            status, _, err = finish(process)
            assert status == 0, err


def lines_of(folder):
    return metrics.read(folder / metrics.FILE)


def wait_for_line(started, folder, step: int) -> None:
    """Until the metrics have come to `step`; an error if that does not happen."""
    came = wait_for(started, lambda: last_step(folder) >= step)
    ended = [process.communicate() for process in started if process.poll() is not None]
    assert came, ended or f"there is no line of step {step}"


def last_step(folder: pathlib.Path) -> int:
    """Of the last metrics line; 0 = there is none."""
    lines = lines_of(folder)
    return lines[-1]["step"] if lines else 0
