"""Where runs go on: shares of a machine, SLURM (submitit's own stand-in for it)."""

import itertools
import os
import shlex
import signal
import sys

import pytest

from experiments.running import launchers, machine, slurm
from experiments.running.launchers import Job
from pretraining.errors import UserError
from tests import running


def job(tmp_path, name, *codes):
    commands = [[sys.executable, "-c", code] for code in codes]
    return Job(name, commands, tmp_path / f"{name}.log")


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5}, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.parametrize(
    "jobs, wanted",
    [
        (None, [(0, 1, 2, 4, 5)]),
        (2, [(0, 1), (2, 4)]),
        (5, [(0,), (1,), (2,), (4,), (5,)]),
    ],
)
def test_every_run_gets_as_many_cores(cores, jobs, wanted):
    assert machine.shares(jobs) == [machine.Share(each, {}) for each in wanted]


def test_more_runs_than_cores_are_refused(cores):
    with pytest.raises(UserError, match="--jobs=6: this machine has 5 cores"):
        machine.shares(6)


@pytest.mark.parametrize(
    "visible, jobs, wanted",
    [
        ("3,7", None, [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "7"}]),
        ("3,7", 1, [{"CUDA_VISIBLE_DEVICES": "3,7"}]),
        ("0,1,2,3,4", 2, [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]),
        (
            "3,7",
            3,
            [
                {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
                for gpu in ("3", "7", "3")
            ],
        ),
        ("", 2, [{}, {}]),
        ("-1", None, [{}]),
    ],
)
def test_gpus_are_shared_out(cores, monkeypatch, visible, jobs, wanted):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [share.environment for share in machine.shares(jobs)] == wanted


def test_without_the_variable_nvidia_smi_counts(cores, monkeypatch, tmp_path):
    listing = "GPU 0: NVIDIA X (UUID: GPU-a)\n  MIG 1g Device 0: (UUID: MIG-b)\nGPU 1: NVIDIA X\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf {shlex.quote(listing)}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shown = [share.environment["CUDA_VISIBLE_DEVICES"] for share in machine.shares(None)]
    assert shown == ["0", "1"]


def test_commands_follow_each_other_until_one_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("OWN", "own")
    two = "import os; print('two', *map(os.getenv, ('WHICH', 'OWN')))"
    jobs = [
        job(tmp_path, "good", "print('one')", two),
        job(tmp_path, "bad", "import sys; sys.exit(3)", "print('never')"),
    ]
    shares = [machine.Share((), {"WHICH": "first"})]
    with open(tmp_path / "held", "w") as held:
        *_, last = launchers.local(jobs, shares, held.fileno(), lambda: False)
    assert last == {"good": 0, "bad": 3}
    first, one, second, two = (tmp_path / "good.log").read_text().splitlines()
    assert (first[:2], one, second[:2], two) == ("$ ", "one", "$ ", "two first own")
    assert "\nnever\n" not in (tmp_path / "bad.log").read_text()


def test_command_lines_survive_a_shell():
    words = [["python", "--config.data.corpus=wiki/*.jsonl; rm 'x'"], ["echo", "$HOME"]]
    line = launchers.command_line(words)
    assert line == """python '--config.data.corpus=wiki/*.jsonl; rm '"'"'x'"'"'' && echo '$HOME'"""


# ------------------------------------------------------------------------------------------- SLURM


def run(tmp_path, jobs, stop=lambda: False, **options):
    files = tmp_path / "submitit"
    yield from slurm.slurm(jobs, files, options, stop, cluster="local")


def test_slurm_runs_every_job_as_a_task(tmp_path):
    pytest.importorskip("submitit")
    jobs = [
        job(tmp_path, "good", "print('one')", "print('then')"),
        job(tmp_path, "bad", "import sys; sys.exit(3)", "print('never')"),
    ]
    *_, last = run(tmp_path, jobs, timeout_min=5)
    assert last == {"good": 0, "bad": 3}
    assert "\none\n" in (tmp_path / "good.log").read_text()
    assert "\nthen\n" in (tmp_path / "good.log").read_text()
    assert "\nnever\n" not in (tmp_path / "bad.log").read_text()


@pytest.fixture
def interruptible():
    """In the background of a shell SIGINT is ignored, and so it is in the processes that tests
    start; submitit cancels its local tasks with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_slurm_tasks_are_cancelled(tmp_path):
    pytest.importorskip("submitit")
    began = tmp_path / "began"
    code = f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); time.sleep(600)"
    snapshots = list(run(tmp_path, [job(tmp_path, "long", code)], began.exists, timeout_min=5))
    assert {"long": None} in snapshots
    assert snapshots[-1] == {"long": 1}


def test_without_submitit_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(
        UserError, match=r"needs the package submitit: pip install -e '\.\[slurm\]'"
    ):
        next(run(tmp_path, []))


def test_without_slurm_it_is_told(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match="--launcher=slurm: "):
        next(slurm.slurm([job(tmp_path, "a", "")], tmp_path, {}, lambda: False))


def test_slurm_options():
    assert slurm.parse_options("partition=gpu,time=60") == {
        "slurm_partition": "gpu",
        "slurm_time": 60,
        "slurm_signal_delay_s": 300,
    }
    assert slurm.parse_options("time=60,signal_delay_s=9")["slurm_signal_delay_s"] == 9
    for missing in (None, "partition=gpu", "time=1-00:00"):
        with pytest.raises(UserError, match="the minutes of a task are missing, time=60"):
            slurm.parse_options(missing)


SAVES = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
with open(folder / "starts", "a") as file:
    print(os.getppid(), file=file)
while not (folder / "saved").exists() and not (folder / "release").exists():
    time.sleep(0.05)
"""


