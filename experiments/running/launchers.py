"""Where the runs of a sweep go on: on this machine, or wherever a line is pasted.

A launcher that runs them is a generator. It yields, several times a minute, {name: exit status, or
None while it runs} of all that has begun, and it comes to its end when everything has ended or
`stop()` says so: then it asks the runs to save, and waits until they have. That of SLURM is in
slurm.py.
"""

import collections
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.running.machine import Share

NAMES = ("local", "slurm", "print")
_POLL_S = 0.5

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
    jobs: Sequence[Job], shares: Sequence[Share], held: int, stop: Callable[[], Any]
) -> Iterator[Snapshot]:
    """As many at once as there are shares.

    Args:
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
                running[job.name] = _Running(job, free.pop(0), held)
            if stop():
                for each in running.values():
                    each.end()
            for name, status in [(name, each.poll()) for name, each in running.items()]:
                if status is not None:
                    free.append(running.pop(name).share)
                    ended[name] = status
            yield ended | dict.fromkeys(running)
            if running:
                time.sleep(_POLL_S)
    finally:
        for each in running.values():
            each.end()


def start(words: Sequence[str], share: Share, held: int, **files) -> subprocess.Popen:
    """Starts a command that gets SIGTERM if this process is killed; see child.py."""
    cores = ",".join(map(str, share.cores))
    wrapper = [sys.executable, "-m", "experiments.running.child", str(os.getpid()), cores]
    return subprocess.Popen(
        [*wrapper, *words],
        env={**os.environ, **share.environment},
        pass_fds=(held,),
        process_group=0,  # Ctrl-C reaches it through `stop` alone, and once
        **files,
    )


class _Running:
    """The commands of a job, one after the other."""

    def __init__(self, job: Job, share: Share, held: int):
        self.share = share
        self._job, self._held = job, held
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
