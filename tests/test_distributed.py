"""The whole command in two real processes: the run of one, whatever happens to them."""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml

from pretraining import checkpoint, processes, run_folder
from tests.faults import bench
from tests.running import (
    MESH,
    RECIPE,
    ROOT,
    TIMEOUT,
    finish,
    free_port,
    last_line,
    lines_of,
    running,
    start,
    train,
    training,
    wait_for,
    wait_for_line,
)

STEPS = 60  # many more than pass before a signal is sent and heard

# -------------------------------------------------------------------------------- the whole command

EXAMPLES = """
import json, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from pretraining import config as config_lib, processes, program, sharding, step
from pretraining.data import loader, prepare

recipe, overrides, output, options = json.loads(sys.argv[1])
processes.initialize(False, *options)
config = config_lib.load(recipe)
config.update_from_flattened_dict(overrides)
prepared = prepare.prepare(config)
config = config_lib.resolve_durations(config, program.rows_per_epoch(prepared, config))
built = program.build(config, prepared.vocabulary)
size = config.train.batch_size
places = sharding.local_places(built.mesh, size)
rows = next(loader.train_batches(prepared.train, config, 3, places))
rows = sharding.put_rows(rows, built.mesh, size)
corrupt = lambda rows: step.inputs(built.objective, built.seeds, 3, rows)[0]
everything = jax.jit(lambda rows: (rows, corrupt(rows)))(rows)
leaves = jax.tree_util.tree_leaves_with_path(everything)
named = {
    jax.tree_util.keystr(path): multihost_utils.process_allgather(leaf, tiled=True)
    for path, leaf in leaves if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
}
if jax.process_index() == 0:
    np.savez(output, **named)
"""


def examples(overrides, output, mesh, count):
    """Rows and examples of one batch, as `count` processes with 8 devices in all make them."""
    port = free_port()
    values = overrides | dict(zip(MESH, mesh, strict=True))
    commands = []
    for process in range(count):
        options = [f"127.0.0.1:{port}", str(count), str(process)] if count > 1 else [None] * 3
        arguments = json.dumps([RECIPE, values, str(output), options])
        commands.append([sys.executable, "-c", EXAMPLES, arguments])
    with running(commands, math.prod(mesh) // count) as started:
        for process in started:
            status, _, err = finish(process)
            assert status == 0, err
    return dict(np.load(output))


@pytest.fixture(scope="module")
def overrides(small_overrides, tmp_path_factory):
    """A run of STEPS steps, with heads that eight devices can share."""
    return small_overrides | {
        "data.cache": str(tmp_path_factory.mktemp("cache")),
        "data.copies": 2,
        "objective.mask_rate": 0.15,
        "model.heads": 8,
        "model.dropout": 0.0,
        "model.attention_dropout": 0.0,
        "train.steps": STEPS,
        "model.layers": 1,
        "train.ema": 0.9,
        "checkpoint.every": 5,
        "checkpoint.keep": 20,
        "evaluate.every": 20,
        "log.every": 1,
        "guard.silence": 8.0,
    }


def test_rows_and_masks_are_those_of_one_device(overrides, tmp_path):
    one = examples(overrides, tmp_path / "one.npz", (1, 1, 1), 1)
    assert one["[0].tokens"].shape == (16, 29)
    assert len(one) > 8
    for mesh in ((2, 2, 2), (1, 1, 8)):
        two = examples(overrides, tmp_path / "two.npz", mesh, 2)
        assert two.keys() == one.keys()
        for name, values in one.items():
            np.testing.assert_array_equal(two[name], values, err_msg=name)


def stop_by_signal(folder, overrides, mesh, count, step, told):
    """SIGTERM to process `told` alone, at `step` or after; returns where all stopped."""
    with training(folder, overrides, mesh, count) as started:
        wait_for_line(started, folder, step)
        started[told].send_signal(signal.SIGTERM)
        ends = [finish(process) for process in started]
    assert [status for status, _, _ in ends] == [143] * count, ends
    saved = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, 1).newest()
    assert step <= saved < STEPS
    assert lines_of(folder)[-1]["step"] == saved
    assert all(f"at step {saved};" in out for _, out, _ in ends)
    return saved


