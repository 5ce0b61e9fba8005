"""What is told of starts, with processes in their place that take no time."""

import json
import pathlib

import pytest

from experiments.speed import fresh, start
from experiments.speed.start import Start, Timed
from pretraining.errors import UserError


def test_the_first_update_is_all_that_the_first_line_counts(tmp_path, monkeypatch):
    def train(module, *words, **environment):
        assert module == "pretraining.train"
        assert environment == {"PRETRAINING_CACHE": "here"}
        lines = [
            {"step": 1, "loss": 9.0, "time/total/start": 4.0, "time/total/step": 0.5},
            {"step": 2, "loss": 8.0, "time/total/start": 4.0, "time/total/step": 64.0},
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return Timed(wall=99.0, cpu=7.0)

    monkeypatch.setattr(start, "_run", train)
    found = start.first_update("recipe", tmp_path, {"PRETRAINING_CACHE": "here"})
    assert found == Start(4.5, {"start": 4.0, "step": 0.5}, 7.0)


@pytest.fixture
def store(monkeypatch, tmp_path):
    """The cache of a user who has chosen no other place for what is compiled."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(fresh.cache, "root", lambda data: tmp_path / "root")
    return tmp_path / "root"


@pytest.mark.usefixtures("store")
def test_a_second_start_finds_what_the_cold_one_compiled(monkeypatch):
    """The median of three of each, by their totals, and the phases of that one."""
    cold, second, caches = [3.0, 9.0, 5.0], [2.0, 1.0, 8.0], []
    seconds = [x for pair in zip(cold, second, strict=True) for x in pair]

    def update(recipe, workdir, environment):
        caches.append(environment["PRETRAINING_CACHE"])
        total = seconds[len(caches) - 1]
        return Start(total, dict.fromkeys(start.PHASES, total / 4), cpu=2 * total)

    monkeypatch.setattr(start, "_run", lambda *words, **environment: None)
    monkeypatch.setattr(start, "objective_names", lambda: ["masked_lm"])
    monkeypatch.setattr(start, "first_update", update)
    header, *rows = start._first_updates(3)
    assert [row[:3] for row in rows] == [("masked_lm", "cold", 5.0), ("masked_lm", "second", 2.0)]
    assert rows[0][3:] == (*[1.25] * 4, 10.0)
    assert len(header) == len(rows[0])
    assert caches[::2] == caches[1::2]
    assert len(set(caches)) == 3


def test_only_what_is_compiled_is_hidden(store, monkeypatch, tmp_path):
    for name in ("stores", "tokenizers", "compiled"):
        (store / name).mkdir(parents=True)
        (store / name / "file").touch()
    root = pathlib.Path(fresh.environment(tmp_path / "cache")["PRETRAINING_CACHE"])
    assert sorted(path.name for path in root.iterdir()) == ["stores", "tokenizers"]
    assert (root / "stores" / "file").exists()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    with pytest.raises(UserError, match="JAX_COMPILATION_CACHE_DIR=theirs: unset it"):
        fresh.environment(tmp_path / "other")


def test_depths_are_medians_and_their_ratio(monkeypatch):
    seconds = {("scanned", 12): [2, 7, 3], ("scanned", 24): [9, 3, 1]}
    seconds |= {("unrolled", 12): [5, 5, 4], ("unrolled", 24): [10, 20, 0]}
    monkeypatch.setattr(
        start, "compile_seconds", lambda layers, execution: seconds[execution, layers].pop()
    )
    _, *rows = start._depths(3)
    assert rows == [("scanned", 3, 3, 1.0), ("unrolled", 5, 10, 2.0)]


BURNS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(f"{os.environ.get('JAX_PLATFORMS')} {os.getcwd()}")
while time.process_time() < 0.5:
    pass
"""


def test_a_process_is_timed_without_the_variables_of_jax(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "burns.py").write_text(BURNS)
    found = start._run("burns", str(tmp_path / "note"))
    assert (tmp_path / "note").read_text() == f"None {start.ROOT}"
    assert found.cpu >= 0.5
    assert found.wall >= 0.4


def test_a_process_that_fails_is_told_with_its_words():
    with pytest.raises(UserError, match=r"-m absent --times=3: .*No module named absent"):
        start._run("absent", "--times=3")
