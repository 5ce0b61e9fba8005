"""The runs of a sweep as tasks of SLURM, through submitit."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.running.launchers import Job, Snapshot
from pretraining.errors import UserError
from pretraining.files import write_atomically

TASKS = "tasks.json"  # {name of a job: {"id": number, "commands"}}, of the newest task
_POLL_S = {"slurm": 5.0, "local": 0.5}
_SAVING_S = 300  # between the signal before the end of a task's time and that end
_STARTS = 1000  # of a task that has come to the end of its time


def slurm(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    options: Mapping[str, Any],
    stop: Callable[[], Any],
    cluster: str = "slurm",
) -> Iterator[Snapshot]:
    """One task of a job array for each run; a launcher as described in launchers.py.

    A task that is preempted, or comes to the end of its time, saves and is queued again. Where an
    earlier start was killed, its tasks are taken over if they do what is asked for now.

    Args:
      folder: where submitit keeps its files.
      options: of `submitit.AutoExecutor.update_parameters`, such as `slurm_partition`.
      stop: whether to cancel them now; SLURM then sends SIGTERM, at which they save.
      cluster: as submitit calls it; "local" = processes of this machine.

    Raises:
      UserError: submitit or SLURM is not installed, or an option is unknown.
    """
    tasks = _attach(jobs, folder, cluster)
    tasks |= _submit([j for j in jobs if j.name not in tasks], folder, options, cluster)
    now = {j.name: {"id": tasks[j.name].job_id, "commands": _words(j)} for j in jobs}
    write_atomically(folder / TASKS, json.dumps(_known(folder) | now))
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
        time.sleep(_POLL_S[cluster])


def parse_options(text: str | None) -> dict[str, Any]:
    """The parameters of "partition=gpu,time=60".

    Raises:
      UserError: it is not of that form, or has no time, without which submitit takes 5 minutes.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not (name.isidentifier() and equals and value):
            raise UserError(f"--slurm={text}: expected e.g. --slurm=partition=gpu,time=60")
        found[f"slurm_{name}"] = int(value) if value.isdecimal() else value
    if not isinstance(found.get("slurm_time"), int):
        raise UserError(f"--slurm={text or ''}: the minutes of a task are missing, time=60")
    return {"slurm_signal_delay_s": _SAVING_S, **found}


class Work:
    """What a task does: the commands one after the other.

    A command gets SIGTERM, at which it saves, when submitit is told that the time is up.
    """

    def __init__(self, job: Job):
        self._job = job
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """The last exit status."""
        status = 0
        with open(self._job.log, "a") as log:
            for words in self._job.commands:
                log.write(f"$ {shlex.join(words)}\n")
                log.flush()
                status = self._wait(words, log)
                if status:
                    break
        return status

    def checkpoint(self):
        """Called by submitit in its signal handler: saves; what is queued for the next time."""
        self._end()
        return _submitit().helpers.DelayedSubmission(Work(self._job))

    def _wait(self, words: Sequence[str], log) -> int:
        self._process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_ignore_warnings,
        )
        try:
            # Not `wait`: it holds a lock, and what happens in the signal handler must not need it.
            while (status := self._process.poll()) is None:
                time.sleep(0.2)
        finally:
            self._end()
        return status

    def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # `poll` was faster
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def _ignore_warnings() -> None:
    """SLURM sends the signal that announces the end to all processes of a task."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _known(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    path = folder / TASKS
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        return {
            name: {key: task[key] for key in ("id", "commands")} for name, task in known.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; without it, tasks are queued anew") from None


def _words(job: Job) -> list[list[str]]:
    return [list(words) for words in job.commands]


def _attach(jobs: Sequence[Job], folder: pathlib.Path, cluster: str) -> dict[str, Any]:
    """The tasks of an earlier start that have not ended and end with the commands of their job.

    Any other that writes to the folder of a run of these jobs, and has not ended, is cancelled and
    waited for. What a task was called says little: a population is called after its members.
    """
    submitit, known = _submitit(), _known(folder)
    kind = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
    touching = {
        task["id"]: (kind(folder, task["id"]), task["commands"])
        for name, task in known.items()
        if any(name == j.name or _folders(task["commands"]) & _folders(j.commands) for j in jobs)
    }
    kept = {
        j.name: task
        for task, commands in touching.values()
        for j in jobs
        if _ends_with(commands, j) and _goes_on(task)
    }
    own = {task.job_id for task in kept.values()}
    # One that SLURM does not know is cancelled as well: it may not know it yet.
    others = [task for number, (task, _) in touching.items() if number not in own]
    others = [task for task in others if not task.done()]
    for task in others:
        task.cancel(check=False)
    while any(map(_goes_on, others)):
        time.sleep(_POLL_S[cluster])
    return kept


def _folders(commands: Sequence[Sequence[str]]) -> set[str]:
    """The run folders that they write to."""
    return {word for words in commands for word in words if word.startswith("--workdir=")}


def _goes_on(task) -> bool:
    """False as well where SLURM has forgotten the task, or never knew it."""
    return not task.done(force_check=True) and task.state != "UNKNOWN"


def _ends_with(commands: Sequence[Sequence[str]], job: Job) -> bool:
    """Commands that are no longer left, because a task has given them, may stand before."""
    return commands[-len(job.commands) :] == _words(job)


def _submit(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    options: Mapping[str, Any],
    cluster: str,
) -> dict[str, Any]:
    if not jobs:
        return {}
    try:
        executor = _submitit().AutoExecutor(
            folder=folder, cluster=cluster, slurm_max_num_timeout=_STARTS
        )
        executor.update_parameters(**options)
        with executor.batch():
            return {job.name: executor.submit(Work(job)) for job in jobs}
    except (RuntimeError, NameError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--launcher=slurm: {str(error).splitlines()[0]}") from None


def _submitit():
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--launcher=slurm needs the package submitit: pip install -e '.[slurm]'"
        ) from None
    return submitit


def _status(task, cancelled: bool) -> int:
    """Its exit status; 1 where the task itself came to nothing (cancelled, timed out)."""
    if cancelled and not task.paths.result_pickle.exists():  # which submitit would wait for
        return 1
    return 1 if task.exception() is not None else task.result()
