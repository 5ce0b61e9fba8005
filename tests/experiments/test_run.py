"""A sweep from its command: what runs, what is told, what is refused, what a signal leaves.

The runs here only pretend to train (tests/experiments/fake.py); real ones: test_run_trains.py.
"""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from experiments import run
from experiments.running import claim
from pretraining import cli
from pretraining.errors import UserError
from tests import running
from tests.experiments import fake

NAMES = ["a-seed0", "b-seed0", "c-seed0"]


@pytest.fixture
def question(tmp_path, monkeypatch):
    monkeypatch.chdir(running.ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = fake.write_question(tmp_path / "question", a={}, b={"train.steps": 9}, c={})
    fake.install(monkeypatch.setattr, folder)
    return folder


@pytest.fixture
def go(question, tmp_path):
    """Runs the command as in a process of its own."""

    def start(**options):
        return run.main(str(question), options.pop("overrides", {}), str(tmp_path / "R"), **options)

    return start


def rows(tmp_path):
    with open(tmp_path / "R/runs.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def column(tmp_path, name):
    return [row[name] for row in rows(tmp_path).values()]


def starts(tmp_path):
    files = [tmp_path / "R/runs" / name / "starts" for name in NAMES]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


# ------------------------------------------------------------------------------------------- runs


def test_a_sweep_fills_its_table(go, tmp_path, capsys):
    assert go(jobs="2") == 0
    assert capsys.readouterr().out == "3 runs: 3 done\n"
    assert list(rows(tmp_path)) == NAMES
    second = rows(tmp_path)["b-seed0"]
    assert second == {
        "name": "b-seed0",
        "variant": "b",
        "seed": "0",
        "config": "configs/masked_lm.py:tiny",
        "overrides": second["overrides"],
        "status": "done",
        "step": "8",
        "steps": "8",
        "result": "2",  # the last eval/loss of TRAINING
        "folder": str(tmp_path / "R/runs/b-seed0"),
    }
    seeds = {f"seed.{name}": 0 for name in ("init", "corruption", "dropout")}
    assert json.loads(second["overrides"]) == {"train.steps": 9} | seeds
    assert json.loads((tmp_path / "R/sweep.json").read_text()) == {
        "question": str(tmp_path / "question"),
        "protocol": "tiny",
        "overrides": {},
        "tasks": "",
        "planned": {"baseline": "a", "contrasts": {}, "metric": "eval/loss", "better": "lower"},
    }


def test_a_failing_run_is_told_with_its_log_and_run_again(go, question, tmp_path, capsys):
    (question / "b-seed0").write_text("fails")
    assert go() == 1
    out, err = capsys.readouterr()
    assert out == "3 runs: 2 done, 1 failed (b-seed0)\n"
    assert f"b-seed0 failed with exit status 1; the end of {tmp_path}/R/logs/b-seed0.log" in err
    assert "line 15 of" in err
    assert "line 14 of" not in err
    assert column(tmp_path, "status") == ["done", "failed", "done"]
    assert rows(tmp_path)["b-seed0"]["step"] == "3"

    (question / "b-seed0").unlink()
    assert go() == 0
    assert starts(tmp_path) == [1, 2, 1]
    assert column(tmp_path, "status") == ["done"] * 3
    assert go() == 0
    assert starts(tmp_path) == [1, 2, 1]


def test_one_by_one_and_side_by_side_on_cores_of_their_own(go, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    assert go(jobs="2") == 0
    lines = [(tmp_path / "R/runs" / name / "starts").read_text().strip() for name in NAMES]
    half = len(cores) // 2
    assert {*lines} == {json.dumps(cores[:half]), json.dumps(cores[half : 2 * half])}


def test_only_some(go, tmp_path, capsys):
    assert go(only="b,c-seed?") == 0
    out, err = capsys.readouterr()
    assert out == "2 runs: 2 done\n"
    assert err.splitlines()[-1].startswith("2 of 2 runs done, 0 running")
    assert starts(tmp_path) == [0, 1, 1]
    assert column(tmp_path, "status") == ["waiting", "done", "done"]


def test_print_gives_a_line_for_each_missing_run(go, tmp_path, capsys):
    assert go(only="a") == 0
    capsys.readouterr()
    assert go(launcher="print") == 0
    lines = capsys.readouterr().out
    assert starts(tmp_path) == [1, 0, 0]
    assert column(tmp_path, "status") == ["done", "waiting", "waiting"]
    subprocess.run(["sh", "-e"], input=f"python() {{ {sys.executable} \"$@\"; }}\n{lines}",
                   text=True, check=True)  # fmt: skip
    assert go() == 0
    assert starts(tmp_path) == [1, 1, 1]


def test_a_dry_start_writes_nothing(go, tmp_path, capsys):
    assert go(dry=True, jobs="2") == 0
    assert not (tmp_path / "R").exists()
    head, _, second, *_, total, estimate = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "status", "steps", "tokens", "FLOPs", "time"]
    # 8e12 FLOPs at a quarter of 1e12 FLOP/s; three times that; in two at once
    assert second.split() == ["b-seed0", "to", "run", "8", "80", "8e+12", "32", "s"]
    assert total.split() == ["3", "runs", "240", "2.4e+13", "96", "s"]
    assert estimate.startswith(
        "About 48 s with 2 at once: no run is trained yet, so 25% of the peak"
    )


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"launcher": "kubernetes"}, "--launcher=kubernetes: there are local, slurm, print"),
        ({"jobs": "0"}, "--jobs='0': a whole number of at least 1"),
        ({"jobs": "1000"}, r"--jobs=1000: this machine has \d+ cores"),
        ({"protocol": "huge"}, "--protocol=huge: .* has tiny, other, measured"),
        ({"only": "a,nothing"}, "--only=a,nothing: 'nothing' is none of the 3 runs, .*: a-seed0"),
        ({"tasks": "nowhere"}, "--tasks=nowhere: there is no such folder"),
        ({"tasks": "tests"}, "--tasks=tests: protocol tiny has no yardstick"),
        ({"slurm": "time=1"}, "--slurm=time=1: it goes with --launcher=slurm"),
        ({"launcher": "slurm", "slurm": "time"}, "--slurm=time: expected"),
        ({"launcher": "slurm"}, "--slurm=: the minutes of a task are missing, time=60"),
        ({"launcher": "slurm", "slurm": "time=1:00"}, "time=1:00: the minutes of a task are miss"),
        ({"overrides": {"train.stepz": "1"}}, "a-seed0: unknown config key .* 'train.steps'"),
        ({"overrides": {"train.batch_size": "x"}}, "a-seed0: .*train.batch_size=x"),
        ({"overrides": {"train.steps": "5"}}, r"the sweep varies it \(9, as in the recipe\)"),
        ({"overrides": {"train.batch_size": "-1"}}, "a-seed0: .*train.batch_size=-1 is out of"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(go, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as refusal:
        go(**options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"protocol": "other"}, "holds another sweep: protocol: 'tiny' -> 'other'"),
        ({"overrides": {"train.batch_size": "8"}}, "another sweep: train.batch_size: None -> '8'"),
    ],
)
def test_two_sweeps_in_one_folder_are_refused(go, tmp_path, options, message):
    assert go(only="a") == 0
    before = (tmp_path / "R/runs.csv").read_text()
    with pytest.raises(UserError, match=message):
        go(**options)
    assert (tmp_path / "R/runs.csv").read_text() == before


