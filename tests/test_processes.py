"""Two real processes and a small program: how they find, watch and stop each other."""

import os
import platform
import signal
import socket
import sys
import time

import jax
import pytest

from pretraining import processes, signs
from pretraining.errors import UserError
from tests.running import TIMEOUT, finish, free_port, last_line, running

# Steps whose collective waits for all processes; `task` says what is out of the ordinary.
PROGRAM = """
import contextlib, pathlib, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pretraining import processes
from pretraining.errors import UserError

port, process, folder, silence, task = sys.argv[1:]
processes.initialize(False, f"127.0.0.1:{port}", "2", process, float(silence))
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = NamedSharding(mesh, PartitionSpec(("data", "tensor")))
update = jax.jit(lambda x: x + 1e-9 * jnp.sum(x), out_shardings=place, donate_argnums=0)
status = {"step": 0, "phase": "step", "entered": 0}
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))

def stand():
    time.sleep(1000)

def steps():
    x = jax.make_array_from_callback((8,), place, lambda index: np.ones(8, np.float32)[index])
    agreement, before = processes.StopAgreement(mesh), x
    for step in range(20 if task == "end" else 100_000):
        status.update(step=step, phase="data_wait", entered=2 * step)
        if step == 5 and (task == "stand" or (task, process) == ("hang", "1")):
            stand()
        if step == 5 and task in ("mistake", "blocked") and process == "1":
            raise UserError("the store is damaged")
        if step == 5 and (task, process) == ("memory", "1"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        status.update(phase="step", entered=2 * step + 1)
        x = update(x)
        stop = agreement.push(received[0] if received else 0)
        if stop:
            print("stopped", step, stop)
            return
        if task != "stop":
            x.block_until_ready()
            time.sleep(0.02)

try:
    watch = processes.Monitor(pathlib.Path(folder), float(silence), lambda: dict(status))
    with watch as monitor, contextlib.ExitStack() as stack:
        if (task, process) == ("blocked", "1"):
            stack.callback(time.sleep, 1000)  # as a save whose end the others would have to reach
            stack.push(monitor.tell)
        steps()
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def pair(folder, task, silence=4.0):
    port = free_port()
    rest = [str(folder), str(silence), task]
    return running([[sys.executable, "-c", PROGRAM, str(port), p, *rest] for p in ("0", "1")])


def wait_until_step(folder, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        found = [signs.read(folder, process) for process in (0, 1)]
        if all(found) and min(sign["step"] for sign in found) >= step:
            return
        time.sleep(0.05)
    raise AssertionError("the processes did not get to work")


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "options, named",
    [
        (("host:1", "2", None), "--process_index is missing"),
        ((None, "2", "0"), "--coordinator is missing"),
        (("host", "2", "0"), "--coordinator='host'"),
        (("host:99999", "2", "0"), "--coordinator='host:99999'"),
        (("host:1", "0", "0"), "--process_count='0'"),
        (("host:1", "two", "0"), "--process_count='two'"),
        (("host:1", "2", "-1"), "--process_index='-1'"),
        (("host:1", "2", "2"), "--process_index=2"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(UserError) as error:
        processes.initialize(False, *options)
    assert named in str(error.value)


def initialize_alone(options: str, before: str = ""):
    words = [sys.executable, "-c"]
    source = (
        f"from pretraining import processes\n{before}\n"
        "from pretraining.errors import UserError\n"
        f"try: processes.initialize({options})\n"
        "except UserError as error: raise SystemExit(f'error: {error}')"
    )
    with running([[*words, source]]) as (process,):
        return finish(process)


def test_nothing_to_recognise_is_one_line():
    status, _, err = initialize_alone("True, None, None, None")
    assert status == 1
    assert "Traceback" not in err
    assert last_line(err).startswith("error: --distributed: neither SLURM")


def test_a_port_in_use_is_one_line():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        status, _, err = initialize_alone(f"False, 'localhost:{port}', '2', '0'")
    assert status == 1
    assert "Traceback" not in err
    assert last_line(err).startswith(f"error: --coordinator=localhost:{port}: process 0 cannot")


@pytest.mark.parametrize("process", ["0", "1"])
def test_who_waits_in_vain_for_the_others_says_so(process):
    port = free_port()
    options = f"False, '127.0.0.1:{port}', '2', '{process}'"
    status, _, err = initialize_alone(options, "processes.ARRIVAL_S = 2")
    assert status == 2
    assert last_line(err) == (
        f"error: --coordinator=127.0.0.1:{port}: not all processes have come together within 2 s"
    )


def test_one_process_only_writes(tmp_path):
    status = {"step": 3, "phase": "save", "entered": 4, "totals": {"step": 1.5}}
    with processes.Monitor(tmp_path, 0.08, lambda: status):
        first = signs.read(tmp_path)
        deadline = time.monotonic() + TIMEOUT
        while signs.read(tmp_path)["beat"] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    last = signs.read(tmp_path)
    assert status.items() <= first.items()
    assert (first["beat"], first["ended"], first["pid"]) == (1, None, os.getpid())
    assert first["host"] == platform.node()
    assert last["beat"] > 4
    assert last["ended"] == ""
    assert os.listdir(tmp_path / signs.FOLDER) == ["0.json"]


# ------------------------------------------------------------------------------- two real processes


@pytest.mark.parametrize("victim, number", [(1, "KILL"), (0, "KILL"), (1, "STOP"), (0, "STOP")])
def test_a_process_that_is_gone_is_named(victim, number, tmp_path):
    with pair(tmp_path, "run") as started:
        wait_until_step(tmp_path, 5)
        started[victim].send_signal(getattr(signal, f"SIG{number}"))
        status, _, err = finish(started[1 - victim])
    assert status == processes.LOST, err
    line = last_line(err)
    assert line.startswith(
        f"error: process {1 - victim} ends: process {victim} ({platform.node()}) has been silent"
    )
    assert " at step " in line
    assert "Traceback" not in err


def test_a_process_that_hangs_is_named_and_shows_where(tmp_path):
    with pair(tmp_path, "hang") as started:
        (status, _, err), (hanging, _, own) = (finish(process) for process in started)
    assert status == hanging == processes.LOST
    told = f"process 1 ({platform.node()}) hangs: for "
    assert told in last_line(err)
    assert "at step 5 in phase data_wait" in last_line(err)
    assert told in last_line(own)
    assert "in stand" in own
    assert "in stand" not in err


def test_where_all_stand_the_place_is_told(tmp_path):
    with pair(tmp_path, "stand") as started:
        ends = [finish(process) for process in started]
    for status, _, err in ends:
        assert status == processes.LOST
        assert "all processes have stood for " in last_line(err)
        assert "at step 5 in phase data_wait" in last_line(err)
        assert "in stand" in err


@pytest.mark.parametrize(
    "task, status, told",
    [
        ("mistake", 2, "UserError: the store is damaged"),
        ("blocked", 2, "UserError: the store is damaged"),
        ("memory", 1, "RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_an_error_in_one_process_is_told_by_the_other(task, status, told, tmp_path):
    with pair(tmp_path, task) as started:
        (lost, _, err), (own, _, own_err) = (finish(process) for process in started)
    assert lost == processes.LOST
    assert f"process 1 ({platform.node()}) ended at step 5 in phase data_wait: " in last_line(err)
    assert told in last_line(err)
    assert own == status
    assert told.split(": ")[1] in own_err


def test_processes_that_come_to_the_end_end_well(tmp_path):
    with pair(tmp_path, "end") as started:
        ends = [finish(process) for process in started]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert all("error" not in err for _, _, err in ends)


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_stops_both_after_the_same_step(told, tmp_path):
    """The steps follow each other without waiting, so that many collectives are in flight."""
    with pair(tmp_path, "stop") as started:
        wait_until_step(tmp_path, 50)
        started[told].send_signal(signal.SIGTERM)
        ends = [finish(process) for process in started]
    assert [status for status, _, _ in ends] == [0, 0], ends
    line, other = (last_line(out) for _, out, _ in ends)
    assert line == other
    word, step, number = line.split()
    assert (word, int(number)) == ("stopped", signal.SIGTERM)
    assert int(step) >= 50


def test_one_process_agrees_with_itself_at_once():
    agreement = processes.StopAgreement(jax.make_mesh((8,), ("all",)))
    assert [agreement.push(number) for number in (0, 15, 2)] == [0, 15, 2]
