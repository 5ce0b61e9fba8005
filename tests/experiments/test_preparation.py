"""What the comparison of preparations counts; it needs `datasets` in one test alone."""

import functools
import importlib.util
import subprocess
import sys
import time

import pytest

from configs import base
from experiments.speed import preparation
from experiments.speed.preparation import Round
from pretraining.data import corpus, prepare
from pretraining.errors import UserError

TEXTS = [f"Document {number} is here. It has {number * 7} words!" for number in range(60)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    config = base.get_config()
    config.data.corpus, config.data.cache = str(folder / "text.txt"), str(folder / "cache")
    config.data.validation, config.tokenizer.size = 0.3, 300
    return prepare.prepare(config, processes=1)


_ROUND = dict(seconds=2.0, map_seconds=2.0, cpu_seconds=1.0, ids=3, sample=[[1, 2]], written=5)


def a_round(**changes):
    return Round(**(_ROUND | changes))


def test_stored_ids_are_those_of_the_documents_on_both_sides_of_the_split(prepared):
    assert {corpus.is_validation(text, 0.3) for text in TEXTS} == {True, False}
    found = list(preparation._stored_ids(prepared.train[0][0], TEXTS, 0.3))
    assert found == [prepared.vocabulary.encode(text) for text in TEXTS]


@pytest.mark.parametrize("changes", [dict(ids=4), dict(sample=[[1, 3]])])
def test_other_ids_end_the_comparison(changes):
    sides = {"A prepare": [a_round()], "B datasets.map": [a_round(**changes)]}
    with pytest.raises(UserError, match="the ids of A and B differ"):
        preparation._check_ids(sides)


def test_a_row_is_the_median_of_the_rounds_and_the_most_memory():
    ours = [a_round(seconds=2.0, memory=1)]
    theirs = [
        a_round(seconds=seconds, map_seconds=seconds - 1, cpu_seconds=seconds / 2, memory=memory)
        for seconds, memory in ((9.0, 7e6), (5.0, 3e6), (4.0, 2e6))
    ]
    cells = preparation._row("theirs", theirs, text_bytes=20_000_000)
    assert cells[1:] == ["9.0, 5.0, 4.0", "2.5", "4.0", "5.0", "7 MB", "0.0 MB", "3"]
    assert preparation._ratios(ours, theirs) == ["2.50 x", "2.00 x", "2.50 x"]


def test_only_the_side_of_the_same_ids_has_ratios(prepared):
    slow = [a_round(seconds=6.0, map_seconds=5.0, cpu_seconds=4.0)]
    results = {preparation.A: [a_round()], preparation.B: slow, "C": slow}
    table = preparation._preparation(results, prepared.train[0][0]).split("\n")
    rows = [line.strip("| ").split(" | ") for line in table]
    assert [row[-3:] for row in rows[2:]] == [
        ["-", "-", "-"],
        ["3.00 x", "2.50 x", "4.00 x"],
        ["-", "-", "-"],
    ]


def run_python(script):
    subprocess.run([sys.executable, "-c", script], check=True)


def hold_memory(size):
    run_python(f"import time; held = bytearray(b'x') * {size}; time.sleep(1.0)")
    return a_round(written=7)


def test_memory_is_that_of_the_children_too():
    nothing, much = (
        preparation._elsewhere(functools.partial(hold_memory, size)) for size in (0, 200_000_000)
    )
    assert 150_000_000 < much.memory - nothing.memory < 300_000_000
    assert much.written == 7


BURN = """
import time
while time.process_time() < {seconds}:
    pass
"""


def test_the_clock_counts_this_process_and_its_children():
    start = preparation._clock()
    run_python(BURN.format(seconds=0.4))
    exec(BURN.format(seconds=time.process_time() + 0.2))
    wall, cpu = preparation._clock() - start
    assert cpu >= 0.6
    assert wall >= 0.6


def fail():
    raise SystemExit(3)


def test_a_round_that_dies_is_told():
    with pytest.raises(UserError, match="ended before it had a result"):
        preparation._elsewhere(fail)


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package datasets is missing: pip install datasets"):
        preparation.main("no such file", None, None, None, None)


def test_all_of_it_on_a_short_text(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("transformers")
    monkeypatch.setattr(preparation, "LOADED", ((2, 16),))
    monkeypatch.setattr(preparation, "LOADER_SECONDS", 0.1)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    page = tmp_path / "page.md"
    preparation.main(str(tmp_path / "text.txt"), None, "300", "1", str(page))
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == (2 + 3) + (2 + 1)  # headers and rows of both tables
    assert "in 60 documents; 300 pieces" in printed
    assert page.read_text() == printed