@pytest.fixture(scope="module")
def undisturbed(overrides, tmp_path_factory):
    """Two processes, from the first step to the last."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder, overrides, (2, 2, 2), 2)
    return folder


def assert_same_losses(folder, reference):
    """The unigram loss depends on rows and masks alone."""
    found, wanted = lines_of(folder), lines_of(reference)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, expected in zip(found, wanted, strict=True):
        for key in ("train/loss", "eval/loss", "eval/ema/loss"):
            assert (key in line) == (key in expected)
            if key in line:
                np.testing.assert_allclose(line[key], expected[key], rtol=1e-5, err_msg=key)
        unigram = "train/unigram_loss"
        np.testing.assert_allclose(line[unigram], expected[unigram], rtol=1e-6)


@pytest.fixture(scope="module")
def one_device(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    train(folder, overrides, (1, 1, 1), 1)
    return folder


def test_two_processes_train_the_run_of_one(overrides, undisturbed, one_device, tmp_path):
    train(tmp_path / "run", overrides, (2, 2, 2), 1)
    assert_same_losses(tmp_path / "run", one_device)
    assert_same_losses(undisturbed, one_device)
    assert_same_losses(undisturbed, tmp_path / "run")


def test_a_run_goes_on_with_other_processes_on_other_meshes(overrides, one_device, tmp_path):
    """Two processes, one, two: with SIGTERM to a single process in between."""
    folder = tmp_path / "run"
    first = stop_by_signal(folder, overrides, (2, 2, 2), 2, 3, told=1)
    second = stop_by_signal(folder, overrides, (8, 1, 1), 1, first + 2, told=0)
    third = stop_by_signal(folder, overrides, (1, 2, 4), 2, second + 2, told=0)
    train(folder, overrides, (1, 1, 8), 2)
    starts = (folder / run_folder.PROVENANCE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, first, second, third]
    assert [json.loads(line)["processes"] for line in starts] == [2, 1, 2, 2]
    assert_same_losses(folder, one_device)


def test_a_run_that_lost_processes_goes_on_bit_for_bit(overrides, undisturbed, tmp_path):
    folder = tmp_path / "run"
    for victim, number, step in ((1, "KILL", 2), (0, "KILL", 7), (1, "STOP", 12)):
        with training(folder, overrides, (2, 2, 2), 2) as started:
            wait_for_line(started, folder, step)
            started[victim].send_signal(getattr(signal, f"SIG{number}"))
            status, _, err = finish(started[1 - victim])
        assert status == processes.LOST, err
        told = f"process {1 - victim} ends: process {victim} ({platform.node()}) has been silent"
        assert told in last_line(err)
        assert "Traceback" not in err
    train(folder, overrides, (2, 2, 2), 2)
    assert len(bench.untimed(folder)) == STEPS
    assert len(bench.leaves(folder, STEPS)) > 40
    assert bench.differences(folder, undisturbed, STEPS) == []


# ---------------------------------------------------------------------------------------- launching

LAUNCH = ROOT / "experiments" / "launch"


@contextlib.contextmanager
def launched(script, arguments, overrides, **variables):
    """One of the scripts, as a process with four simulated devices for each of its own."""
    options = [f"--config.{key}={value}" for key, value in overrides.items()]
    words = ["bash", str(LAUNCH / script), *arguments, *options]
    process = start(words, 4, PYTHON=sys.executable, **variables)
    try:
        yield process
    finally:
        process.terminate()  # it ends its own processes
        process.communicate(timeout=TIMEOUT)


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)


def test_the_recipe_for_kubernetes_agrees_with_itself():
    content = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    job = content["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
    assert pod["shareProcessNamespace"] is True  # process 1 is deaf to SIGTERM until it handles it
    assert container["command"][:4] == ["python", "-m", "pretraining.train", "--distributed"]


def test_the_laptop_recipe_runs(overrides, tmp_path):
    shared = {key: value for key, value in overrides.items() if key != "train.steps"}
    changes = shared | {"checkpoint.every": 0}
    with launched("laptop.sh", [str(tmp_path / "run")], changes) as process:
        status, _, err = finish(process)
    assert status == 0, err
    starts = (tmp_path / "run" / run_folder.PROVENANCE).read_text().splitlines()
    assert [json.loads(line)["processes"] for line in starts] == [2, 1]
    assert 20 <= json.loads(starts[1])["step"] < 100
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, 101))


def test_the_laptop_recipe_takes_a_new_folder_only(tmp_path):
    with launched("laptop.sh", [str(tmp_path)], {}) as process:
        status, out, err = finish(process)
    assert (status, out) == (2, "")
    assert err == f"error: {tmp_path} is there already; this recipe takes a new folder\n"


def for_hosts(place, hosts, before=""):
    """(arguments, environment) for hosts.sh, with a stand-in for ssh that runs commands here.

    Args:
      before: what that does first.
    """
    ssh, names = place / "ssh", place / "hosts.txt"
    ssh.write_text(f'#!/bin/bash\nshift 2\n{before}\nexec bash -c "$*"\n')
    ssh.chmod(0o755)
    names.write_text("127.0.0.1\n" * hosts)
    arguments = [str(names), f"--config={RECIPE}", f"--workdir={place / 'run'}"]
    return arguments, {"SSH": str(ssh), "PORT": str(free_port())}


def test_the_recipe_for_hosts_stops_before_its_processes_have_begun(overrides, tmp_path):
    """The signal comes while the first ssh is still connecting."""
    slow = f'[[ $* == *exec* ]] && touch "{tmp_path}/connecting" && sleep 1'
    arguments, variables = for_hosts(tmp_path, 2, slow)
    with launched("hosts.sh", arguments, overrides, **variables) as process:
        assert wait_for([process], (tmp_path / "connecting").exists)
        process.send_signal(signal.SIGTERM)
        status, out, err = finish(process)
    assert status == 143, out + err
    assert not lines_of(tmp_path / "run")


def test_the_recipe_for_hosts_stops_and_goes_on(overrides, tmp_path):
    folder = tmp_path / "run"
    for stopped in (True, False):
        arguments, variables = for_hosts(tmp_path, 2)
        with launched("hosts.sh", arguments, overrides, **variables) as process:
            if stopped:
                wait_for_line([process], folder, 3)
                process.send_signal(signal.SIGTERM)
            status, out, err = finish(process)
        assert status == (143 if stopped else 0), out + err
        assert "[0] " in out
        assert "[1] " in out
    assert [line["step"] for line in lines_of(folder)] == list(range(1, STEPS + 1))
