"""An update of a run is made again, and nothing in the run changes.

Updates that went wrong are replayed in the fault tests.
"""

import hashlib
import types

import numpy as np
import pytest

from pretraining import replay
from pretraining.data.row import Row
from pretraining.errors import UserError
from tests.faults import bench, updates


def state_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("step", [1, 24])
def test_an_update_is_made_again_bit_for_bit(step, trained, tmp_path):
    """From step 0, and from the checkpoint of step 14: in the process of a user."""
    folder = trained["masked_lm"]
    before = state_of(folder)
    own = bench.Bench(tmp_path, "masked_lm", {}, None)
    assert updates.replay_complaints(own, folder, step, kept=False) == []
    assert state_of(folder) == before


@pytest.mark.parametrize(
    "step, message",
    [
        ("41", "--step=41: the run has 40 updates"),
        ("0", "--step='0': a whole number of at least 1"),
        ("last", "--step='last'"),
    ],
)
def test_updates_that_are_none(step, message, trained):
    with pytest.raises(UserError, match=message):
        replay.main(str(trained["masked_lm"]), step, None)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        replay.main(str(tmp_path), "1", None)


def test_rows_that_are_not_finite_come_first(capsys):
    """Four places, two copies each of two rows; the second row is row 8 of its store."""
    tokens = np.arange(8).reshape(4, 2)
    batch = Row(tokens, None, None, None, None, None)
    losses = np.array([1.0, 3.0, -np.inf, 2.0])
    vocabulary = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    store = types.SimpleNamespace(name="aa")
    replay._print_rows(losses, batch, [(store, 5), (store, 8)], vocabulary, 2, 3)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 4 rows have a loss that is not finite",
        "  loss -inf: row 8 of store aa: '4 5'...",
        "  loss 3: row 5 of store aa: '2 3'...",
        "  loss 2: row 8 of store aa: '6 7'...",
    ]


def test_parameters_are_named_by_their_gradients(capsys):
    finite = {"encoder": {f"layer_{number:02}": number % 2 == 0 for number in range(30)}}
    replay._print_gradients(finite)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "15 of 30 parameters have a gradient that is not finite"
    assert told[1:3] == ["  encoder/layer_01", "  encoder/layer_03"]
    assert len(told) == 2 + replay.SHOWN
    assert told[-1] == "  ... and 3 more"


def test_what_is_not_as_it_was_is_said(capsys):
    rows = Row(*(np.zeros(2) for _ in Row._fields))
    others = rows._replace(tokens=np.ones(2))
    kept = types.SimpleNamespace(figures={"loss": 1.0, "norm": float("nan")}, rows=rows)
    replay._print_figures({"loss": 1.5, "norm": float("nan"), "new": 2.0}, kept, others)
    assert capsys.readouterr().out.splitlines() == [
        f"  {'loss':<24} 1.5  then 1.0, NOT equal",
        f"  {'new':<24} 2.0",
        f"  {'norm':<24} nan  then nan, equal",
        "  the rows are NOT those that were kept",
    ]
