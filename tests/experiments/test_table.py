"""The table, the view and the estimate: numbers worked out by hand."""

import json

import pytest

from experiments.question import Run
from experiments.running import cost, follow, table
from experiments.running.planned import Cost, Planned, choose, duration
from pretraining.errors import UserError
from pretraining.manifest import MANIFEST
from pretraining.yardstick import suite


def planned(folder, name="a", steps=10, flops=1e12, sample="", tasks="", digests=None):
    run = Run(name, 0, "configs/masked_lm.py:tiny", {"train.steps": steps})
    overrides = {"train.steps": steps}
    costs = Cost(steps, 100, flops, 1e11)
    return Planned(run, overrides, folder / run.name, None, sample, tasks, digests or {}, costs)


def write_lines(each, *lines, end=""):
    each.folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (each.folder / "metrics.jsonl").write_text(text + end)


def finish(each):
    place = each.folder / "checkpoints" / str(each.cost.steps)
    place.mkdir(parents=True)
    (place / MANIFEST).write_text("")


def write_yardstick(each, step, sample="quick", tasks=None, protocol=suite.PROTOCOL, **figures):
    path = each.folder / "evaluations" / f"{step}-yardstick-{sample}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"protocol": protocol, "tasks": tasks or {}}
    path.write_text(json.dumps({"step": step, "settings": settings, "figures": figures}))
    return path


# ------------------------------------------------------------------------------------------ table


def test_the_step_is_that_of_the_last_whole_line(tmp_path):
    each = planned(tmp_path)
    assert table.step(each.folder) == 0
    write_lines(each, {"step": 1}, {"step": 2}, end='{"step": 3, "los')
    assert table.step(each.folder) == 2
    write_lines(each, {"step": 1}, {"loss": 2.0}, 5)
    assert table.step(each.folder) == 1


def test_the_step_is_found_at_the_end_of_a_long_file(tmp_path):
    each = planned(tmp_path)
    write_lines(each, *({"step": n, "x": "y" * 1000} for n in range(1, 201)))
    assert table.step(each.folder) == 200


def test_done_is_the_last_checkpoint_and_the_yardstick_of_that_step(tmp_path):
    each = planned(tmp_path, sample="quick")
    assert not table.is_done(each)
    (each.folder / "checkpoints/10").mkdir(parents=True)  # not sealed
    path = write_yardstick(each, 10)
    assert not table.is_done(each)
    (each.folder / "checkpoints/10" / MANIFEST).write_text("")
    assert table.is_done(each)
    for other in ("5-yardstick-quick.json", "10-ema-yardstick-quick.json"):
        path = path.rename(path.with_name(other))
        assert not table.is_done(each)
    assert table.is_done(each._replace(sample=""))


def test_done_is_the_yardstick_of_the_sample_with_the_tasks_that_were_asked_for(tmp_path):
    each = planned(tmp_path, sample="full")
    finish(each)
    write_yardstick(each, 10, "quick", {"blimp": "digest"})
    assert not table.is_done(each)
    write_yardstick(each, 10, "full")
    assert table.is_done(each)
    asked = each._replace(digests={"blimp": "digest", "glue": "other"})
    for less in ({}, {"blimp": "digest"}, {"blimp": "digest", "glue": "another"}):
        write_yardstick(each, 10, "full", less)
        assert not table.is_done(asked)
        assert table.is_done(each)
    write_yardstick(each, 10, "full", {"blimp": "digest", "glue": "other", "more": "x"})
    assert table.is_done(asked)
    write_yardstick(each, 10, "full", dict(asked.digests), protocol=suite.PROTOCOL - 1)
    assert not table.is_done(asked)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": [], "figures": {}}'])
def test_a_yardstick_that_cannot_be_read_is_still_to_be_done(tmp_path, text):
    each = planned(tmp_path, sample="quick")
    finish(each)
    write_yardstick(each, 10).write_text(text)
    assert not table.is_done(each)
    assert table.row(each, "yardstick/blimp/accuracy", None).status == "waiting"


def test_what_is_done_is_not_done_again(tmp_path):
    each = planned(tmp_path, sample="quick", tasks="T", digests={"blimp": "digest"})
    train, evaluate = table.commands_left(each, "python")
    where = f"--workdir={tmp_path}/a-seed0"
    recipe = "--config=configs/masked_lm.py:tiny"
    overrides = "--config.train.steps=10"
    assert train == ["python", "-m", "pretraining.train", recipe, overrides, where]
    options = ["--suite=yardstick", "--sample=quick", "--tasks=T"]
    assert evaluate == ["python", "-m", "pretraining.evaluate", where, *options]
    finish(each)
    assert table.commands_left(each, "python") == [evaluate]
    write_yardstick(each, 10, tasks={"blimp": "digest"})
    assert table.commands_left(each, "python") == []


def test_the_result_is_the_last_figure(tmp_path):
    each = planned(tmp_path, sample="quick")
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


