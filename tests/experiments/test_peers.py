"""The comparison with transformers, without it: our side stands in its place."""

import ast
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.speed import peers
from experiments.speed.peers import Measured, Side
from experiments.speed.sides import memory, ours, tokens
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


# What the classes of transformers are: BERT's and ELECTRA's segment types, GPT-2's layers.
NETWORKS = {
    "masked_lm": {"model.segments": 2},
    "causal_lm": {
        "model.norm_order": "pre",
        "model.norm_epsilon": 1e-5,
        "model.activation": "gelu_tanh",
        "model.embedding_norm": False,
        "model.position_init_std": 0.01,
        "model.head_transform": False,
        "model.head_bias": False,
    },
    "replaced_token_detection": {"model.segments": 2},
    "permutation_lm": {},
}


@pytest.mark.parametrize("objective", peers.TITLES)
def test_the_recipes_are_electra_small(objective):
    """Those of size small, but for the vocabulary, the batch, and what makes them the peer's."""
    config = ours.make_config(Task(objective, "", **peers.ELECTRA_SMALL))
    recipe = config_lib.load(f"configs/{objective}.py:small")
    changed = config_lib.differences(recipe, config)
    network = NETWORKS[objective]
    assert changed.keys() <= {"tokenizer.size", "train.batch_size"} | network.keys()
    found = config_lib.flatten(config.to_dict())
    assert {key: found[key] for key in network} == network
    assert config.objective.get("mask_rate", 0.15) == 0.15
    model = config.model
    assert (model.layers, model.width, model.heads, model.mlp_width) == (12, 256, 4, 1024)
    assert (model.dropout, model.attention_dropout, model.dtype) == (0.1, 0.1, "float32")
    assert (config.tokenizer.size, config.train.batch_size) == (32_000, 32)
    assert (config.data.sequence_length, config.optimizer.name) == (128, "adamw")
    assert config.objective.get("generator_size", 0.25) == 0.25


def test_sides_take_turns_and_are_told_of():
    started = [stand_in(peers.OURS), stand_in(peers.PEER)]
    measured = peers.measure("masked_lm", SMALL, started, rounds=2, steps=3)
    assert [list(turns) for turns in measured.rounds] == [["ours", "transformers"]] * 2
    for turns in measured.rounds:
        for answer in turns.values():
            assert len(answer["seconds"]) == len(answer["waits"]) == 3
            assert all(0 < w < s for w, s in zip(answer["waits"], answer["seconds"], strict=True))
            assert not answer["memory"] <= 2**26  # it may be unknown
    assert min(measured.peaks) > 0
    assert measured.flops_per_s() > 0
    first = [facts["first_loss"] for facts in measured.facts.values()]
    assert first[0] == first[1] == pytest.approx(np.log(400), rel=0.02)

    speeds, checks, notes = peers.report([measured]).split("\n\n", 2)
    assert notes.startswith("2 rounds of 3 steps")
    assert speeds == peers.table([measured])
    parameters = cells(checks)["MLM (BERT)"][2].split(" / ")
    assert parameters[0] == parameters[1]


def a_turn(seconds, waits=(0.0, 0.0), memory=2.0**30):
    return {"seconds": seconds, "waits": waits, "memory": memory}


def by_hand(rounds):
    """8 tokens and 60 FLOPs a step; a peak of 100 FLOP/s."""
    fact = {"flops": 60.0, "parameters": 1, "first_loss": 1.0}
    return Measured("masked_lm", 8, dict.fromkeys(rounds[0], fact), rounds, [90.0, 100.0], 0.25)


def test_figures_by_hand():
    """8 tokens a step; ours takes 1 and 2 s a step, the two others 4 and 4 s, and 3 and 5 s."""

    measured = by_hand(
        [
            {"ours": a_turn([1, 1], [0.25, 0.05]), "a": a_turn([4, 4]), "b": a_turn([3, 3])},
            {"ours": a_turn([2, 2]), "a": a_turn([4, 4]), "b": a_turn([4, 6])},
        ]
    )
    assert measured.rates("ours") == [8.0, 4.0]
    assert measured.rates("b") == [8 / 3, 8 / 5]
    assert measured.ratios("b") == pytest.approx([3.0, 2.5])
    assert measured.data_wait("ours") == pytest.approx(0.3 / 6)
    assert measured.flops_per_s() == 60 * 6 / 8  # the median of 8 and 4 tokens/s


def test_each_side_has_a_row_of_its_own_and_the_headline_is_the_plain_one():
    """8 tokens a step in 1 s (ours), 4 and 3 s (the class, large pages), 2 s (head gathered)."""
    turns = {
        "ours": a_turn([1, 1]),
        peers.PEER: a_turn([4, 4]),
        peers.PEER_LARGE_PAGES: a_turn([2, 4], memory=3 * 2.0**30),
        peers.GATHERED: a_turn([2, 2], memory=math.nan),
    }
    report = peers.report([by_hand([turns])])
    speeds, checks = (cells(part) for part in report.split("\n\n")[:2])
    plain = "MLM (BERT)"
    large = f"{plain}, large pages too"
    assert list(speeds) == list(checks) == [plain, large, f"{large}, its head at the labels"]
    headline, paged, gathered = speeds.values()
    assert headline[:3] == ["8 (8 to 8)", "2 (2 to 2)", "4.00 (4.00 to 4.00)"]
    assert paged[:3] == ["8 (8 to 8)", "3 (3 to 3)", "3.00 (3.00 to 3.00)"]
    assert gathered[:3] == ["8 (8 to 8)", "4 (4 to 4)", "2.00 (2.00 to 2.00)"]
    assert headline[4:] == ["60.0%", "1.00 / 1.00"]
    assert (paged[5], gathered[5]) == ("1.00 / 3.00", "1.00 / unknown")
    assert checks[plain][2:] == ["1 / 1", "1.00 / 1.00", "25.0%"]


def test_the_gathered_head_is_that_of_the_class():
    """Without dropout its loss and gradients are those of BertForMaskedLM."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from experiments.speed.sides import gathered_head, hugging_face

    torch.manual_seed(0)
    task = Task("masked_lm", "", **SMALL | {"dropout": 0.0})
    whole, *_ = hugging_face.BUILD["masked_lm"](task)
    rows = torch.randint(5, 400, (4, 32))
    labels = torch.where(torch.rand(4, 32) < 0.2, rows, hugging_face.IGNORED)
    found = []
    for model in (whole, gathered_head.AtLabels(whole)):
        loss = model(input_ids=rows, labels=labels)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(found[0]) > 30
    for expected, here in zip(*found, strict=True):
        torch.testing.assert_close(here, expected, rtol=1e-5, atol=1e-6)


def test_only_masked_lm_has_the_gathered_head():
    names = {name: [side.name for side in peers.sides("python", name)] for name in peers.TITLES}
    assert [name for name, found in names.items() if peers.GATHERED in found] == ["masked_lm"]


def test_a_peak_is_unknown_where_the_system_does_not_forget_one(monkeypatch):
    def refuse(self, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    peak = memory.Peak()
    assert math.isnan(peak.held)
    assert math.isnan(peak.bytes())


def test_a_peak_is_that_from_now_on():
    before = memory.Peak()
    if math.isnan(before.held):
        pytest.skip("the system does not forget one")
    assert before.bytes() > 2**26
    np.ones(2**25).sum()  # 256 MiB, given back
    assert before.bytes() - before.held > 2**27
    after = memory.Peak()
    assert after.bytes() - after.held < 2**27


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
