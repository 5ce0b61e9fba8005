"""Real runs, folders of runs, and the command."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pretraining import doctor
from pretraining.doctor import __main__ as command_line
from pretraining.doctor.record import find
from pretraining.errors import UserError
from tests import running


def test_real_runs_are_healthy(trained):
    for objective, folder in trained.items():
        found = doctor.examine(folder)
        assert not [f for f in found if f.severity == "warning"], objective
        assert {"unigram baseline", "gradient norm", "learning rate"} <= {f.check for f in found}


def test_the_command_goes_through_a_sweep_and_finds_the_sick_run(trained, tmp_path, capsys):
    for name in ("well", "sick"):
        shutil.copytree(
            trained["causal_lm"],
            tmp_path / "runs" / name,
            ignore=shutil.ignore_patterns("checkpoints"),
        )
    assert command_line.main(str(tmp_path)) == 0
    path = tmp_path / "runs" / "sick" / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines = [json.dumps(each | {"train/learning_rate": 0.0}) for each in lines]
    path.write_text("\n".join(lines) + '\n{"step": 4')  # and cut in half, as while it is written
    capsys.readouterr()
    assert command_line.main(str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert out.count("warning: learning rate: the learning rate is 0") == 1
    assert "usual cause: a warm-up that is longer" in out
    assert command_line.main(str(tmp_path), json=True) == 1
    sick, well = json.loads(capsys.readouterr().out)
    assert sick["folder"].endswith("sick")
    assert [f["check"] for f in sick["findings"] if f["severity"] == "warning"] == ["learning rate"]
    assert not [f for f in well["findings"] if f["severity"] == "warning"]


def test_the_command_as_a_process(trained, command):
    options = [str(trained["masked_lm"]), "--full"]
    out, err = (process := command("pretraining.doctor", options=options)).communicate()
    assert process.returncode == 0, err
    assert "ok: learning: training loss" in out
    nowhere = command("pretraining.doctor", options=["there/is/nothing"])
    _, err = nowhere.communicate()
    assert nowhere.returncode == 2
    assert "there is no run here" in err.strip().splitlines()[-1]


def test_the_loss_of_tokens_is_what_the_objective_says(trained):
    """Whatever the first line holds: in that of the detection nothing else is near log V."""
    terms = {"replaced_token_detection": "generator", "span_boundary": "masked_lm"}
    for objective, folder in trained.items():
        record = doctor.read_record(folder)
        assert record.term == terms.get(objective, objective)
        assert len(record.excess()[0]) == 4
        assert record.last("train/fill") == 1.0
        assert record.evaluation_knobs.keys() <= {
            name.removeprefix("train/knobs/") for name in record.lines[0]
        }


def test_a_damaged_run_of_a_sweep_is_named_and_the_others_are_examined(trained, tmp_path, capsys):
    for name in ("well", "sick"):
        shutil.copytree(
            trained["causal_lm"], tmp_path / name, ignore=shutil.ignore_patterns("checkpoints")
        )
    (tmp_path / "sick" / "provenance.jsonl").unlink()
    assert command_line.main(str(tmp_path), json=True) == 1
    out, err = capsys.readouterr()
    assert [run["folder"] for run in json.loads(out)] == [str(tmp_path / "well")]
    assert err == f"error: {tmp_path / 'sick' / 'provenance.jsonl'} is missing or damaged\n"
    shutil.rmtree(tmp_path / "well")
    with pytest.raises(UserError, match="sick"):
        command_line.main(str(tmp_path))


def test_a_reader_that_stops_is_no_error(trained):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -0` would
    words = [sys.executable, "-m", "pretraining.doctor", str(trained["masked_lm"])]
    ended = subprocess.run(words, cwd=running.ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_folders_of_runs(trained, tmp_path):
    folder = trained["masked_lm"]
    assert find(folder) == [folder]
    assert find(folder.parent) == sorted(trained.values())
    with pytest.raises(UserError, match="no folder of runs"):
        find(tmp_path)


def test_damaged_run_folders_are_named(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained["masked_lm"], copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "provenance.jsonl").rename(copy / "elsewhere")
    with pytest.raises(UserError, match=r"provenance\.jsonl is missing or damaged"):
        doctor.examine(copy)
    (copy / "vocabulary" / "unigram_counts.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"unigram_counts\.npy is damaged"):
        doctor.examine(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        doctor.examine(copy)
