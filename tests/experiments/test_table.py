"""The table, the view and the estimate: numbers worked out by hand."""

import json

import pytest

from experiments import cost, progress, table
from experiments.planned import Cost, Planned, choose
from experiments.question import Run
from pretraining.errors import UserError
from pretraining.manifest import MANIFEST


def planned(folder, name="a", steps=10, flops=1e12, yardstick=()):
    run = Run(name, 0, "configs/masked_lm.py:tiny", {"train.steps": steps})
    overrides = {"train.steps": steps}
    costs = Cost(steps, 100, flops, 1e11)
    return Planned(run, overrides, folder / run.name, None, yardstick, costs)


def write_lines(each, *lines, end=""):
    each.folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (each.folder / "metrics.jsonl").write_text(text + end)


def finish(each):
    place = each.folder / "checkpoints" / str(each.cost.steps)
    place.mkdir(parents=True)
    (place / MANIFEST).write_text("")


def write_yardstick(each, step, **figures):
    path = each.folder / "evaluations" / f"{step}-yardstick.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"suite": "yardstick", "step": step, "figures": figures}))


# ------------------------------------------------------------------------------------------ table


def test_the_step_is_that_of_the_last_whole_line(tmp_path):
    each = planned(tmp_path)
    assert table.step(each.folder) == 0
    write_lines(each, {"step": 1}, {"step": 2}, end='{"step": 3, "los')
    assert table.step(each.folder) == 2


def test_the_step_is_found_at_the_end_of_a_long_file(tmp_path):
    each = planned(tmp_path)
    write_lines(each, *({"step": n, "x": "y" * 1000} for n in range(1, 201)))
    assert table.step(each.folder) == 200


def test_done_is_the_last_checkpoint_and_the_yardstick_of_that_step(tmp_path):
    each = planned(tmp_path, yardstick=("--suite=yardstick",))
    assert not table.is_done(each)
    (each.folder / "checkpoints/10").mkdir(parents=True)  # not sealed
    write_yardstick(each, 10)
    assert not table.is_done(each)
    (each.folder / "checkpoints/10" / MANIFEST).write_text("")
    assert table.is_done(each)
    (each.folder / "evaluations/10-yardstick.json").rename(
        each.folder / "evaluations/5-yardstick.json"
    )
    assert not table.is_done(each)
    assert table.is_done(each._replace(yardstick=()))


def test_what_is_done_is_not_done_again(tmp_path):
    each = planned(tmp_path, yardstick=("--suite=yardstick", "--sample=quick"))
    train, evaluate = table.commands_left(each, "python")
    where = f"--workdir={tmp_path}/a-seed0"
    recipe = "--config=configs/masked_lm.py:tiny"
    overrides = "--config.train.steps=10"
    assert train == ["python", "-m", "pretraining.train", recipe, overrides, where]
    options = ["--suite=yardstick", "--sample=quick"]
    assert evaluate == ["python", "-m", "pretraining.evaluate", where, *options]
    finish(each)
    assert table.commands_left(each, "python") == [evaluate]
    write_yardstick(each, 10)
    assert table.commands_left(each, "python") == []


def test_the_result_is_the_last_figure(tmp_path):
    each = planned(tmp_path, yardstick=("--suite=yardstick",))
    write_lines(each, {"step": 5, "eval/loss": 3.0}, {"step": 9, "eval/loss": 2.5}, {"step": 10})
    write_yardstick(each, 10, **{"blimp/accuracy": 0.625})
    assert table.row(each, "eval/loss", None).result == ""  # it is not done
    finish(each)
    assert table.row(each, "eval/loss", None).result == "2.5"
    assert table.row(each, "yardstick/blimp/accuracy", None).result == "0.625"
    assert table.row(each, "yardstick/probe/average", None).result == ""


def test_rows_are_read_as_they_were_written(tmp_path):
    row = table.row(planned(tmp_path, 'a,"b'), "eval/loss", table.FAILED)
    table.write(tmp_path, [row])
    assert table.read(tmp_path) == {
        'a,"b-seed0': {name: str(value) for name, value in row._asdict().items()}
    }


# ---------------------------------------------------------------------------------------- progress


def rows(tmp_path, steps, statuses):
    runs = [planned(tmp_path, "a", 10, 1e12), planned(tmp_path, "b", 10, 3e12)]
    found = {each.name: table.row(each, "eval/loss", table.WAITING) for each in runs}
    for name, step, status in zip(found, steps, statuses, strict=True):
        found[name] = found[name]._replace(step=step, status=status)
    return runs, found


def test_the_view_counts_updates_by_what_they_cost(tmp_path, monkeypatch, capsys):
    """a does 1e11 FLOPs an update, b 3e11; 4e12 in all.

    From a at 10 and b at 0 (1e12) to b at 5 (2.5e12) in 60 s: the other 1.5e12 take 60 s more.
    """
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    runs, before = rows(tmp_path, (10, 0), ("done", "waiting"))
    with progress.View(runs, before) as view:
        view.show(before)
        clock[0] += 10
        view.show(rows(tmp_path, (10, 1), ("done", "running"))[1])  # too early for a line
        clock[0] += 50
        view.show(rows(tmp_path, (10, 5), ("done", "running"))[1])
        view.show(rows(tmp_path, (10, 5), ("done", "failed"))[1], last=True)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2 runs done, 0 running",
        "1 of 2 runs done, 1 running, 60 s left  b-seed0 5/10",
        "1 of 2 runs done, 0 running, 1 failed, 60 s left",
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (101, "2 min"),
        (5900, "98 min"),
        (11_100, "3 h 05 min"),
        (10 * 86_400, "10 days"),
    ],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


# -------------------------------------------------------------------------------------------- cost


def test_the_estimate_comes_from_the_runs_that_are_done(tmp_path):
    """One of 1e12 FLOPs has taken 20 + 5 s, and was down for 1000: so 3e12 take 75 s."""
    done, other = planned(tmp_path, "a", 10, 1e12), planned(tmp_path, "b", 10, 3e12)
    finish(done)
    totals = {"time/total/step": 20, "time/total/start": 5, "time/total/down": 1000}
    write_lines(done, {"step": 10, "time/step_s": 7} | totals)
    lines = cost.describe([done, other], jobs=1).splitlines()
    assert lines[1].split() == ["a-seed0", "done", "10", "100", "1e+12", "0", "s"]
    assert lines[2].split() == ["b-seed0", "to", "run", "10", "100", "3e+12", "75", "s"]
    assert lines[-1] == "About 75 s with 1 at once: the 1 runs done so far."


# ---------------------------------------------------------------------------------------- choosing


def test_runs_are_chosen_by_parts_and_patterns():
    names = ["mask-15-seed0", "mask-15-seed1", "bert-15-seed0"]
    assert choose(names, None) == names
    assert choose(names, "bert") == ["bert-15-seed0"]
    assert choose(names, "*-seed0") == ["mask-15-seed0", "bert-15-seed0"]
    assert choose(names, "seed1,bert") == ["mask-15-seed1", "bert-15-seed0"]
    for nothing in ("rtd", "", "mask-1?"):
        with pytest.raises(UserError, match="matches none of the 3 runs"):
            choose(names, nothing)
