"""Real processes: how tests start them, and wait for them."""

import contextlib
import math
import os
import pathlib
import socket
import subprocess
import sys
import time

from pretraining import metrics

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 600  # seconds in which whatever does not hang is done
RECIPE = "configs/masked_lm.py:tiny"
MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(devices: int) -> dict:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running(commands, devices=4):
    """The commands as processes, which are gone afterwards, whatever happened."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(words, cwd=ROOT, env=environment(devices), **streams) for words in commands
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


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
    """Until the metrics have come to `step`."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended = [process for process in started if process.poll() is not None]
        assert not ended, ended[0].communicate()[1]
        lines = lines_of(folder)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"there is no line of step {step}")