# -------------------------------------------------------------------------------------------- view


def rows(tmp_path, steps, statuses, sample=""):
    sizes = [("a", 10, 1e12), ("b", 10, 3e12)]
    runs = [planned(tmp_path, *size, sample) for size in sizes]
    found = {each.name: table.row(each, "eval/loss", table.WAITING) for each in runs}
    for name, step, status in zip(found, steps, statuses, strict=True):
        found[name] = found[name]._replace(step=step, status=status)
    return runs, found


def test_the_view_counts_updates_by_what_they_cost(tmp_path, monkeypatch, capsys):
    """a does 1e11 FLOPs an update, b 3e11; 4e12 in all.

    From a at 10 and b at 0 (1e12) to b at 5 (2.5e12) in 60 s: the other 1.5e12 take 60 s more.
    """
    clock = [1000.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: clock[0])
    runs, before = rows(tmp_path, (10, 0), ("done", "waiting"))
    with follow.View(runs, before) as view:
        view.show(before)
        clock[0] += 10
        view.show(rows(tmp_path, (10, 1), ("done", "running"))[1])  # too early for a line
        clock[0] += 50
        view.show(rows(tmp_path, (10, 5), ("done", "running"))[1])
        view.show(rows(tmp_path, (10, 5), ("done", "failed"))[1], last=True)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2 runs done, 0 running",
        "1 of 2 runs done, 1 running, 60 s of training left  b-seed0 5/10",
        "1 of 2 runs done, 0 running, 1 failed",
    ]


def view_line(tmp_path, monkeypatch, capsys, before, after, statuses, sample=""):
    """The last line 60 s after the beginning."""
    clock = [1000.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: clock[0])
    runs, begun = rows(tmp_path, before, ("waiting", "waiting"), sample)
    with follow.View(runs, begun) as view:
        for steps in after:
            clock[0] += 60 / len(after)
            view.show(rows(tmp_path, steps, statuses, sample)[1], last=True)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_goes_back_to_its_checkpoint_has_done_what_it_did_since(
    tmp_path, monkeypatch, capsys
):
    """b from 5 back to 2, then to 4: 6e11 in 60 s; a and the rest of b are 2.8e12 more."""
    after = [(0, 2), (0, 4)]
    line = view_line(tmp_path, monkeypatch, capsys, (0, 5), after, ("waiting", "running"))
    assert ", 5 min of training left" in line


def test_missing_yardsticks_are_counted_beside_the_time(tmp_path, monkeypatch, capsys):
    after = [(10, 10)]
    statuses = ("running", "running")
    line = view_line(tmp_path, monkeypatch, capsys, (0, 0), after, statuses, "quick")
    assert line.startswith("0 of 2 runs done, 2 running, 2 yardsticks left")


def test_only_a_run_that_is_not_tried_again_stays_failed(tmp_path):
    runs = [planned(tmp_path, "a"), planned(tmp_path, "b")]
    table.write(tmp_path, [table.row(each, "eval/loss", table.FAILED) for each in runs])
    follow.Sweep(tmp_path, runs, "eval/loss", ["b-seed0"])
    statuses = {name: row["status"] for name, row in table.read(tmp_path).items()}
    assert statuses == {"a-seed0": "failed", "b-seed0": "waiting"}


def test_a_failure_is_told_while_others_go_on(tmp_path, capsys):
    runs = [planned(tmp_path, "a"), planned(tmp_path, "b")]
    sweep = follow.Sweep(tmp_path, runs, "eval/loss", [each.name for each in runs])
    sweep.log("a-seed0").write_text("why\n")
    told = []

    def started():
        yield {"a-seed0": 3, "b-seed0": None}
        told.append(capsys.readouterr().err)
        yield {"a-seed0": 3, "b-seed0": 1}

    sweep.follow(started(), lambda: False)
    assert f"a-seed0 failed with exit status 3; the end of {sweep.log('a-seed0')}:" in told[0]
    assert "    why\n" in told[0]
    assert "a-seed0" not in capsys.readouterr().err


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
    assert duration(seconds) == text


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
    assert lines[-1] == "About 75 s with 1 at once: by the 1 runs trained so far."


# ---------------------------------------------------------------------------------------- choosing


def test_runs_are_chosen_by_names_variants_and_patterns():
    named = [("quarter", 0), ("quarter", 1), ("three_quarters", 0)]
    runs = [Run(variant, seed, "r", {}) for variant, seed in named]
    names = ["quarter-seed0", "quarter-seed1", "three_quarters-seed0"]
    assert choose(runs, None) == names
    assert choose(runs, "quarter") == names[:2]
    assert choose(runs, "quarter-seed1") == names[1:2]
    assert choose(runs, "*quarter*") == names
    assert choose(runs, "three_quarters,*-seed1") == names[1:]
    for nothing in ("rtd", "", "uarter", "quarter,seed1"):
        with pytest.raises(UserError, match="none of the 3 runs, nor a variant"):
            choose(runs, nothing)
