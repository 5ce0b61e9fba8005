"""The command line, and the same in a notebook."""

import importlib
import pathlib
import runpy
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import pretraining
from pretraining import config as config_lib
from pretraining import notebook, show
from pretraining.data import prepare
from pretraining.errors import UserError

command = importlib.import_module("pretraining.show.__main__")

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXT = "the value of the object returns a list"


def arguments(**changes):
    nothing = dict.fromkeys(("output", "seed", "step", "workdir", "config"))
    return nothing | {"text": TEXT, "ema": False} | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "give one of --config"),
        ({"config": 1, "workdir": "runs/x"}, "give one of --config"),
        ({"config": 1, "ema": True}, "--ema needs --workdir"),
        ({"workdir": "runs/x", "step": "last"}, "--step='last'"),
        ({"workdir": "runs/x", "seed": "-1"}, "--seed='-1'"),
        ({"workdir": "not/there"}, "no run here"),
    ],
)
def test_mistakes_of_the_command_line(changes, message):
    with pytest.raises(UserError, match=message):
        command.main(**arguments(**changes))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--text=a"], "give one of --config"),
        (["--workdir=not/there", "--text=a"], "no run here"),
        (["--workdir=runs/x"], "--text is missing"),
        (["--config=configs/none.py", "--text=a"], "no file 'configs/none.py'"),
        (["--config=configs/masked_lm.py:tiny", "--config.data.copys=2", "--text=a"], "data.copys"),
        (["--config=configs/masked_lm.py:tiny", "--workdir=runs/x", "--text=a"], "give one of"),
    ],
)
def test_the_command_line_says_it_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show", *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(command.__file__, run_name="__main__")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture
def asked(monkeypatch, corrupted):
    """What the command asks for; it gets the hand-made example, in a terminal of 70 columns."""
    asked = []
    monkeypatch.setattr(notebook, "load", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(show, "read", lambda *arguments: asked.append(arguments) or corrupted)
    monkeypatch.setattr(command.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=70))
    return asked


@pytest.mark.parametrize(
    "terminal, variable, colored",
    [(True, None, True), (True, "", True), (True, "1", False), (False, None, False)],
)
def test_colors_are_for_terminals(
    terminal, variable, colored, asked, corrupted, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    output = str(tmp_path / "one.png")
    assert command.main(**arguments(workdir="x", output=output)) == 0
    printed = capsys.readouterr().out
    assert printed == f"{show.text(corrupted, 70, colored)}\n\nThe picture is in {output}\n"
    with Image.open(output) as image:
        assert image.size[0] == 640 * 100 // 72


@pytest.mark.parametrize("output", ["not/there/show.png", "show.docx"])
def test_a_picture_that_cannot_be_written(output, asked):
    with pytest.raises(UserError, match=f"--output={output}: "):
        command.main(**arguments(workdir="x", output=output))


def test_a_recipe_is_shown_untrained_in_the_words_of_python(
    small_overrides, small_corpus, tmp_path, monkeypatch, capsys
):
    """The tokenizer is not made of the recipe's corpus, which need not even be there."""
    overrides = small_overrides | {"data.corpus": "not/there.txt", "data.cache": str(tmp_path)}
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    documents = small_corpus.read_text().split("\n\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare.corpus.python_docs, "documents", lambda: documents)
    assert command.main(**arguments(config=config, step="5", seed="2")) == 0
    out, err = capsys.readouterr()
    assert "masked_lm: seed 2, step 5" in out
    assert "vocabulary: 300 pieces of python-docs" in err
    assert (tmp_path / "show.png").exists()
    assert config.data.corpus == "not/there.txt"


def test_a_run_is_shown_as_it_was_trained(trained, tmp_path, capsys):
    folder, output = trained["causal_lm"], str(tmp_path / "show.png")
    for options, at in ({}, 40), ({"step": "28"}, 28), ({"ema": True}, 40):
        command.main(**arguments(workdir=str(folder), output=output, **options))
        assert f"causal_lm: seed 0, step {at}\n" in capsys.readouterr().out
    run = pretraining.load(folder)
    words = lambda figure: [text.get_text() for text in figure.axes[0].texts]
    assert words(run.show(TEXT, seed=4)) == words(show.figure(show.read(run, TEXT, 4)))
    assert "seed 4, step 40" in words(run.show(TEXT, seed=4))


def test_the_options_reach_the_run(asked, tmp_path):
    output = str(tmp_path / "show.png")
    command.main(**arguments(workdir="x", step="7", seed="3", ema=True, output=output))
    command.main(**arguments(workdir="x", output=output))
    assert asked == [("x", 7, True), (None, TEXT, 3), ("x", None, False), (None, TEXT, None)]