def test_other_cores_are_told(go, tmp_path, capsys):
    assert go(only="a") == 0
    path = tmp_path / "R/runs/a-seed0/provenance.jsonl"
    assert "cores each" not in capsys.readouterr().err
    path.write_text(json.dumps({"data": "d", "cores": 77}) + "\n")
    assert go(only="a") == 0
    assert "had 77 cores each, those of this start get" in capsys.readouterr().err


def test_a_sweep_of_which_no_run_has_begun_gives_way(go, tmp_path):
    assert go(launcher="print", overrides={"train.batch_size": "8"}) == 0
    assert go(launcher="print") == 0
    assert json.loads((tmp_path / "R/sweep.json").read_text())["overrides"] == {}


def test_what_decides_may_not_change_any_more(go, question):
    assert go(only="a") == 0
    text = (question / "sweep.py").read_text()
    (question / "sweep.py").write_text(text.replace("BASELINE = ", "BASELINE = 'b' or "))
    with pytest.raises(UserError, match="another sweep: baseline: 'a' -> 'b'"):
        go()


def test_the_folder_of_a_run_is_refused(go, tmp_path):
    (tmp_path / "R").mkdir()
    (tmp_path / "R/config.json").write_text("{}")
    with pytest.raises(UserError, match="R is the folder of a run: a sweep wants its own"):
        go()


def test_a_question_that_was_edited_is_refused(go, question, tmp_path):
    assert go(only="b") == 0
    fake.write_question(question, a={"train.steps": 7}, b={"train.steps": 9}, c={})
    assert go(only="b") == 0  # a has not begun
    fake.write_question(question, a={}, b={"train.steps": 7}, c={})
    with pytest.raises(UserError, match="another sweep: train.steps: 9 -> 7; take another"):
        go()


