"""What is decided about an update that went wrong, without a device: every case by hand."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from pretraining import guard
from pretraining.data import loader
from pretraining.data.row import Row
from pretraining.errors import UserError

SEED = {"init": 1, "data": 2}
GOOD = {"finite": True, "loss": 2.0, "gradient_norm": 1.0, "loss_deviation": 0.5}
BAD = {"finite": False, "loss": math.nan, "gradient_norm": math.inf, "loss_deviation": 0.0}
GOOD["skipped_in_a_row"], BAD["skipped_in_a_row"] = 0, 1


class Saved:
    """Checkpoints of which one is the newest."""

    def __init__(self, step):
        self.step = step

    def newest(self):
        return self.step


@pytest.fixture(autouse=True)
def _addresses(monkeypatch):
    """The rows of update n are 10 n and 10 n + 1 of one store and 7 of another."""

    def row_addresses(stores, config, step, skips):
        a, b = pathlib.Path("cache/aa"), pathlib.Path("cache/bb")
        return [(a, 10 * (step + 1)), (b, 7), (a, 10 * (step + 1) + 1)]

    monkeypatch.setattr(loader, "row_addresses", row_addresses)


def rows(places=(0, 1), copy=0) -> Row:
    index = np.array(places, np.int32)
    return Row(
        tokens=np.outer(index + 10, [1, 2]).astype(np.int32),
        length=np.full(index.size, 2, np.int32),
        document=np.zeros((index.size, 2), np.int32),
        boundary=np.ones((index.size, 2), np.uint8),
        index=index,
        copy=np.full(index.size, copy, np.int32),
    )


def make(folder, saved=14, skips=(), **changes):
    config = ConfigDict({"guard": {"non_finite": "stop", "spike": 4.0, "rewinds": 2}, "seed": SEED})
    config.guard.update(changes)
    return guard.Guard(folder, config, None, skips, Saved(saved))


def test_an_ordinary_update_is_none_of_its_business(tmp_path, capsys):
    judge = make(tmp_path).judge
    assert not judge(3, GOOD, rows())
    assert not judge(4, GOOD | {"loss_deviation": 4.0}, rows())  # the limit itself
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_an_update_that_is_not_finite_stops_the_run_with_its_rows(tmp_path):
    with pytest.raises(UserError) as caught:
        make(tmp_path).judge(20, BAD, rows())
    assert str(caught.value) == (
        "update 20 is not finite (loss nan, gradient norm inf) on training rows 200, 201 of store "
        "aa and 7 of store bb; the last checkpoint is that of step 14; to see it again: "
        f"python -m pretraining.replay --workdir={tmp_path} --step=20"
    )
    assert guard.load_batch(tmp_path, 20).figures["loss"] is not None


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    with pytest.raises(UserError, match="the last checkpoint is none;"):
        make(tmp_path, saved=None).judge(3, BAD, rows())


def test_skipping_ends_after_so_many_in_a_row(tmp_path, capsys):
    judge = make(tmp_path, non_finite="skip").judge
    for count in range(1, guard.MOST_SKIPPED):
        assert judge(count, BAD | {"skipped_in_a_row": count}, rows())
    told = capsys.readouterr().out.splitlines()
    assert len(told) == guard.MOST_SKIPPED - 1
    assert told[0].startswith("warning: skipped: update 1 is not finite")
    with pytest.raises(
        UserError, match=r"^20 updates in a row were skipped, .*; update 120 is not"
    ):
        judge(120, BAD | {"skipped_in_a_row": guard.MOST_SKIPPED}, rows())


def test_a_spike_takes_the_run_back_as_often_as_allowed(tmp_path, capsys):
    spike = GOOD | {"loss": 9.0, "loss_deviation": 4.5}
    with pytest.raises(guard.Spike) as caught:
        make(tmp_path, skips=((7, 2),)).judge(20, spike, rows())
    assert (caught.value.step, caught.value.figures["loss"]) == (20, 9.0)
    assert make(tmp_path, skips=((7, 2), (7, 3))).judge(20, spike, rows())
    (first, second) = capsys.readouterr().out.splitlines()
    assert first == second
    assert first == (
        "warning: the loss of update 20, 9, lies 4.5 standard deviations above its average "
        f"(config.guard.spike=4.0) in {tmp_path}"
    )
    kept = guard.load_batch(tmp_path, 20)
    assert kept.skips == [[7, 2], [7, 3]]


def test_no_spike_is_looked_for(tmp_path):
    wild = GOOD | {"loss_deviation": 1e9}
    assert not make(tmp_path, spike=0.0, rewinds=0).judge(20, wild, rows())
    assert not (tmp_path / guard.OFFENDING).exists()


def test_a_long_list_of_rows_is_cut(tmp_path, monkeypatch):
    many = [(pathlib.Path("aa"), number) for number in range(40)]
    monkeypatch.setattr(loader, "row_addresses", lambda *_: many)
    with pytest.raises(UserError, match=r"rows 0, 1, .*, 15, \.\.\. \(40 in all\) of store aa;"):
        make(tmp_path).judge(20, BAD, rows())


def test_a_batch_is_kept_as_it_was(tmp_path):
    guard.save_batch(tmp_path, guard.Batch(20, BAD, rows(), SEED, ((7, 2),)))
    kept = guard.load_batch(tmp_path, 20)
    assert (kept.step, kept.seed, kept.skips) == (20, SEED, [[7, 2]])
    assert math.isnan(kept.figures["loss"])
    assert kept.figures["gradient_norm"] == math.inf
    for field, wanted in zip(kept.rows, rows(), strict=True):
        np.testing.assert_array_equal(field, wanted)
        assert field.dtype == wanted.dtype
    assert guard.load_batch(tmp_path, 21) is None


def test_the_rows_of_all_processes_are_put_together(tmp_path, monkeypatch):
    """Processes 0 and 1 read places 0, 2 and 2, 3, in two copies."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, places in ((0, (0, 2)), (1, (2, 3))):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        both = [np.concatenate(pair) for pair in zip(rows(places), rows(places, 1), strict=True)]
        guard.save_batch(tmp_path, guard.Batch(20, GOOD, Row(*both), SEED, ()))
    kept = guard.load_batch(tmp_path, 20).rows
    assert kept.index.tolist() == [0, 0, 2, 2, 3, 3]
    assert kept.copy.tolist() == [0, 1, 0, 1, 0, 1]
    assert kept.tokens[:, 1].tolist() == [20, 20, 24, 24, 26, 26]


