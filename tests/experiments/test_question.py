"""A question: what its file must define, and the helpers it is written with."""

import pytest

from experiments import question as question_lib
from experiments.question import Run
from pretraining.errors import UserError

WHOLE = """'''Title.

More.'''
from experiments.question import Protocol, Run
PROTOCOLS = {"tiny": Protocol("small")}
BASELINE = "a"
FIGURES = []
def runs(protocol):
    return RUNS
"""


def write(folder, runs="[Run('a', 0, 'r', {}), Run('b', 0, 'r', {})]", text=WHOLE):
    (folder / "sweep.py").write_text(text.replace("RUNS", runs))
    return folder


def test_a_question_is_read(tmp_path):
    question = question_lib.load(write(tmp_path))
    assert (question.title, question.baseline, question.figures) == ("Title.", "a", ())
    assert question.protocols["tiny"].yardstick == "quick"
    assert [run.name for run in question_lib.runs(question, "tiny")] == ["a-seed0", "b-seed0"]


def test_a_missing_folder_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="'nowhere': no such folder; .*experiments/masking_ratio"):
        question_lib.load("nowhere")
    with pytest.raises(UserError, match=r"no sweep.py in it"):
        question_lib.load(tmp_path)


@pytest.mark.parametrize("part", ["PROTOCOLS", "BASELINE", "FIGURES", "runs"])
def test_a_missing_part_is_named(tmp_path, part):
    with pytest.raises(UserError, match=f"defines no {part}$"):
        question_lib.load(write(tmp_path, text=WHOLE.replace(part, "other")))


@pytest.mark.parametrize(
    "runs, message",
    [
        ("[]", "the sweep is empty"),
        ("[Run('a', 0, 'r', {})] * 2", "two runs are called 'a-seed0'"),
        ("[Run('a/b', 0, 'r', {})]", "'a/b-seed0' cannot be the name of a folder"),
        ("[Run('b', 0, 'r', {})]", "no run is of the BASELINE 'a'"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(.*sweep.py line 9\)"),
    ],
)
def test_runs_that_cannot_be_are_refused(tmp_path, runs, message):
    question = question_lib.load(write(tmp_path, runs))
    with pytest.raises(UserError, match=message) as refusal:
        question_lib.runs(question, "tiny")
    assert "\n" not in str(refusal.value)


def test_an_unknown_protocol_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="--protocol=huge: .* has tiny"):
        question_lib.runs(question_lib.load(write(tmp_path)), "huge")


def test_a_broken_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"NameError: .*'nothing'.*sweep.py line 1\)"):
        question_lib.load(write(tmp_path, text="nothing\n"))


def test_products_and_repetitions():
    axes = {"rate": question_lib.values("r", 1, 2), "unit": [{"u": "x"}, {"u": "y", "v": 0}]}
    assert list(question_lib.product(**axes)) == [
        {"r": 1, "u": "x"},
        {"r": 1, "u": "y", "v": 0},
        {"r": 2, "u": "x"},
        {"r": 2, "u": "y", "v": 0},
    ]
    second = {"k": 1, "seed.init": 1, "seed.corruption": 1, "seed.dropout": 1}
    assert question_lib.repeat("a", "r", {"k": 1}, 2)[1] == Run("a", 1, "r", second)
