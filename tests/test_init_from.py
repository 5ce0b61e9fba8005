"""A new run that starts from a step of another one."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import pretraining
from pretraining import checkpoint, init_from, metrics, program, run_folder
from pretraining import config as config_lib
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def start(command, folder, overrides, objective="masked_lm"):
    recipe = f"configs/{objective}.py:tiny"
    return command("pretraining.train", recipe, overrides, [f"--workdir={folder}"])


def test_longer_rows_keep_every_parameter_and_the_first_positions(
    trained, run_overrides, command, tmp_path
):
    """32 -> 48 positions, at a learning rate of zero: nothing but the new positions is new."""
    overrides = run_overrides | {
        "init_from": f"{trained['masked_lm']}@28",
        "tokenizer.model": trained["masked_lm"] / run_folder.VOCABULARY / "tokenizer.model",
        "data.sequence_length": 48,
        "train.steps": 1,
        "optimizer.warmup": 1,  # so that the rate of the only update is 0
    }
    finish(start(command, tmp_path / "longer", overrides))
    old = pretraining.load(trained["masked_lm"], step=28).params
    new = pretraining.load(tmp_path / "longer").params
    table, longer = (p["encoder"]["embeddings"]["position"].pop("embedding") for p in (old, new))
    assert longer.shape == (48, table.shape[1])
    np.testing.assert_array_equal(longer[:32], table)
    assert np.abs(longer[32:]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_with_its_optimizer_a_branch_goes_on_as_the_run_did(
    trained, run_overrides, command, tmp_path
):
    """Parameters come along either way; moments and their counters only with the optimizer."""
    overrides = run_overrides | {
        "init_from": f"{trained['masked_lm']}@28",
        "optimizer.schedule": "constant",
        "optimizer.warmup": 0,
        "train.steps": 1,
    }
    folders = {}
    for name, optimizer in (("with", True), ("without", False)):
        folders[name] = tmp_path / name
        finish(start(command, folders[name], overrides | {"init_optimizer": optimizer}))
    lines = {name: metrics.read(folder / metrics.FILE)[0] for name, folder in folders.items()}
    assert lines["with"]["train/loss"] == lines["without"]["train/loss"]  # same parameters, rows
    assert lines["with"]["train/learning_rate"] == lines["without"]["train/learning_rate"] > 0
    # 28 updates have shaped the moments that came along; the schedule began anew.
    assert counts(folders["with"]) == {"adam": 29, "schedule": 1}
    assert counts(folders["without"]) == {"adam": 1, "schedule": 1}
    with_, without = (pretraining.load(folder).params for folder in folders.values())
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, with_, without)))


def counts(folder):
    """{"adam", "schedule"}: the counters in the saved optimizer state."""
    config = run_folder.stored_config(folder)
    built = program.build(config, Vocabulary.load(folder / run_folder.VOCABULARY))
    state = checkpoint.Checkpoints(folder / run_folder.CHECKPOINTS, 1).restore(1, built.state)
    counted = lambda node: isinstance(getattr(node, "count", None), jax.Array)
    nodes = filter(counted, jax.tree.leaves(state.optimizer, is_leaf=counted))
    return {"adam" if hasattr(node, "mu") else "schedule": int(node.count) for node in nodes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "nowhere"}, "no run here"),
        ({"init_from": "{run}@3"}, "3"),
        ({"init_from": "{run}", "model.width": 16}, "(32,) there, (16,) here"),
        ({"init_from": "{run}", "tokenizer.size": 298}, "another tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, trained, run_overrides, command, tmp_path):
    changes = {k: str(v).format(run=trained["masked_lm"]) for k, v in changes.items()}
    process = start(command, tmp_path / "new", run_overrides | changes)
    _, err = process.communicate()
    assert process.returncode == 2
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_leaves_are_matched_by_path_and_all_misfits_are_listed():
    old = {"a": np.zeros((2, 3)), "b": np.zeros(4), "gone": np.zeros(1)}
    new = {"a": jnp.zeros((3, 3)), "b": jnp.zeros(4), "more": jnp.zeros(1)}
    with pytest.raises(UserError) as caught:
        init_from.fit(old, new, "run")
    message = str(caught.value)
    for part in ("a: (2, 3) there, (3, 3) here", "gone: (1,) has no place", "more: missing there"):
        assert part in message
    assert "b:" not in message


def test_schedule_counters_restart_and_moments_counters_stay():
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: 1.0))
    params = {"w": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(3):
            _, state = optimizer.update(params, state, params)
    adam, schedule = init_from._restart_schedule(state)
    assert (int(adam.count), int(schedule.count)) == (3, 0)


def test_a_run_keeps_the_step_it_began_from(trained, tmp_path):
    """The source may train on between two starts of the new run."""
    source = trained["masked_lm"]
    config = run_folder.stored_config(source).copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(source)
    assert init_from.pin(config, tmp_path).init_from == f"{source}@40"
    with config.unlocked():
        config.init_from = f"{source}@28"
    (tmp_path / run_folder.CONFIG).write_text(config_lib.to_json(config))
    with config.unlocked():
        config.init_from = str(source)
    assert init_from.pin(config, tmp_path).init_from == f"{source}@28"
    assert init_from.pin(run_folder.stored_config(source), tmp_path).init_from == ""


def test_names_of_steps():
    here = pathlib.Path.cwd()
    assert init_from._parse("runs/a@12") == (here / "runs/a", 12)
    assert init_from._parse("runs/a") == (here / "runs/a", None)
    assert init_from._parse("me@host/a") == (here / "me@host/a", None)


def test_nothing_is_done_without_a_source():
    state = object()
    assert init_from.start(ConfigDict(dict(init_from="")), state, None) is state
