"""Several processes of one run: how they find each other, watch each other and stop together.

JAX runs the same program in every process, and a collective waits for all of them. So a process
that dies or hangs leaves the others waiting, for ever if nobody looks. `Monitor` looks: each
process writes a sign of life into the run folder and reads those of the others (signs.py).

A process that ends because of another one exits with 75 (EX_TEMPFAIL of sysexits.h): run the same
command again.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import hashlib
import os
import pathlib
import platform
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pretraining import cli, signs
from pretraining.errors import UserError

LOST = 75  # exit status of a process that ends because of another one
ARRIVAL_S = 300  # in which all processes have to arrive
SEEN_S = 60  # in which what one host writes has to be seen by the others


def initialize(
    distributed: bool,
    coordinator: str | None,
    process_count: str | None,
    process_index: str | None,
    silence_s: float = 0.0,
) -> None:
    """Joins the other processes of the run, if there are any; before any computation.

    CPU devices talk through gloo, JAX's default.

    Args:
      distributed: recognise SLURM, Open MPI, Kubernetes or a TPU pod.
      coordinator, process_count, process_index: or say it: "host:port" of process 0, and this
        process's place; all three or none.
      silence_s: that of the Monitor, which is to speak before JAX's own heartbeats end the process
        without naming anybody; 0 = JAX's own limit.

    Raises:
      UserError: a wrong option, nothing recognised, or a port that cannot be had.
    """
    explicit = _explicit(coordinator, process_count, process_index)
    if not (distributed or explicit):
        return
    # It would take SIGTERM over before the loop does, and knows nothing of SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    option = f"--coordinator={coordinator}" if explicit else "--distributed"
    if explicit and not explicit["process_id"]:
        _check_port(option, int(coordinator.rpartition(":")[2]))
    late = f"error: {option}: not all processes have come together within {ARRIVAL_S} s"
    with _at_abort(lambda: _exit(late, 2)):
        try:
            jax.distributed.initialize(
                **explicit,
                initialization_timeout=ARRIVAL_S,
                heartbeat_timeout_seconds=int(4 * silence_s) + 60 if silence_s else 100,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{option}: {_why(error, bool(explicit))}") from None


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _explicit(coordinator, process_count, process_index) -> dict[str, Any]:
    """The arguments of jax.distributed.initialize; none where no option is given."""
    options = {
        "coordinator": coordinator,
        "process_count": process_count,
        "process_index": process_index,
    }
    missing = [name for name, value in options.items() if value is None]
    if len(missing) == len(options):
        return {}
    if missing:
        raise UserError(
            f"--{missing[0]} is missing: --coordinator, --process_count and --process_index are "
            "given together or not at all"
        )
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if not port or not 0 < int(port[1]) < 65536:
        raise UserError(f"--coordinator={coordinator!r}: the host and port of process 0, host:port")
    count = cli.number("process_count", process_count, None, at_least=1)
    index = cli.number("process_index", process_index, None)
    if index >= count:
        raise UserError(f"--process_index={index}: below --process_count={count}")
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _check_port(option: str, port: int) -> None:
    """Refuses a port that others use: JAX's service may die of it with a segmentation fault."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f"{option}: process 0 cannot listen there ({os.strerror(error.errno)}): another port?"
        ) from None


def _why(error: Exception, explicit: bool) -> str:
    told = str(error).split("\n")[0]
    if explicit:
        return f"process 0 cannot listen there ({told}): another port?"
    return (
        f"neither SLURM, Open MPI, Kubernetes nor a TPU pod says who takes part ({told}); say it "
        "with --coordinator, --process_count and --process_index"
    )


# --------------------------------------------------------------------------------------- agreement


def agree(decide: Callable[[], int]) -> int:
    """What process 0 decides, on every process; a collective."""
    if jax.process_count() == 1:
        return int(decide())
    from jax.experimental import multihost_utils

    own = int(decide()) if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(own)))