def saving(tmp_path):
    words = [sys.executable, "-c", SAVES, str(tmp_path), "--workdir=runs/a", "--workdir=runs/b"]
    return Job("long", [words], tmp_path / "long.log")


def begun(tmp_path):
    """The process of submitit, for each start."""
    file = tmp_path / "starts"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_task_whose_time_is_up_saves_and_goes_on(tmp_path):
    """submitit's stand-in of SLURM starts the task again, as SLURM does."""
    submitit = pytest.importorskip("submitit")
    tasks = submitit.AutoExecutor(tmp_path / "submitit", "local", slurm_max_num_timeout=3)
    tasks.update_parameters(timeout_min=60)
    task = tasks.submit(slurm.Work(saving(tmp_path)))
    assert running.wait_for([], lambda: begun(tmp_path))
    os.kill(begun(tmp_path)[0], signal.SIGUSR2)
    assert task.result() == 0
    assert (tmp_path / "saved").exists()
    assert len(begun(tmp_path)) == 2


def start_elsewhere(tmp_path, monkeypatch, work, state):
    """(snapshots of a task, numbers of those cancelled), as another process finds it."""
    submitit, cancelled = pytest.importorskip("submitit"), []
    first = run(tmp_path, [work], timeout_min=5)
    next(first)
    assert running.wait_for([], lambda: begun(tmp_path))

    class Elsewhere(submitit.LocalJob):  # a task of SLURM is known by its number alone
        def done(self, force_check=False):
            if cancelled:  # it saves no sooner than somebody waits for it
                (tmp_path / "release").touch()
            return self.paths.result_pickle.exists()

        def cancel(self, check=True):
            cancelled.append(self.job_id)

    Elsewhere.state = state
    monkeypatch.setattr(submitit, "LocalJob", Elsewhere)
    return first, cancelled


def test_the_tasks_of_a_start_that_was_killed_are_taken_over(tmp_path, monkeypatch):
    """A command that the task has given already need not be asked for again."""
    with_more = saving(tmp_path)._replace(commands=[["true"], *saving(tmp_path).commands])
    first, _ = start_elsewhere(tmp_path, monkeypatch, with_more, "RUNNING")
    snapshots = []
    for snapshot in run(tmp_path, [saving(tmp_path)], timeout_min=5):
        (tmp_path / "release").touch()
        snapshots.append(snapshot)
    assert (snapshots[0], snapshots[-1]) == ({"long": None}, {"long": 0})
    assert len(begun(tmp_path)) == 1
    assert list(first)[-1] == {"long": 0}
    *_, last = run(tmp_path, [saving(tmp_path)], timeout_min=5)  # it has ended: a new task
    assert last == {"long": 0}
    assert len(begun(tmp_path)) == 2


def test_a_task_that_does_something_else_is_cancelled_and_waited_for(tmp_path, monkeypatch):
    first, cancelled = start_elsewhere(tmp_path, monkeypatch, saving(tmp_path), "RUNNING")
    more = job(tmp_path, "long", f"import sys; sys.exit(not {results(tmp_path)})")
    *_, last = itertools.islice(run(tmp_path, [more], timeout_min=5), 30)
    (tmp_path / "release").touch()
    assert last == {"long": 0}
    assert list(first)[-1] == {"long": 0}
    assert len(cancelled) == 1


def test_a_task_that_is_called_otherwise_now_is_taken_over(tmp_path, monkeypatch):
    first, cancelled = start_elsewhere(tmp_path, monkeypatch, saving(tmp_path), "RUNNING")
    renamed = saving(tmp_path)._replace(name="renamed")
    for _ in range(2):  # a task has two names then
        assert next(run(tmp_path, [renamed], timeout_min=5)) == {"renamed": None}
    (tmp_path / "release").touch()
    assert list(first)[-1] == {"long": 0}
    assert (cancelled, len(begun(tmp_path))) == ([], 1)


def test_a_task_that_trains_one_of_the_runs_is_cancelled(tmp_path, monkeypatch):
    """A population of which a member has left: what goes on is called otherwise, and is less."""
    first, cancelled = start_elsewhere(tmp_path, monkeypatch, saving(tmp_path), "RUNNING")
    for name, wanted in (("c", 0), ("b", 1)):
        one = Job(name, [["true", f"--workdir=runs/{name}"]], tmp_path / f"{name}.log")
        *_, last = itertools.islice(run(tmp_path, [one], timeout_min=5), 30)
        assert (last, len(cancelled)) == ({name: 0}, wanted)
    assert list(first)[-1] == {"long": 0}


def test_a_task_that_slurm_does_not_know_is_queued_again(tmp_path, monkeypatch):
    first, cancelled = start_elsewhere(tmp_path, monkeypatch, saving(tmp_path), "UNKNOWN")
    *_, last = itertools.islice(run(tmp_path, [saving(tmp_path)], timeout_min=5), 30)
    assert last == {"long": 0}
    assert (len(cancelled), len(begun(tmp_path))) == (1, 2)
    assert list(first)[-1] == {"long": 0}


def results(tmp_path):
    """An expression: the files in which tasks that have ended left their results."""
    return f"list(__import__('pathlib').Path({str(tmp_path)!r}).glob('submitit/*_result.pkl'))"
