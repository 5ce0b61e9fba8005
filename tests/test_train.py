"""What only a whole run shows."""

import json
import os
import pathlib

import numpy as np
import pytest

import pretraining
from pretraining import metrics, run_folder

ROOT = pathlib.Path(__file__).parent.parent


def start(command, folder, overrides, objective="masked_lm", devices=1):
    recipe = f"configs/{objective}.py:tiny"
    return command("pretraining.train", recipe, overrides, [f"--workdir={folder}"], devices)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def test_the_run_folder_tells_what_was_run(trained):
    folder = trained["masked_lm"]
    (provenance,) = [json.loads(x) for x in (folder / "provenance.jsonl").read_text().splitlines()]
    assert {
        "commit",
        "versions",
        "devices",
        "cores",
        "data",
        "command",
        "step",
    } <= provenance.keys()
    assert run_folder.stored_config(folder).optimizer.warmup == 4  # 10 % of 40, resolved
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept == [14, 28, 35, 40]  # the newest three, and every fourteenth


def test_every_line_has_what_a_reader_expects(trained):
    for folder in trained.values():
        lines = metrics.read(folder / metrics.FILE)
        assert [line["step"] for line in lines] == list(range(1, 41))
        for key in ("loss", "accuracy", "gradient_norm", "learning_rate", "unigram_loss"):
            assert all(np.isfinite(line[f"train/{key}"]) for line in lines), key
        for key in ("tokens_per_s", "mfu", "data_wait", "eta_s", "step_s"):
            assert all(line[f"time/{key}"] >= 0 for line in lines), key
        evaluated = [line for line in lines if "eval/loss" in line]
        assert [line["step"] for line in evaluated] == [10, 20, 30, 40]
        for line in evaluated:
            assert {"eval/unigram_loss", "eval/uniform_loss", "eval/ema/loss"} <= line.keys()
    lines = metrics.read(trained["masked_lm"] / metrics.FILE)
    rates = [line["train/knobs/mask_rate"] for line in lines]
    np.testing.assert_allclose(rates, 0.15, rtol=1e-6)


def test_losses_fall(trained):
    for folder in trained.values():
        lines = metrics.read(folder / metrics.FILE)
        assert lines[-1]["eval/loss"] < lines[9]["eval/loss"] < lines[0]["train/loss"]


def test_more_steps_are_allowed_where_no_past_step_changes(small_overrides, command, tmp_path):
    """A constant rate does not depend on the length of the run."""
    overrides = small_overrides | {"optimizer.schedule": "constant", "optimizer.warmup": 3}
    overrides |= {"log.every": 1, "evaluate.every": 0}
    for name, steps in (("extended", 6), ("extended", 12), ("straight", 12)):
        finish(start(command, tmp_path / name, overrides | {"train.steps": steps}))
    extended, straight = (
        [line["train/loss"] for line in metrics.read(tmp_path / name / metrics.FILE)]
        for name in ("extended", "straight")
    )
    assert extended == straight
    assert len(straight) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"data.copies": 2, "objective.mask_rate": 0.2, "objective.unit": "whole_word"},
        {"model.execution": "scanned", "model.remat": "full", "model.document_attention": True},
        {"model.dtype": "bfloat16", "optimizer.name": "muon", "objective.count": "bernoulli"},
        {
            "optimizer.name": "lamb",
            "train.steps": "700 tokens",
            "log.tensorboard": True,
            "log.profile_start": 1,
            "log.profile_steps": 1,
        },
    ],
)
def test_settings_that_change_the_whole_step(changes, small_overrides, command, tmp_path):
    overrides = small_overrides | {"train.steps": 4, "log.every": 1} | changes
    finish(start(command, tmp_path / "run", overrides))
    lines = metrics.read(tmp_path / "run" / metrics.FILE)
    assert lines[-1]["step"] == (2 if "log.tensorboard" in changes else 4)
    assert np.isfinite(lines[-1]["eval/loss"])
    if "log.tensorboard" in changes:
        assert list((tmp_path / "run" / "tensorboard").glob("events*"))
        assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_relative_folders(small_overrides, command, tmp_path, monkeypatch):
    """As a user writes them: --workdir=runs/name, from whichever folder."""
    overrides = small_overrides | {"train.steps": 2}
    workdir = os.path.relpath(tmp_path / "run", ROOT)
    finish(start(command, workdir, overrides))
    monkeypatch.chdir(tmp_path)
    assert pretraining.load("run").step == 2
    again = {"init_from": workdir, "train.steps": 1}
    finish(start(command, os.path.relpath(tmp_path / "next", ROOT), overrides | again))
    assert pretraining.load("next").config.init_from == f"{tmp_path / 'run'}@2"


def test_named_validation_sets_are_logged(small_overrides, small_corpus, command, tmp_path):
    overrides = small_overrides | {
        "train.steps": 2,
        "evaluate.sets": f"(('again', '{small_corpus}'),)",
    }
    finish(start(command, tmp_path / "run", overrides))
    last = metrics.read(tmp_path / "run" / metrics.FILE)[-1]
    assert np.isfinite(last["eval/again/loss"])
    assert last["eval/again/loss"] != last["eval/loss"]


def test_the_benchmark_ends_with_one_json_line(small_overrides, command):
    for tokens in ("random", "corpus"):
        process = command(
            "pretraining.benchmark",
            "configs/causal_lm.py:tiny",
            small_overrides,
            ["--steps=3", f"--tokens={tokens}"],
        )
        out, _ = finish(process)
        figures = json.loads(out.strip().splitlines()[-1])
        expected = {"tokens_per_s", "step_s", "mfu", "flops_per_step", "data_wait"}
        expected |= {"peak_memory_bytes", "compile_s", "parameters"}
        assert expected <= figures.keys()
        assert figures["tokens_per_s"] == pytest.approx(16 * 29 / figures["step_s"])
        assert figures["mfu"] == pytest.approx(
            figures["flops_per_step"] / figures["step_s"] / figures["peak_flops"]
        )