def test_a_step_that_goes_wrong_again_after_a_rewind_is_another_batch(tmp_path):
    for skips in ((), ((7, 2),)):
        guard.save_batch(tmp_path, guard.Batch(20, GOOD, rows((len(skips),)), SEED, skips))
    assert guard.load_batch(tmp_path, 20).rows.index.tolist() == [1]
    assert len(list((tmp_path / guard.OFFENDING).glob("20-*.json"))) == 2


def test_so_many_batches_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_KEPT", 3)
    for step in range(1, 6):
        guard.save_batch(tmp_path, guard.Batch(step, GOOD, rows(), SEED, ()))
    assert [guard.load_batch(tmp_path, step) is not None for step in range(1, 6)] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("content", [None, b"", b"PK\x05\x06" + bytes(18), b"nonsense"])
def test_a_damaged_batch_is_said_so(content, tmp_path):
    guard.save_batch(tmp_path, guard.Batch(20, GOOD, rows(), SEED, ()))
    (file,) = (tmp_path / guard.OFFENDING).glob("*.npz")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="offending/20-0.* is damaged"):
        guard.load_batch(tmp_path, 20)


def test_damaged_rewinds_are_said_so(tmp_path):
    (tmp_path / guard.REWINDS).write_text('{"spike": 3')
    with pytest.raises(UserError, match=r"rewinds.jsonl is damaged"):
        guard.read_rewinds(tmp_path)


def test_a_rewind_beyond_an_earlier_one_skips_all_that_was_read():
    """Batches 0 to 199 and 205 to 234 were read when the run goes from update 230 back to 100."""
    spike = guard.Spike(230, GOOD)
    earlier = [{"checkpoint": 200, "skipped_batches": 5}]
    skips = guard.skips(guard.add_rewind(earlier, spike, 100))
    assert [loader.batch_number(step, skips) for step in (99, 100, 104)] == [99, 235, 239]
    assert loader.batch_number(200, skips) > loader.batch_number(199, skips)


def test_rewinds_are_noted_one_after_the_other(tmp_path, capsys):
    assert guard.read_rewinds(tmp_path) == []
    spike = GOOD | {"loss": 9.0, "loss_deviation": 4.5}
    once = guard.rewind(tmp_path, [], guard.Spike(20, spike), 14)
    assert once == guard.read_rewinds(tmp_path)
    twice = guard.rewind(tmp_path, once, guard.Spike(25, spike | {"loss": 8.0}), 21)
    assert twice == guard.read_rewinds(tmp_path) == list(map(json.loads, lines(tmp_path)))
    assert twice[0] == once[0]
    assert twice[1] == {
        "spike": 25,
        "checkpoint": 21,
        "skipped_batches": 4,
        "loss": 8.0,
        "loss_deviation": 4.5,
    }
    assert guard.skips(twice) == ((14, 6), (21, 4))
    assert "back from update 25 to the checkpoint of step 21; the 4 batches" in (
        capsys.readouterr().out
    )


def lines(folder):
    return (folder / guard.REWINDS).read_text().splitlines()
