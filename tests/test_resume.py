"""A run that is killed and started again equals the run that was not, bit for bit.

Real processes, with dropout, masking, accumulation and a moving average on.
"""

import json
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from pretraining import checkpoint, metrics, program, run_folder
from pretraining.config import objective_names
from pretraining.data.tokenizer import Vocabulary


def launch(command, objective, folder, overrides):
    recipe = f"configs/{objective}.py:tiny"
    return command("pretraining.train", recipe, overrides, [f"--workdir={folder}"])


def wait_for_step(process, folder: pathlib.Path, step: int) -> None:
    """Returns when a metrics line of `step` is there, or when the process has ended."""
    while process.poll() is None:
        lines = metrics.read(folder / metrics.FILE)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.005)


def untimed(folder):
    """Every value of every line that is not a timing."""
    lines = metrics.read(folder / metrics.FILE)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def starting_steps(folder):
    lines = (folder / run_folder.PROVENANCE).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def state_leaves(folder):
    """Every leaf of the last state: parameters, optimizer, moving average, counters."""
    config = run_folder.stored_config(folder)
    built = program.build(config, Vocabulary.load(folder / run_folder.VOCABULARY))
    checkpoints = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, 1)
    return jax.tree_util.tree_leaves_with_path(jax.device_get(checkpoints.restore(40, built.state)))


def assert_same_run(folder, reference):
    assert untimed(folder) == untimed(reference)
    leaves, expected = state_leaves(folder), state_leaves(reference)
    assert len(leaves) == len(expected) > 50
    for (path, leaf), (_, wanted) in zip(leaves, expected, strict=True):
        assert leaf.dtype == wanted.dtype
        assert leaf.tobytes() == wanted.tobytes(), path


@pytest.mark.parametrize("objective", objective_names())
def test_killed_twice_equals_straight(objective, trained, run_overrides, command, tmp_path):
    folder = tmp_path / "killed"
    for step in (9, 23):
        process = launch(command, objective, folder, run_overrides)
        wait_for_step(process, folder, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = launch(command, objective, folder, run_overrides)
    _, err = process.communicate()
    assert process.returncode == 0, err
    starts = starting_steps(folder)
    assert starts[0] == 0
    assert starts[-1] >= 7, "the last start did not resume"
    assert_same_run(folder, trained[objective])


@pytest.mark.parametrize("objective", ["masked_lm"])
def test_killed_while_preparing_and_while_saving(
    objective, trained, run_overrides, command, tmp_path
):
    """At the first sign of a store, of a first checkpoint, and of one that is not sealed yet."""
    folder, cache = tmp_path / "killed", tmp_path / "cache"
    overrides = run_overrides | {"data.cache": str(cache)}

    def unsealed():
        steps = (folder / run_folder.CHECKPOINTS).glob("[0-9]*")
        return any(not (step / checkpoint.MANIFEST).exists() for step in steps)

    signs = {
        "preparing": lambda: any(cache.glob("stores/*")),
        "first save": lambda: any((folder / run_folder.CHECKPOINTS).glob("*")),
        "not sealed": unsealed,
    }
    for sign in signs.values():
        process = launch(command, objective, folder, overrides)
        while process.poll() is None and not sign():
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = launch(command, objective, folder, overrides)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_same_run(folder, trained[objective])


def test_sigterm_saves_the_step_it_interrupts(trained, run_overrides, command, tmp_path):
    folder = tmp_path / "stopped"
    process = launch(command, "masked_lm", folder, run_overrides)
    wait_for_step(process, folder, 10)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    saved = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, 1).newest()
    assert saved > 10
    assert f"step {saved}" in out
    assert untimed(folder)[-1]["step"] == saved
    process = launch(command, "masked_lm", folder, run_overrides)
    _, err = process.communicate()
    assert process.returncode == 0, err
    starts = starting_steps(folder)
    assert starts == [0, saved]
    assert_same_run(folder, trained["masked_lm"])


@pytest.mark.parametrize(
    "objective, mesh",
    [
        ("causal_lm", (2, 2, 2)),
        ("masked_lm", (8, 1, 1)),
        ("masked_lm", (1, 8, 1)),
        ("permutation_lm", (2, 2, 2)),
        ("span_boundary", (2, 2, 2)),
        ("replaced_token_detection", (2, 2, 2)),
    ],
)
def test_eight_devices_give_the_losses_of_one(objective, mesh, small_overrides, command, tmp_path):
    """unigram_loss depends on rows and masks alone: any other mask would show in it."""
    runs = {}
    for name, (data, fsdp, tensor) in {"one": (1, 1, 1), "eight": mesh}.items():
        overrides = small_overrides | {"train.steps": 20, "log.every": 1, "evaluate.every": 0}
        overrides |= {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        process = command(
            "pretraining.train",
            f"configs/{objective}.py:tiny",
            overrides,
            [f"--workdir={tmp_path / name}"],
            devices=data * fsdp * tensor,
        )
        _, err = process.communicate()
        assert process.returncode == 0, err
        runs[name] = metrics.read(tmp_path / name / metrics.FILE)
    for line, one in zip(runs["eight"], runs["one"], strict=True):
        np.testing.assert_allclose(line["train/loss"], one["train/loss"], rtol=1e-5)
        np.testing.assert_allclose(line["train/unigram_loss"], one["train/unigram_loss"], rtol=1e-6)
    assert len(runs["one"]) == 20
