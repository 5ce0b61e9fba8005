"""Runs of a sweep that train in one program: which, and how the table tells of them.

The runs here only pretend to train (tests/experiments/fake.py).
"""

import json
import sys

import pytest

from experiments import run
from experiments.running import planned as planned_lib
from experiments.running import together
from pretraining import config as config_lib
from pretraining import guard, run_folder, state
from pretraining.errors import UserError
from pretraining.manifest import MANIFEST
from pretraining.population import vmapped
from tests import running
from tests.experiments import fake
from tests.experiments.test_run import rows, starts

VARIANTS = {"a": {}, "b": {"optimizer.learning_rate": 0.1}, "c": {"train.steps": 9}, "d": {}}


def make(name, folder, recipe=running.RECIPE, **overrides):
    """A planned run."""
    own = planned_lib.Run(name, 0, recipe, overrides)
    config = config_lib.load(recipe, overrides | {"checkpoint.every": 100})
    knobs = ("mask_rate", "mask_fraction", "backward_fraction")
    cost = planned_lib.Cost(500, 1, 1.0, 1.0, knobs)
    return planned_lib.Planned(own, overrides, folder / name, config, "", "", {}, cost)


def names(groups):
    return [[each.run.variant for each in group] for group in groups]


@pytest.fixture
def save(monkeypatch):
    """Leaves a sign of a checkpoint; in the folder of the project, where the recipes lie."""
    monkeypatch.chdir(running.ROOT)

    def leave(each, step):
        place = each.folder / "checkpoints" / str(step)
        place.mkdir(parents=True)
        (place / MANIFEST).write_text("")

    return leave


def test_runs_that_differ_in_what_is_traced_go_together(save, tmp_path):
    planned = [
        make("usual", tmp_path),
        make("long", tmp_path, **{"train.steps": 600}),
        make("seed", tmp_path, **{"seed.init": 1, "seed.data": 2}),
        make("rate", tmp_path, **{"objective.mask_rate": 0.4, "objective.keep_fraction": 0.1}),
        make("spans", tmp_path, **{"objective.unit": "span"}),
        make("peak", tmp_path, **{"optimizer.learning_rate": 0.1, "optimizer.schedule": "wsd"}),
        make("long2", tmp_path, **{"train.steps": 600, "seed.init": 1}),
    ]
    assert names(together.populations(planned, 4)) == [
        ["usual", "seed", "rate", "peak"],
        ["long", "long2"],
    ]
    assert names(together.populations(planned, 3)) == [["usual", "seed", "rate"], ["long", "long2"]]
    assert together.populations(planned, 1) == []


def began(each, population):
    each.folder.mkdir(parents=True, exist_ok=True)
    (each.folder / run_folder.CONFIG).touch()
    line = {"data": "", "population": population}
    (each.folder / run_folder.PROVENANCE).write_text(json.dumps(line) + "\n")


def test_runs_go_together_that_are_as_far_as_each_other(save, tmp_path):
    planned = [make(name, tmp_path, **{"seed.init": n}) for n, name in enumerate("abcdef")]
    a, b, c, d, e, f = planned
    save(a, 200), save(b, 200), save(b, 300)  # killed in the middle of a save
    save(c, 500)  # trained
    save(d, 200), (d.folder / guard.REWINDS).write_text("{}\n")
    save(f, 100)  # one save further than e
    for group in ((a, b), (e, f)):
        for each in group:
            began(each, group[0].name)
    assert names(together.populations(planned, 9)) == [["a", "b"], ["e", "f"]]


def test_who_has_left_a_population_and_who_is_refused_by_it_stays_alone(save, tmp_path):
    planned = [make(name, tmp_path, **{"seed.init": n}) for n, name in enumerate("abc")]
    planned[0].folder.mkdir()
    run_folder.mark_left(planned[0].folder, "update 2 is not finite")
    assert names(together.populations(planned, 9)) == [["b", "c"]]
    tracked = [make(name, tmp_path, **{"log.wandb": "project"}) for name in "de"]
    assert together.populations(tracked, 9) == []
    wrong = make("f", tmp_path, **{"objective.random_fraction": 3.0})
    assert names(together.populations([wrong, *planned], 9)) == [["b", "c"]]


def test_runs_whose_examples_have_other_fields_do_not_go_together(tmp_path, monkeypatch):
    """Without any backward row an example of permutation_lm does not say which way it is read."""
    monkeypatch.chdir(running.ROOT)

    def of(name, share):
        own = {"objective.backward_fraction": share}
        return make(name, tmp_path, "configs/permutation_lm.py:tiny", **own)

    planned = [of("none", 0.0), of("some", 0.25), of("half", 0.5)]
    assert names(together.populations(planned, 9)) == [["some", "half"]]


