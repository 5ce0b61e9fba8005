"""What is read from run folders, against folders written by hand."""

import json
import math

import numpy as np
import pytest

from experiments import results
from pretraining import config as config_lib
from pretraining import flops, run_folder
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError
from tests.experiments.synthetic import write_run


@pytest.fixture
def sweep(tmp_path):
    """Two variants of two seeds; the second of them ended early, and one has no yardstick."""
    runs = tmp_path / "runs"
    for seed in (0, 1):
        seeds = {"seed.init": seed}
        figures = {"blimp/accuracy": 0.5 + seed / 10}
        write_run(runs / f"low-seed{seed}", {200: 6.0, 400: 5.0 + seed}, seeds, figures=figures)
    high = {"objective.mask_rate": 0.4, "data.copies": 2}
    write_run(runs / "high-seed0", {200: 5.5, 400: 4.0}, high, step_flops=3e9)
    write_run(runs / "high-seed1", {200: None}, high | {"seed.init": 1}, step_flops=3e9)
    return tmp_path


def test_frame(sweep):
    frame = results.frame(sweep)
    assert list(frame.index) == ["high-seed0", "high-seed1", "low-seed0", "low-seed1"]
    assert list(frame.variant) == ["high", "high", "low", "low"]
    assert list(frame.seed) == [0, 1, 0, 1]
    assert list(frame.family) == ["", "", "masked", "masked"]
    assert list(frame["objective.mask_rate"]) == [0.4, 0.4, 0.15, 0.15]
    assert "seed.init" not in frame
    assert "train.steps" not in frame  # alike in all
    assert list(frame.step) == [400, 200, 400, 400]
    # 10 rows of 103 - 3 tokens a step
    assert list(frame.tokens) == [400_000, 200_000, 400_000, 400_000]
    assert list(frame.distinct_tokens) == [200_000, 100_000, 400_000, 400_000]
    np.testing.assert_allclose(frame.flops, [1.2e12, 0.6e12, 0.8e12, 0.8e12])
    # .5 + .25 s a step; another .25 between starts do not count
    assert list(frame.seconds) == [300, 150, 300, 300]
    np.testing.assert_allclose(frame.goodput, [2 / 3] * 4)
    np.testing.assert_array_equal(frame["eval/loss"], [4.0, math.nan, 5.0, 6.0])
    np.testing.assert_allclose(frame["train/loss"], [4.1, math.nan, 5.1, 6.1])
    accuracy = frame["yardstick/blimp/accuracy"]
    np.testing.assert_array_equal(accuracy, [math.nan, math.nan, 0.5, 0.6])


def test_any_folder_of_run_folders_will_do(sweep):
    assert results.frame(sweep / "runs").equals(results.frame(sweep))
    (sweep / "runs" / "low-seed0").rename(sweep / "runs" / "alone")
    found = {run.name: (run.variant, run.seed) for run in results.read(sweep)}
    assert found["alone"] == ("alone", 0)


def test_curves(sweep):
    curves = results.curves(sweep, "eval/loss")
    assert list(curves) == ["high-seed0", "low-seed0", "low-seed1"]  # one has no finite loss
    assert curves.index.name == "step"
    assert curves.loc[400].to_dict() == {"high-seed0": 4.0, "low-seed0": 5.0, "low-seed1": 6.0}
    assert results.curves(sweep, "no such metric").empty


def test_newest_yardstick_of_the_parameters_and_rather_full(sweep):
    """Of each the name and what it says; each is preferred to those before it.

    No other run has a yardstick whose sample it should share.
    """
    (sweep / "runs" / "low-seed1" / "evaluations" / "400-yardstick-quick.json").unlink()
    folder = sweep / "runs" / "low-seed0" / "evaluations"
    stored = json.loads((folder / "400-yardstick-quick.json").read_text())
    (folder / "400-yardstick-quick.json").unlink()
    for number, (name, change) in enumerate(
        (
            ("200-yardstick-full", {"step": 200}),
            ("400-ema-yardstick-full", {"ema": True}),
            ("400-yardstick-quick", {}),
            ("400-yardstick-full", {}),
        )
    ):
        figures = {"figures": {"blimp/accuracy": number / 10}}
        (folder / f"{name}.json").write_text(json.dumps(stored | change | figures))
        assert results.frame(sweep)["yardstick/blimp/accuracy"]["low-seed0"] == number / 10


