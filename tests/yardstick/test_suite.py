"""What is kept of an older evaluation, and what is said of what is missing."""

import copy
import json

from pretraining.yardstick import suite

OLD = {
    "settings": {
        "protocol": 2,
        "payload": 61,
        "tasks": {"blimp/blimp.jsonl": "a", "conll2003/eng.train": "b"},
        "cut": {"blimp": 0, "conll2003": 3},
        "family": {"rows": 1024},
    },
    "figures": {"family/masked_loss": 5.0, "blimp/accuracy": 0.5, "probe/average": 0.4},
    "left_out": ["glue/RTE"],
}


def later(tasks, cut, left_out, **settings):
    new = copy.deepcopy(OLD)
    new["settings"] |= {"tasks": tasks, "cut": cut} | settings
    return new | {"figures": {"family/masked_loss": 4.0}, "left_out": left_out}


def test_an_evaluation_without_tasks_keeps_their_figures(tmp_path, capsys):
    path = tmp_path / "1.json"
    assert suite.merge(path, OLD) == OLD
    path.write_text(json.dumps(OLD))
    found = suite.merge(path, later({}, {}, ["blimp", "glue/RTE"]))
    assert found["settings"] == OLD["settings"]
    assert found["figures"] == OLD["figures"] | {"family/masked_loss": 4.0}
    assert found["left_out"] == ["glue/RTE"]
    assert capsys.readouterr().err == ""


def test_other_settings_replace_it_as_a_whole(tmp_path, capsys):
    path = tmp_path / "1.json"
    path.write_text(json.dumps(OLD))
    for change, name in (
        (later({}, {}, [], protocol=3), "protocol"),
        (later({"blimp/blimp.jsonl": "z"}, {}, []), "blimp/blimp.jsonl"),
        (later({}, {"conll2003": 4}, []), "conll2003"),
        (later({}, {}, [], family={"rows": 64}), "family"),
    ):
        assert suite.merge(path, change) == change
        assert f"1.json is replaced: other settings ({name})" in capsys.readouterr().err


def test_a_damaged_one_is_replaced(tmp_path, capsys):
    path = tmp_path / "1.json"
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        assert suite.merge(path, OLD) == OLD
        assert "1.json is replaced: it is damaged" in capsys.readouterr().err


def test_no_tasks_are_told(capsys):
    assert not suite.read(None, "quick").blimp
    assert "without --tasks: left out, blimp, glue/SST-2" in capsys.readouterr().err
