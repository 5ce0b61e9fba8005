"""Where the runs of a sweep go on: on this machine, under SLURM, or wherever a line is pasted.

A launcher that runs them is a generator. It yields, several times a minute, {name: exit status, or
None while it runs} of all that has begun, and it comes to its end when everything has ended or
`stop()` says so: then it asks the runs to save, and waits until they have.
"""

import collections
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.machine import Share
from pretraining.errors import UserError

NAMES = ("local", "slurm", "print")
_LOCAL_POLL_S, _SLURM_POLL_S = 0.5, 5.0

Snapshot = dict[str, int | None]


class Job(NamedTuple):
    """What one run takes.

    Attributes:
      name: of the run.
      commands: the words of each; one follows when the one before has ended well.
      log: file to which they print.
    """

    name: str
    commands: Sequence[Sequence[str]]
    log: pathlib.Path


def command_line(commands: Sequence[Sequence[str]]) -> str:
    """One line for a shell."""
    return " && ".join(shlex.join(words) for words in commands)


# ---------------------------------------------------------------------------------- this machine


def local(
    jobs: Sequence[Job],
    shares: Sequence[Share],
    environment: Mapping[str, str],
    held: int,
    stop: Callable[[], Any],
) -> Iterator[Snapshot]:
    """As many at once as there are shares.

    Args:
      environment: of the runs.
      held: a file descriptor that they inherit.
      stop: whether to end now.
    """
    waiting, free = collections.deque(jobs), list(shares)
    running: dict[str, _Running] = {}
    ended: Snapshot = {}
    try:
        while running or (waiting and not stop()):
            while waiting and free and not stop():
                job = waiting.popleft()
                running[job.name] = _Running(job, free.pop(0), environment, held)
            if stop():
                for each in running.values():
                    each.end()
            for name, status in [(name, each.poll()) for name, each in running.items()]:
                if status is not None:
                    free.append(running.pop(name).share)
                    ended[name] = status
            yield ended | dict.fromkeys(running)
            if running:
                time.sleep(_LOCAL_POLL_S)
    finally:
        for each in running.values():
            each.end()


def start(
    words: Sequence[str], share: Share, environment: Mapping[str, str], held: int, **files
) -> subprocess.Popen:
    """Starts a command that gets SIGTERM if this process is killed; see `experiments.child`."""
    cores = ",".join(map(str, share.cores))
    wrapper = [sys.executable, "-m", "experiments.child", str(os.getpid()), cores]
    return subprocess.Popen(
        [*wrapper, *words],
        env={**environment, **share.environment},
        pass_fds=(held,),
        process_group=0,  # Ctrl-C reaches it through `stop` alone, and once
        **files,
    )


class _Running:
    """The commands of a job, one after the other."""

    def __init__(self, job: Job, share: Share, environment: Mapping[str, str], held: int):
        self.share = share
        self._job, self._environment, self._held = job, environment, held
        self._left, self._ending = collections.deque(job.commands), False
        self._next()

    def _next(self) -> None:
        words = self._left.popleft()
        with open(self._job.log, "a") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            self._process = start(
                words,
                self.share,
                self._environment,
                self._held,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        status = self._process.poll()
        if status == 0 and self._left and not self._ending:
            self._next()
            return None
        return status

    def end(self) -> None:
        """Asks it once to save and end."""
        if not self._ending:
            self._ending = True
            self._process.send_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------------------ SLURM


def slurm(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    stop: Callable[[], Any],
    cluster: str = "slurm",
) -> Iterator[Snapshot]:
    """One task of a job array for each run, through submitit.

    Args:
      folder: where submitit keeps its files.
      options: of `submitit.AutoExecutor.update_parameters`, such as `slurm_partition`.
      environment: further variables of the tasks.
      stop: whether to cancel them now; SLURM then sends SIGTERM, at which they save.
      cluster: as submitit calls it; "local" = processes of this machine.

    Raises:
      UserError: submitit or SLURM is not installed, or an option is unknown.
    """
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**options)
        with executor.batch():
            tasks = {job.name: executor.submit(_work, job, dict(environment)) for job in jobs}
    except (RuntimeError, NameError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--launcher=slurm: {str(error).splitlines()[0]}") from None
    cancelled = False
    while True:
        if stop() and not cancelled:
            cancelled = True
            for task in tasks.values():
                task.cancel(check=False)
        done = {name for name, task in tasks.items() if task.done()}
        running = {name for name in tasks.keys() - done if tasks[name].state == "RUNNING"}
        yield {name: _status(tasks[name], cancelled) for name in done} | dict.fromkeys(running)
        if len(done) == len(tasks):
            return
        time.sleep(_SLURM_POLL_S if cluster == "slurm" else _LOCAL_POLL_S)


def slurm_options(text: str | None) -> dict[str, Any]:
    """The parameters of "partition=gpu,time=60".

    Raises:
      UserError: it is not of that form.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not (name.isidentifier() and equals and value):
            raise UserError(f"--slurm={text}: expected e.g. --slurm=partition=gpu,time=60")
        options[f"slurm_{name}"] = int(value) if value.isdecimal() else value
    return options


def _submitit():
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--launcher=slurm needs the package submitit: pip install -e '.[slurm]'"
        ) from None
    return submitit


def _work(job: Job, environment: Mapping[str, str]) -> int:
    """What a task does: the commands one after the other; the last exit status."""
    os.environ.update(environment)
    status = 0
    with open(job.log, "a") as log:
        for words in job.commands:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            status = subprocess.call(words, stdout=log, stderr=subprocess.STDOUT)
            if status:
                break
    return status


def _status(task, cancelled: bool) -> int:
    """Its exit status; 1 where the task itself came to nothing (cancelled, timed out)."""
    if cancelled and not task.paths.result_pickle.exists():  # which submitit would wait for
        return 1
    return 1 if task.exception() is not None else task.result()
