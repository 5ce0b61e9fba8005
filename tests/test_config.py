"""Configs: overrides, refusals, durations, storing, comparing."""

import pathlib
import subprocess
import sys

import pytest

from pretraining import cli
from pretraining import config as config_lib
from pretraining.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = "configs/masked_lm.py:tiny"
OPTIONS = {"workdir": "required: folder", "verify": "flag: check"}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*arguments):
    return cli.parse(["program", *arguments], "doc", OPTIONS)


def test_overrides_keep_types():
    values = parse(
        f"--config={RECIPE}",
        "--workdir=w",
        "--verify",
        "--config.train.batch_size=8",
        "--config.train.steps=2 epochs",
        "--config.data.corpus=../some/*.jsonl.xz",
        "--config.optimizer.learning_rate=1",
    )
    config = values["config"]
    assert (values["workdir"], values["verify"]) == ("w", True)
    assert config.train.batch_size == 8
    assert config.train.steps == "2 epochs"
    assert config.data.corpus == "../some/*.jsonl.xz"
    assert isinstance(config.optimizer.learning_rate, float)


def test_weighted_sources_on_the_command_line():
    config = parse(f"--config={RECIPE}", "--workdir=w", "--config.data.corpus=(('a', 1), ('b', 2))")
    assert config["config"].data.corpus == (("a", 1), ("b", 2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.train.stepz=3"], "unknown config key 'train.stepz'.*'train.steps'"),
        (["--config.evaluat.batch_size=3"], "unknown config key .*'evaluate.batch_size'"),
        (["--config.train.batch_size=many"], "config.train.batch_size=many"),
        (["--config.train=3"], "config.train is a section"),
        (["--work=w"], "Unknown command line flag 'work'"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(f"--config={RECIPE}", "--workdir=w", *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing"),
        (["--workdir=w"], "--config is missing"),
        (["--config=configs/quickstart.py"], "--workdir is missing"),
        (["--workdir=w", "--workdir", "v"], "--workdir is given more than once"),
        (["--workdir=w", "--config=configs/none.py"], "there is no file 'configs/none.py'"),
        (["--workdir=w", "--config=README.md"], "a recipe is a Python file"),
        (["--workdir=w", "--config=configs/quickstart.py:tiny"], "comes in one size"),
        (["--workdir=w", "--config=configs/masked_lm.py:huge"], "tiny, small, base, large"),
        (["--workdir=w", "--config=configs/__init__.py"], "has no function get_config"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--config=R --workdir=a", "one run alone: ' -- ' stands between the arguments of several"),
        ("--config=R --workdir=a --config=R --workdir=b -- --config=R --workdir=c",
         r"in the arguments of run 1 of 2 \(' -- ' parts them\): --config is given more than once"),
        ("--config=R --workdir=a -- --workdir=b", "run 2 of 2 .* --config is missing"),
        ("--config=R --workdir=a --", "run 2 of 2 .* --config is missing"),
        ("--config=R --workdir=a -- --config=R --config.seed.inti=1 --workdir=b",
         "run 2 of 2 .* unknown config key 'seed.inti'"),
    ],
)  # fmt: skip
def test_whose_mistake_it_is_among_several_runs(arguments, message):
    words = arguments.replace("=R", f"={RECIPE}").split()
    with pytest.raises(UserError, match=message):
        cli.parse_members(["population", *words], "", {"workdir": "required: folder"})


def test_recipe_keys_are_held_against_the_base():
    config = config_lib.load(RECIPE)
    config_lib.check_keys(config)
    with config.unlocked():
        config.train.batchsize = 3
    with pytest.raises(UserError, match="unknown config key 'train.batchsize'.*train.batch_size"):
        config_lib.check_keys(config)
    with config.unlocked():
        del config.train.batchsize
        del config.train.ema
    with pytest.raises(UserError, match="'train.ema' is missing"):
        config_lib.check_keys(config)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.batch_size": 0}, "config.train.batch_size=0 is out of range"),
        ({"train.ema": 1.0}, "config.train.ema=1.0 is out of range"),
        ({"data.validation": 0.0}, "config.data.validation=0.0"),
        ({"seed.data": -1}, "config.seed.data=-1"),
        ({"train.steps": "many"}, "config.train.steps='many' is not a duration"),
        ({"optimizer.warmup": -5}, "config.optimizer.warmup=-5 is not a duration"),
        ({"train.batch_size": 9, "train.accumulation": 2}, "batch_size=9.*accumulation=2"),
        ({"train.batch_size": 10, "data.copies": 4}, "batch_size=10.*copies=4"),
    ],
)
def test_ranges_and_contradictions(overrides, message):
    with pytest.raises(UserError, match=message):
        config_lib.validate(config_lib.load(RECIPE, overrides))


@pytest.mark.parametrize(
    "written, steps",
    [
        (70, 70),
        ("70 steps", 70),
        ("1 step", 1),
        ("10k steps", 10_000),
        ("800 tokens", 1),  # 8 rows x 100 tokens a step
        ("801 tokens", 2),
        ("0.1M tokens", 125),
        ("2 epochs", 5),  # 2 x 20 rows / 8 rows a step
    ],
)
def test_durations(written, steps):
    config = config_lib.load(
        RECIPE, {"train.batch_size": 8, "data.sequence_length": 103, "train.steps": written}
    )
    resolved = config_lib.resolve_durations(config, rows_per_epoch=20)
    assert resolved.train.steps == steps


def test_percentages_refer_to_the_run_and_round_up_exactly():
    for steps, expected in ((70, 7), (71, 8), (1000, 100), (1, 1)):
        config = config_lib.load(RECIPE, {"train.steps": steps, "optimizer.warmup": "10%"})
        assert config_lib.resolve_durations(config, 1).optimizer.warmup == expected
    config = config_lib.load(RECIPE, {"train.steps": "10%"})
    with pytest.raises(UserError, match="a share of what"):
        config_lib.resolve_durations(config, 1)


def test_phases_in_epochs_are_not_judged_before_rows_are_counted():
    for steps in (1000, "1 epoch"):
        overrides = {"train.steps": steps, "optimizer.warmup": "1 epoch"}
        checked = config_lib.without_epochs(config_lib.load(RECIPE, overrides))
        assert checked.optimizer.warmup == 0
        assert checked.train.steps == (1000 if steps == 1000 else 10**9)


def test_epochs_count_copies():
    """Each row stands twice in a batch of 8: 20 rows are 5 steps."""
    overrides = {"train.batch_size": 8, "data.copies": 2, "train.steps": "1 epoch"}
    assert config_lib.resolve_durations(config_lib.load(RECIPE, overrides), 20).train.steps == 5


def test_json_round_trip_keeps_tuples():
    config = config_lib.load(RECIPE, {"data.corpus": (("a", 1.0), ("b", 2.0))})
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert not config_lib.differences(config, again)


def test_differences_ignore_only_what_may_change():
    config = config_lib.load(RECIPE)
    allowed = {"mesh.fsdp": 8, "log.every": 3, "checkpoint.keep": 9, "evaluate.rows": 7}
    allowed |= {"data.workers": 2, "data.cache": "elsewhere"}
    assert not config_lib.differences(config, config_lib.load(RECIPE, allowed))
    changed = config_lib.differences(config, config_lib.load(RECIPE, {"seed.data": 4}))
    assert changed == {"seed.data": "0 -> 4"}


def test_an_unknown_objective_names_those_that_exist():
    config = config_lib.load(RECIPE, {"objective.name": "masked"})
    with pytest.raises(UserError, match=r"objectives/masked.py; there are .*masked_lm") as caught:
        config_lib.build_objective(config, None)
    assert "selection" not in str(caught.value)  # a helper is no objective


def test_help_explains_every_key_of_a_recipe():
    command = [sys.executable, "-m", "pretraining.train", f"--config={RECIPE}", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    for key in config_lib.flatten(config_lib.load(RECIPE)):
        line = next(n for n, line in enumerate(lines) if line.startswith(f"  --config.{key}="))
        assert lines[line + 1].startswith("        "), f"{key} has no comment"
    assert "--workdir" in text