def test_examples_are_traced_once_for_all_seeds_however_many_runs_may_join(save, tmp_path):
    traced, corrupt = [], state.corrupt_rows
    vmapped._example.cache_clear()
    planned = [
        make(f"{rate}-{seed}", tmp_path, **{"objective.mask_rate": rate, "seed.init": seed})
        for rate in (0.2, 0.3, 0.4)
        for seed in range(3)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "corrupt_rows", lambda *x: traced.append(0) or corrupt(*x))
        assert len(together.populations(planned, 9)[0]) == 9
    assert len(traced) == 3


# Ends with an error if the groups took a device: they are made in the process that starts the runs,
# and what it takes these cannot have.
GROUPS = """
import pathlib
from jax._src import xla_bridge
from experiments.running import together
from pretraining import config
from tests.experiments.test_together import make
for name in config.objective_names():
    recipe, folder = f"configs/{name}.py:tiny", pathlib.Path("no folder")
    runs = [make(str(seed), folder, recipe, **{"seed.init": seed}) for seed in range(2)]
    assert len(together.populations(runs, 2)) == 1, name
    assert not xla_bridge.backends_are_initialized(), name
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()
"""


def test_grouping_takes_no_device():
    ended = running.finish(running.start([sys.executable, "-c", GROUPS]))
    assert ended.status == 0, ended.err[-2000:]


def test_the_command_is_that_of_all_members(save, tmp_path):
    group = [make("a", tmp_path), make("b", tmp_path, **{"seed.init": 1})]
    assert together.name(group) == "a-seed0+1"
    assert together.command(group, "python") == [
        "python", "-m", "pretraining.population",
        "--config=configs/masked_lm.py:tiny", f"--workdir={tmp_path}/a",
        "--",
        "--config=configs/masked_lm.py:tiny", "--config.seed.init=1", f"--workdir={tmp_path}/b",
    ]  # fmt: skip
    alone = [words for each in group for words in each.commands("python")]
    assert [words[3:] for words in alone] == [each.arguments() for each in group]


# -------------------------------------------------------------------------------------- a sweep


@pytest.fixture
def question(tmp_path, monkeypatch):
    monkeypatch.chdir(running.ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = fake.write_question(tmp_path / "question", **VARIANTS)
    fake.install(monkeypatch.setattr, folder)
    return folder


def go(question, tmp_path, **options):
    return run.main(str(question), {}, str(tmp_path / "R"), **options)


def statuses(tmp_path):
    return [row["status"] for row in rows(tmp_path).values()]


def test_groups_first_then_those_that_fit_with_nobody(question, tmp_path, capsys):
    assert go(question, tmp_path, population="8") == 0
    assert capsys.readouterr().out == "4 runs: 4 done\n"
    assert statuses(tmp_path) == ["done"] * 4
    logs = sorted(path.name for path in (tmp_path / "R/logs").iterdir())
    assert logs == ["a-seed0+2.log", "c-seed0.log"]
    assert [row["step"] for row in rows(tmp_path).values()] == ["8"] * 4


def test_who_leaves_goes_on_alone_and_yardsticks_follow(question, tmp_path):
    (question / "b-seed0").write_text("leaves")
    assert go(question, tmp_path, population="8", protocol="measured") == 0
    assert statuses(tmp_path) == ["done"] * 4
    assert starts(tmp_path) == [1, 1, 1]
    logs = sorted(path.name for path in (tmp_path / "R/logs").iterdir())
    assert logs == ["a-seed0+2.log", *[f"{name}-seed0.log" for name in "abcd"]]


def test_the_members_of_a_population_that_fails_are_run_one_by_one(question, tmp_path, capsys):
    (question / "b-seed0").write_text("fails")
    assert go(question, tmp_path, population="8") == 1
    out, err = capsys.readouterr()
    assert out == "4 runs: 3 done, 1 failed (b-seed0)\n"
    assert err.count("failed with exit status") == 2
    assert f"a-seed0+2 failed with exit status 1; the end of {tmp_path}/R/logs/a-seed0+2" in err
    assert f"b-seed0 failed with exit status 1; the end of {tmp_path}/R/logs/b-seed0.log" in err
    assert statuses(tmp_path) == ["done", "failed", "done", "done"]
    (question / "b-seed0").unlink()
    assert go(question, tmp_path, population="8") == 0
    assert statuses(tmp_path) == ["done"] * 4


def test_printed_and_dry_its_members_are_ordinary_runs(question, tmp_path, capsys):
    assert go(question, tmp_path, population="8", launcher="print") == 0
    assert capsys.readouterr().out.count("python -c") == 4
    assert go(question, tmp_path, population="2", dry=True) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "  a-seed0, b-seed0"


def test_a_population_has_two_members_at_least(question, tmp_path):
    with pytest.raises(UserError, match="--population='1': a whole number of at least 2"):
        go(question, tmp_path, population="1")