def test_a_recipe_that_was_edited_is_refused(go, question, tmp_path):
    """Which the overrides of the question do not tell."""
    assert go(only="b") == 0
    path = tmp_path / "R/runs/b-seed0/config.json"
    path.write_text(path.read_text().replace('"mask_rate": 0.15', '"mask_rate": 0.5'))
    with pytest.raises(UserError, match="another sweep: objective.mask_rate: 0.5 -> 0.15"):
        go()


def test_the_same_question_by_another_path_is_the_same_sweep(go, question, tmp_path, monkeypatch):
    assert go(launcher="print") == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(question)
    recipe = str(running.ROOT / "configs")
    text = (question / "sweep.py").read_text().replace('"configs', f'"{recipe}')
    (question / "sweep.py").write_text(text)
    for typed in ("question", "./question/", "link"):
        assert run.main(typed, {}, "R", launcher="print") == 0


def test_tasks_may_be_added_and_need_not_be_repeated(go, tmp_path):
    """Only the evaluation runs again; and once its figures are of these tasks, nothing does."""
    some, other = (str(tmp_path / name) for name in ("some", "other"))
    put_blimp(some, "good")
    put_blimp(other, "fine")
    measured = tmp_path / "R/runs/a-seed0/measured"
    for tasks, wanted in [
        (None, [""]),
        (None, [""]),
        (some, ["", some]),
        (None, ["", some]),
        (other, ["", some, other]),
        (None, ["", some, other]),
    ]:
        assert go(protocol="measured", only="a", tasks=tasks) == 0
        assert measured.read_text().splitlines() == wanted
    assert starts(tmp_path) == [1, 0, 0]
    assert json.loads((tmp_path / "R/sweep.json").read_text())["tasks"] == other


def test_tasks_that_cannot_be_read_are_refused(go, tmp_path):
    (tmp_path / "tasks").mkdir()
    with pytest.raises(UserError, match="--tasks=.*/tasks: none of blimp, glue/SST-2"):
        go(protocol="measured", tasks=str(tmp_path / "tasks"))
    assert not (tmp_path / "R").exists()


def put_blimp(folder, good):
    pair = {"UID": "a", "linguistics_term": "b", "sentence_good": good, "sentence_bad": "bad"}
    path = pathlib.Path(folder) / "blimp/blimp.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(pair) + "\n")


@pytest.mark.parametrize(
    "other, message",
    [
        ({"tokenizer.size": 300}, "a-seed0 and b-seed0 .* config.tokenizer.size=4096 and 300"),
        ({"data.validation": 0.5}, "a-seed0 and b-seed0 .* config.data.validation=0.02 and 0.5"),
        ({"seed.data": 1}, "a-seed0 and b-seed0 .* config.seed.data=0 and 1"),
        ({"seed.evaluation": 1}, "a-seed0 and b-seed0 .* config.seed.evaluation=0 and 1"),
        ({"train.steps": "2 epochs"}, "b-seed0: config.train.steps='2 epochs': a sweep wants"),
    ],
)
def test_runs_that_do_not_compare_are_refused(go, question, tmp_path, other, message):
    fake.write_question(question, a={}, b=other)
    with pytest.raises(UserError, match=message):
        go()
    assert not (tmp_path / "R").exists()


def test_runs_may_differ_in_how_they_read_one_store(go, question):
    fake.write_question(question, a={}, b={"data.copies": 2, "data.sequence_length": 64})
    assert go(jobs="2") == 0


def test_the_same_flops_as_a_variant_that_is_not_there_are_refused(go, question):
    text = (question / "sweep.py").read_text()
    text = text.replace("{'train.steps': 9}", "{'train.steps': SameFlops('z')}")
    text = text.replace("import Figure", "import SameFlops, Figure")
    (question / "sweep.py").write_text(text)
    with pytest.raises(UserError, match="b-seed0: .*'z'.*no run of that variant"):
        go()


