"""A question: what its file must define, and the helpers it is written with."""

import pytest

from experiments import question as question_lib
from experiments.question import Run
from pretraining.errors import UserError
from tests import running

WHOLE = """'''Title.

More.'''
from experiments.question import Figure, Protocol, Run
PROTOCOLS = {"tiny": Protocol("small")}
BASELINE = "a"
FIGURES = [Figure("eval/loss", "Loss", "lower")]
def runs(protocol):
    return RUNS
"""


def write(folder, runs="[Run('a', 0, 'r', {}), Run('b', 0, 'r', {})]", text=WHOLE):
    (folder / "sweep.py").write_text(text.replace("RUNS", runs))
    return folder


def test_a_question_is_read(tmp_path):
    question = question_lib.load(write(tmp_path))
    assert (question.title, question.baseline, len(question.figures)) == ("Title.", "a", 1)
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
    "old, new, message",
    [
        ('{"tiny": Protocol("small")}', "{}", "PROTOCOLS is not {name: Protocol}"),
        ('Protocol("small")', '"small"', "PROTOCOLS is not {name: Protocol}"),
        ('BASELINE = "a"', "BASELINE = ()", "BASELINE is not the name of a variant"),
        ('[Figure("eval/loss", "Loss", "lower")]', "[]", "FIGURES is not a tuple of Figure, with"),
        ('[Figure("eval/loss", "Loss", "lower")]', "['loss']", "FIGURES is not a tuple of Figure"),
        ("def runs(protocol):\n    return RUNS", "runs = 1", "runs is not a function"),
        ("BASELINE", "CONTRASTS = ['b']\nBASELINE", "CONTRASTS is not {variant: variant}"),
    ],
)
def test_a_part_that_is_something_else_is_named(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message) as refusal:
        question_lib.load(write(tmp_path, text=WHOLE.replace(old, new)))
    assert "\n" not in str(refusal.value)


CONTRASTS = """
PROTOCOLS["large"] = Protocol("large")
CONTRASTS = {"c": "b", "b": "a"}
def runs(protocol):
    names = "abc" if protocol == "large" else "ab"
    return [Run(name, 0, "r", {}) for name in names]
"""


def test_contrasts_are_those_of_the_protocol(tmp_path):
    question = question_lib.load(write(tmp_path, text=WHOLE + CONTRASTS))
    assert question.contrasts == {"c": "b", "b": "a"}
    for protocol, wanted in {"tiny": {"b": "a"}, "large": {"c": "b", "b": "a"}}.items():
        variants = [run.variant for run in question_lib.runs(question, protocol)]
        assert question_lib.contrasts(question, variants) == wanted


def test_without_contrasts_everything_is_tested_against_the_baseline(tmp_path):
    question = question_lib.load(write(tmp_path))
    found = question_lib.contrasts(question, ["c", "a", "b", "b"])
    assert list(found.items()) == [("c", "a"), ("b", "a")]
    assert question_lib.contrasts(question, ["c", "b"]) == {}


@pytest.mark.parametrize(
    "one, other, message",
    [
        ("x", "a", "CONTRASTS has 'x': 'a', and no protocol has the variant 'x'"),
        ("b", "x", "CONTRASTS has 'b': 'x', and no protocol has the variant 'x'"),
        ("b", "b", "CONTRASTS has 'b' against itself"),
    ],
)
def test_contrasts_of_variants_that_are_nowhere_are_refused(tmp_path, one, other, message):
    text = WHOLE + CONTRASTS.replace('"c": "b"', f"{one!r}: {other!r}").replace(', "b": "a"', "")
    question = question_lib.load(write(tmp_path, text=text))
    with pytest.raises(UserError, match=message):
        question_lib.runs(question, "tiny")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "'smaller'",
            r"Figure\('eval/loss', ...\): better is 'smaller', not \('lower', 'higher'\)",
        ),
        ("'lower', 'model.lyers'", "knob 'model.lyers' is no config key; .*'model.layers'"),
    ],
)
def test_a_figure_that_could_not_be_drawn_is_refused(tmp_path, arguments, message):
    recipe = running.ROOT / "configs/masked_lm.py"
    text = WHOLE.replace('"lower"', arguments)
    question = question_lib.load(write(tmp_path, f"[Run('a', 0, '{recipe}', {{}})]", text))
    with pytest.raises(UserError, match=message):
        question_lib.runs(question, "tiny")


def test_a_question_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert question_lib.load("experiments/masking_ratio").baseline == "mask-15"


@pytest.mark.parametrize(
    "runs, message",
    [
        ("['a']", r"'a' is not Run\(variant, seed, config, overrides\)"),
        ("[Run('a', '0', 'r', {})]", "is not Run"),
        ("[Run('a', 0, 'r', [])]", "is not Run"),
        ("5", "TypeError: 'int' object is not iterable"),
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


def test_variants_are_made_of_axes():
    rates = question_lib.values("r", {"low": 1, "high": 2})
    assert rates == {"low": {"r": 1}, "high": {"r": 2}}
    units = {"": {"u": "x"}, "v": {"u": "y", "r": 0}}
    assert list(question_lib.product(rates, units).items()) == [
        ("low", {"r": 1, "u": "x"}),
        ("low-v", {"r": 0, "u": "y"}),
        ("high", {"r": 2, "u": "x"}),
        ("high-v", {"r": 0, "u": "y"}),
    ]
    ends = question_lib.values("e", {"low": 3, "high": 4})
    assert question_lib.together(rates, ends) == {"low": {"r": 1, "e": 3}, "high": {"r": 2, "e": 4}}
    with pytest.raises(UserError, match="low, high do not go with , v"):
        question_lib.together(rates, units)


def test_repetitions_differ_in_their_seeds():
    second = {"k": 1, "seed.init": 1, "seed.corruption": 1, "seed.dropout": 1}
    assert question_lib.repeat("a", "r", {"k": 1}, 2)[1] == Run("a", 1, "r", second)