def test_what_judges_sentences_is_told(sweep):
    path = sweep / "runs" / "low-seed0" / "evaluations" / "400-yardstick-quick.json"
    stored = json.loads(path.read_text())
    stored["settings"]["blimp_score"] = "detection"
    path.write_text(json.dumps(stored))
    assert list(results.frame(sweep).blimp_score) == ["", "", "detection", ""]


def test_flops_are_those_that_the_loop_counted(trained):
    folder = trained["masked_lm"]
    result = {run.name: run for run in results.read(folder.parent)}[folder.name]
    config = run_folder.stored_config(folder)
    counted = flops.step_flops(config, Vocabulary.load(folder / run_folder.VOCABULARY))
    assert result.step_flops == pytest.approx(counted)
    assert result.step_tokens == config.train.batch_size * (config.data.sequence_length - 3)
    assert result.config == config_lib.flatten(json.loads(config_lib.to_json(config)))


def test_a_line_that_is_being_written_is_left_out(sweep):
    with open(sweep / "runs" / "low-seed0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 600, "eval/lo')
    assert results.frame(sweep).step["low-seed0"] == 400


@pytest.mark.parametrize(
    "file, text, told",
    [
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl line 2 is damaged"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl is damaged: a line without 'step'"),
        ("metrics.jsonl", "3\n", "metrics.jsonl line 1 is damaged: no JSON object"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "{}", "config.json is damaged: 'objective.name' is missing"),
        ("provenance.jsonl", '{"data": ""}\n', "provenance.jsonl is damaged: a line without"),
        ("evaluations/400-yardstick-quick.json", "[]", "400-yardstick-quick.json is damaged"),
        ("evaluations/400-yardstick-quick.json", '{"step": 4}', "quick.json is damaged: 'ema'"),
    ],
)
def test_damage_is_named(sweep, file, text, told):
    path = sweep / "runs" / "low-seed0" / file
    path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        results.read(sweep)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        results.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no sweep and no runs here"):
        results.read(tmp_path)


@pytest.mark.parametrize("text", ['{"name": "theirs"}', "[1]", "{", '{"data": 3}'])
def test_a_config_of_another_program_is_no_run(text, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(text)
    with pytest.raises(UserError, match="no sweep and no runs here"):
        results.read(tmp_path)
    write_run(tmp_path / "a-seed0", {100: 1.0})
    assert [run.name for run in results.read(tmp_path)] == ["a-seed0"]


def test_two_runs_of_one_variant_and_seed(tmp_path):
    for name in ("a-seed1", "a-seed01"):
        write_run(tmp_path / name, {100: 1.0})
    with pytest.raises(UserError, match="a-seed01 and a-seed1 are the same variant and seed"):
        results.frame(tmp_path)


def test_the_sample_that_most_runs_have(tmp_path):
    """`a` has both, `c` an older `full`, and a file of a name that is no yardstick's counts not."""
    for name in "abcd":
        write_run(tmp_path / f"{name}-seed0", {400: 3.0}, figures={"blimp/accuracy": 0.5})

    def copy(name, to, step=400, figure=0.9):
        folder = tmp_path / f"{name}-seed0" / "evaluations"
        stored = json.loads((folder / "400-yardstick-quick.json").read_text())
        changed = {"step": step, "figures": {"blimp/accuracy": figure}}
        (folder / to).write_text(json.dumps(stored | changed))

    def figures():
        return list(results.frame(tmp_path)["yardstick/blimp/accuracy"])

    copy("a", "400-yardstick-full.json")
    copy("c", "200-yardstick-full.json", step=200)
    copy("d", "500-yardstick.json", step=500)
    assert figures() == [0.5] * 4
    copy("b", "400-yardstick-full.json")
    copy("c", "400-yardstick-full.json")
    assert figures() == [0.5] * 4
    copy("d", "400-yardstick-full.json")
    assert figures() == [0.9] * 4