def test_two_processes_at_once_are_refused(go, tmp_path):
    sweep = {"question": str(tmp_path / "question"), "protocol": "tiny", "overrides": {}}
    with (
        claim.claim(tmp_path / "R", sweep | {"tasks": "", "planned": {}}),
        pytest.raises(UserError, match="another process runs a sweep in it"),
    ):
        go()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("sweep.json", "{", "Expecting property name"),
        ("sweep.json", "[]", "it has no question"),
        ("sweep.json", '{"question": "q", "protocol": 1}', "it has no protocol"),
        ("runs.csv", "name,status\na,done\n", "line 2: the columns are not name,variant"),
        ("runs.csv", "HEADER\na-seed0,a,0\n", "line 2: the columns are not name,variant"),
        ("runs.csv", "HEADER\na-seed0,a,x,r,{},done,1,1,,f\n", "line 2: seed is 'x'"),
        ("runs.csv", "HEADER\na-seed0,a,0,r,{},over,1,1,,f\n", "line 2: status is 'over'"),
        ("runs.csv", "HEADER\na-seed0,a,0,r,{,done,1,1,,f\n", "line 2: overrides is '{'"),
        ("runs.csv", "HEADER\na-seed0,a,0,r,[],done,1,1,,f\n", r"line 2: overrides is '\[\]'"),
    ],
)
def test_a_damaged_file_is_named(go, tmp_path, name, text, message):
    header = "name,variant,seed,config,overrides,status,step,steps,result,folder"
    (tmp_path / "R").mkdir()
    (tmp_path / "R" / name).write_text(text.replace("HEADER", header))
    with pytest.raises(UserError, match=rf"R/{name} is damaged: .*{message}") as refusal:
        go()
    assert "\n" not in str(refusal.value)


def test_a_file_in_place_of_the_folder_is_refused(go, tmp_path):
    (tmp_path / "R").write_text("")
    with pytest.raises(UserError, match="--workdir=.*R cannot be written"):
        go()


# ---------------------------------------------------------------------------------------- signals


@pytest.fixture
def started(question, tmp_path):
    """The command as a process, whose first two runs wait at step 4 until they are told to end."""
    for name, behaviour in zip(NAMES, ["waits", f"waits {tmp_path / 'release'}"], strict=False):
        (question / name).write_text(behaviour)

    def start():
        words = ["tests.experiments.fake", str(question), str(tmp_path / "R"), "2"]
        return running.start([sys.executable, "-m", *words])

    process = start()
    last = lambda: [running.last_step(tmp_path / "R/runs" / name) for name in NAMES[:2]]
    assert running.wait_for([process], lambda: last() == [4, 4]), process.communicate()
    for name in NAMES[:2]:
        (question / name).unlink()
    yield process, start
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_runs_save(started, tmp_path, number):
    process, start = started
    (tmp_path / "release").touch()
    process.send_signal(number)
    ended = running.finish(process)
    assert ended.status == 128 + number, ended.err
    assert "3 runs: 2 begun, 1 waiting\nstopped by a signal; run the same command" in ended.out
    assert "failed" not in ended.err
    assert [(tmp_path / "R/runs" / name / "saved").exists() for name in NAMES] == [1, 1, 0]
    assert column(tmp_path, "step") == ["4", "4", "0"]
    assert running.finish(start()).status == 0
    assert starts(tmp_path) == [2, 2, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_preparation(question, tmp_path, number):
    (question / "preparation").write_text("waits")
    words = ["tests.experiments.fake", str(question), str(tmp_path / "R"), "2"]
    process = running.start([sys.executable, "-m", *words])
    try:
        assert running.wait_for([process], (question / "prepared").exists), process.communicate()
        process.send_signal(number)
        ended = running.finish(process)
    finally:
        process.kill()
        process.communicate()
    assert ended.status == 128 + number, ended.err
    assert "stopped by a signal; run the same command again" in ended.out
    assert starts(tmp_path) == [0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed sweep elsewhere")
def test_kill_9_ends_the_runs_and_the_next_start_waits_for_them(started, tmp_path):
    process, start = started
    assert column(tmp_path, "status") == ["running", "running", "waiting"]
    process.kill()
    process.wait()
    again = start()
    assert again.stderr.readline() == "waiting for the runs of an earlier start to end\n"
    assert starts(tmp_path) == [1, 1, 0]
    (tmp_path / "release").touch()
    ended = running.finish(again)
    assert ended.status == 0, ended.err
    assert [(tmp_path / "R/runs" / name / "saved").exists() for name in NAMES] == [1, 1, 0]
    assert starts(tmp_path) == [2, 2, 1]
    assert column(tmp_path, "status") == ["done"] * 3


# --------------------------------------------------------------------------------------- the line


def test_the_command_line_takes_a_question_and_overrides():
    words = ["run", "my/question", "--config.train.steps=3", "--workdir=R", "--config.a.b=x=y"]
    values = cli.parse(words, "", {"workdir": "required: x"}, False, "question", True)
    overrides = {"train.steps": "3", "a.b": "x=y"}
    assert values == {"question": "my/question", "overrides": overrides, "workdir": "R"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--workdir=R"], "the argument question is missing"),
        (["one", "two", "--workdir=R"], "unexpected argument 'two'"),
        (["one", "--config.a"], "Unknown command line flag 'config.a'"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_named(words, message):
    with pytest.raises(UserError, match=message):
        cli.parse(["run", *words], "", {"workdir": "required: x"}, False, "question", True)