def check_alike(what: str, content: str) -> None:
    """Refuses to go on with processes of which some differ; a collective.

    Args:
      what: that must be the same, in words.
      content: by which it is known.

    Raises:
      UserError: on every process, where `content` is not that of process 0 on all.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8)
    everybody = np.asarray(multihost_utils.process_allgather(own))
    others = np.flatnonzero((everybody != everybody[:1]).any(axis=1)).tolist()
    if others:
        listed = ", ".join(map(str, others))
        raise UserError(f"{what} of process {listed} differs from that of process 0")


# ----------------------------------------------------------------------------------------- monitor


class Monitor:
    """Tells of processes that died or hang, and ends this one with status LOST.

    A context manager around everything that takes part in collectives. Its thread ends the process
    at once, because the main thread may wait in a collective that never finishes. What the runtime
    raises where another process is gone is held back until it is known which; and the others learn
    of an error that ends this one.

    Process 0 watches all others. They watch it and their neighbour, so that a thousand processes
    read a few thousand small files, not a million.

    Args:
      folder: the run folder, shared by all processes.
      silence_s: seconds without a sign of life, or in one short phase behind the others, after
        which a process is reported; longer than any step. 0 = never: signs are only written.
      status: called from another thread; at least `step`, `phase` and `entered`, the number of
        phases entered since the program began, by which it is known who is behind.
    """

    def __init__(
        self, folder: pathlib.Path, silence_s: float, status: Callable[[], Mapping[str, Any]]
    ):
        self._folder, self._silence_s, self._status = folder, silence_s, status
        self._own, self._count = jax.process_index(), jax.process_count()
        self._watching = self._count > 1 and silence_s > 0
        self._beat_s = min(5.0, silence_s / 8) if silence_s else 5.0
        self._start, self._beat = uuid.uuid4().hex, 0
        self._ended: str | None = None
        self._exit_status: int | None = None  # once an error of its own ends this process
        self._untold = ""  # what it still has to say then
        self._suspicious = False
        self._mute = False  # could not write the last sign: nor can the others, perhaps
        self._others_ended, self._stopped = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Monitor":
        (self._folder / signs.FOLDER).mkdir(parents=True, exist_ok=True)
        neighbour = (self._own + 1) % self._count
        watched = range(self._count) if self._own == 0 else (0, self._own, neighbour)
        self._watch = signs.Watch(self._folder, watched)
        if self._watching:
            self._stack.enter_context(_at_abort(self._aborted))
        self._write()
        self._thread.start()
        return self

    def check_shared(self) -> None:
        """Refuses a folder that is not the same one on all hosts; a collective.

        Raises:
          UserError: on every process, where one does not see what process 0 writes.
        """
        if self._count == 1:
            return
        wanted, seen = agree(lambda: int(self._start[:7], 16)), None
        for _ in range(SEEN_S):
            sign = signs.read(self._folder)
            seen = sign and int(sign["start"][:7], 16)
            if seen == wanted:
                break
            time.sleep(1)
        check_alike(f"the folder --workdir={self._folder}", f"{seen == wanted}")

    def __exit__(self, kind, error, trace) -> None:
        self.tell(kind, error, trace)
        if self._watching and error is not None:
            atexit.register(self._leave)
            return
        self._write(ended="")
        if self._watching:
            self._others_ended.wait()  # unless one is lost: then the thread ends this process
        self._stopped.set()
        self._thread.join()
        self._stack.close()

    def tell(self, kind, error, trace) -> None:
        """Tells the others of an error that is on its way out.

        To be pushed on an ExitStack above what may wait for them on the way, as the end of a save
        does: the others will not come. If it waits too long this process ends there.
        """
        if error is None or self._ended is not None:
            return
        if self._watching and isinstance(error, RuntimeError):
            self._suspect()
        self._exit_status = _exit_status(error)
        line = f"{type(error).__name__}: {error}".split("\n")[0]
        self._write(ended=line)
        self._untold = f"error: {line}\n"
        if self._watching:
            late = threading.Timer(2 * self._silence_s, self._leave_now)
            late.daemon = True
            late.start()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._beat_s):
                self._write()
                if self._watching:
                    self._look()
        except BaseException as error:  # nobody would notice that nobody watches
            _exit(f"error: the watch over the other processes failed: {error!r}", 1)

    def _look(self) -> None:
        seen = self._watch.look(most=2 * self._beat_s)
        others = {process: found for process, found in seen.items() if process != self._own}
        if all(found.sign and found.sign["ended"] is not None for found in others.values()):
            self._others_ended.set()
        if self._exit_status is not None or self._mute:
            return
        verdict = signs.find_lost(others, 4 * self._beat_s if self._suspicious else self._silence_s)
        if not verdict and self._own == 0:
            verdict = signs.find_hanging(seen, self._silence_s)
        if verdict:
            self._give_up(verdict)

    def _give_up(self, verdict: str) -> None:
        self._write(verdict=verdict)
        if verdict.startswith((f"process {self._own} ", "all processes")):
            faulthandler.dump_traceback()
        line = f"error: process {self._own} ends: {verdict}; run the same command again to go on"
        _exit(line, LOST)

    def _write(self, ended: str | None = None, verdict: str | None = None) -> None:
        with self._lock:
            self._beat += 1
            self._ended = ended if self._ended is None else self._ended
            sign = {
                **self._status(),
                "host": platform.node(),
                "pid": os.getpid(),
                "time": time.time(),
                "start": self._start,
                "beat": self._beat,
                "ended": self._ended,
                "verdict": verdict,
            }
            try:
                signs.write(self._folder, self._own, sign)
                self._mute = False
            except OSError as error:  # a full disk stops a save, not the steps before it
                print(f"no sign of life could be written: {error}", file=sys.stderr)
                self._mute = True

    def _suspect(self) -> None:
        """Something broke: whoever is silent now has probably done it. Returns if nobody is."""
        self._suspicious = True
        time.sleep(6 * self._beat_s)

    def _aborted(self) -> None:
        if self._exit_status is None:
            self._suspect()
        else:
            self._leave_now()

    def _leave(self) -> None:
        """The end after an error; JAX's own would wait for the others, who never come to it."""
        self._untold = ""  # the command has told of it
        self._others_ended.wait(self._silence_s)  # until they have read why
        self._leave_now()

    def _leave_now(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, self._untold.encode())
        os._exit(self._exit_status)


def _exit_status(error: BaseException) -> int:
    """As `cli.run` and Python give it."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, UserError) else 1


def _exit(line: str, status: int) -> None:
    """Ends the process at once, whatever its other threads wait for."""
    sys.stdout.flush()
    os.write(2, f"{line}\n".encode())
    os._exit(status)


@contextlib.contextmanager
def _at_abort(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` before the process aborts, in the thread that wants to.

    When process 0 is gone, or not all processes arrive, JAX's client calls abort() from C++. The
    callback that it offers instead cannot be written in Python: converting its argument throws.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, before)


# ---------------------------------------------------------------------------------------- stopping


class StopAgreement:
    """Lets every process know, after the same step, that one of them was told to stop.

    Args:
      mesh: all devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def push(self, number: int) -> int:
        """The largest number pushed by any process one call ago; of one process, `number` itself.

        To be called by all processes after the same update, whose result it does not wait for. A
        number is that of a signal, or 0.
        """
        if jax.process_count() == 1:
            return number
        flags = jax.make_array_from_callback(
            (self._flags.num_devices,), self._flags, lambda _: np.array([number], np.int32)
        )
        before, self._pending = self._pending, self._most(flags)
        return 0 if before is None else int(before)
