"""The comparison with transformers, without it: our side stands in its place."""

import ast
import pathlib
import statistics
import subprocess
import sys

import numpy as np
import pytest

from experiments.speed import peers
from experiments.speed.peers import Measured, Side
from experiments.speed.sides import ours, tokens
from experiments.speed.sides.worker import Task
from pretraining import config as config_lib
from pretraining.data import store
from pretraining.errors import UserError
from tests import running

SMALL = peers.ELECTRA_SMALL | dict(
    layers=2, width=32, mlp_width=64, vocabulary_size=400, batch_size=4, sequence_length=32
)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(running.ROOT)
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a side has it


def stand_in(name):
    return Side(name, sys.executable, "experiments.speed.sides.ours", {})


def cells(table):
    """{title: cells} of the rows of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.split("\n")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("objective", peers.TITLES)
def test_the_recipes_are_electra_small(objective):
    """Those of size small, but for the vocabulary, the batch, and what makes them the peer's."""
    config = ours.make_config(Task(objective, "", **peers.ELECTRA_SMALL))
    recipe = config_lib.load(f"configs/{objective}.py:small")
    changed = config_lib.differences(recipe, config)
    network = ours.LIKE_PEER[objective].keys()
    assert changed.keys() <= {"tokenizer.size", "train.batch_size"} | network
    model = config.model
    assert (model.layers, model.width, model.heads, model.mlp_width) == (12, 256, 4, 1024)
    assert (model.dropout, model.attention_dropout, model.dtype) == (0.1, 0.1, "float32")
    assert (config.tokenizer.size, config.train.batch_size) == (32_000, 32)
    assert (config.data.sequence_length, config.optimizer.name) == (128, "adamw")
    assert config.objective.get("generator_size", 0.25) == 0.25


def test_sides_take_turns_and_are_told_of():
    started = [stand_in(peers.OURS), stand_in("other")]
    measured = peers.measure("masked_lm", SMALL, started, rounds=2, steps=3)
    assert [list(turns) for turns in measured.rounds] == [["ours", "other"]] * 2
    for turns in measured.rounds:
        for answer in turns.values():
            assert len(answer["seconds"]) == len(answer["waits"]) == 3
            assert all(0 < w < s for w, s in zip(answer["waits"], answer["seconds"], strict=True))
            assert answer["memory"] > 2**26
    assert min(measured.peaks) > 0
    assert measured.flops_per_s() > 0
    first = [facts["first_loss"] for facts in measured.facts.values()]
    assert first[0] == first[1] == pytest.approx(np.log(400), rel=0.02)

    text = peers.report([measured], "the command")
    _, command, speeds, checks, notes = text.split("\n\n", 4)
    assert command == "    the command"
    row = cells(speeds)["MLM (BERT)"]
    assert len(row) == speeds.split("\n")[0].count(" | ")
    assert row[0].startswith(f"{statistics.median(measured.rates('ours')):,.0f} (")
    assert row[2].startswith(f"{statistics.median(measured.ratios()):.2f} (")
    assert notes.startswith("2 rounds of 3 steps")
    parameters = cells(checks)["MLM (BERT)"][3].split(" / ")
    assert parameters[0] == parameters[1]


def test_figures_by_hand():
    """8 tokens a step; ours takes 1 and 2 s a step, the two others 4 and 4 s, and 3 and 5 s."""

    def turn(seconds, waits=(0.0, 0.0)):
        return {"seconds": seconds, "waits": waits, "memory": 2**30}

    rounds = [
        {"ours": turn([1.0, 1.0], [0.25, 0.05]), "a": turn([4.0, 4.0]), "b": turn([3.0, 3.0])},
        {"ours": turn([2.0, 2.0], [0.0, 0.0]), "a": turn([4.0, 4.0]), "b": turn([4.0, 6.0])},
    ]
    fact = {"flops": 60.0, "parameters": 1, "first_loss": 1.0, "versions": {}}
    measured = Measured("masked_lm", 8, dict.fromkeys(["ours", "a", "b"], fact), rounds, [], 0.0)
    assert measured.rates("ours") == [8.0, 4.0]
    assert measured.rates("b") == [8 / 3, 8 / 5]
    assert measured.peer() == "b"  # a median of 2.13 tokens/s against 2
    assert measured.ratios() == pytest.approx([3.0, 2.5])
    assert measured.data_wait("ours") == pytest.approx(0.3 / 6)
    assert measured.flops_per_s() == 60 * 6 / 8  # the median of 8 and 4 tokens/s


def test_both_sides_read_the_same_tokens(tmp_path):
    tokens.write(tmp_path, 400, 1800)
    split = store.open_store(tmp_path / "store").train
    array = np.load(tmp_path / "tokens.npy")
    assert array.size == split.n_tokens == 1800
    np.testing.assert_array_equal(split.read([0], 1800).tokens[0], array)
    special = np.flatnonzero(array < 5)
    assert special.tolist() == [499, 999, 1499, 1799]  # the ends of documents
    assert set(array[special]) == {3}
    assert array.max() == 399


def test_an_interpreter_without_torch_is_refused(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"cannot import torch and transformers \(.*'torch'\)"):
        peers.main(str(bare), None, None, None, None)
    with pytest.raises(UserError, match="nowhere.*No such file"):
        peers.main(str(tmp_path / "nowhere"), None, None, None, None)


def test_an_unknown_objective_is_refused():
    with pytest.raises(UserError, match="--objectives='mlm': masked_lm, causal_lm"):
        peers.main(None, None, None, "mlm", None)


def test_a_side_that_ends_is_told():
    broken = Side("other", sys.executable, "experiments.speed.sides.absent", {})
    with pytest.raises(UserError, match="the side 'other' ended with status 1"):
        peers.measure("masked_lm", SMALL, [broken], rounds=1, steps=1)


def test_the_peer_imports_nothing_of_the_project():
    """It runs under an interpreter that need not have JAX."""
    serving = "import experiments.speed.sides.worker"
    subprocess.run([sys.executable, "-S", "-c", serving], check=True)  # no packages at all
    source = pathlib.Path(ours.__file__).with_name("hugging_face.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in names if name.split(".")[0] in ("experiments", "pretraining")} == {
        "experiments.speed.sides",
        "experiments.speed.sides.worker",
    }
    assert not {name for name in names if name.startswith(("jax", "flax", "objectives"))}
