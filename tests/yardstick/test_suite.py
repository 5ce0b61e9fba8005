"""What is kept of an older evaluation, and what is said of what is missing."""

import copy
import json

import pytest

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


def test_the_average_comes_with_its_last_part(tmp_path):
    """GLUE first, CoNLL-2003 later: (0.1 + 0.2 + 0.3 + 0.4 + 0.6 + 0.8) / 6 = 0.4."""
    path = tmp_path / "1.json"
    glue = [f"probe/{task}/mean" for task in ("sst2", "cola", "mrpc", "rte")]
    first = OLD | {"figures": dict(zip(glue, (0.1, 0.2, 0.3, 0.4), strict=True))}
    words = {"probe/conll2003/ner_f1": 0.6, "probe/conll2003/pos_accuracy": 0.8}
    second = OLD | {"figures": words}
    for one, other in ((first, second), (second, first)):
        path.write_text(json.dumps(one))
        assert suite.merge(path, other)["figures"]["probe/average"] == pytest.approx(0.4)
    half = OLD | {"figures": {"probe/conll2003/ner_f1": 0.6}}
    path.write_text(json.dumps(half))
    assert "probe/average" not in suite.merge(path, first)["figures"]


def damaged():
    """Each of what is read left out."""
    for key in ("figures", "left_out"):
        yield json.dumps({name: value for name, value in OLD.items() if name != key})
    for key in ("tasks", "cut"):
        rest = {name: value for name, value in OLD["settings"].items() if name != key}
        yield json.dumps(OLD | {"settings": rest})


def test_a_damaged_one_is_replaced(tmp_path, capsys):
    path = tmp_path / "1.json"
    for content in ("{", "[]", "{}", *damaged()):
        path.write_text(content)
        assert suite.merge(path, OLD) == OLD
        assert "1.json is replaced: it is damaged" in capsys.readouterr().err


def test_no_tasks_are_told(capsys):
    assert not suite.read(None, "quick").blimp
    assert "without --tasks: left out, blimp, glue/SST-2" in capsys.readouterr().err
