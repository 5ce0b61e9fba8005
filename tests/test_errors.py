"""A mistake costs one clear line, before anything is compiled, and loses nothing.

Mistakes of one part are tested with that part, malformed configs in test_hostile_configs.py; here
are those that a whole command meets with its data and its run folder.
"""

import shutil

import pytest

from pretraining import config as config_lib
from pretraining import metrics, run_folder, train
from pretraining.errors import UserError

pytestmark = pytest.mark.usefixtures("never_compile")


def refusal(overrides, folder) -> str:
    config = config_lib.load("configs/masked_lm.py:tiny", overrides)
    with pytest.raises(UserError) as caught:
        train.main(config, str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    config = config_lib.load("configs/masked_lm.py:tiny", {"log.wandb": "project"})
    with pytest.raises(UserError, match=r"config.log.wandb='project' .*\[wandb\]"):
        metrics.check(config)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"data.corpus": "not/there.txt"}, ["not/there.txt"]),
        ({"data.corpus": "not/*.jsonl.xz"}, ["not/*.jsonl.xz"]),
        ({"data.corpus": "tfds:no_such_dataset:train"}, ["no_such_dataset"]),
        ({"data.corpus": (("{small}", 0.0),)}, ["weight"]),
        ({"tokenizer.size": 60_000}, ["config.tokenizer.size=60000"]),
        ({"tokenizer.model": "no.model"}, ["no.model"]),
        ({"data.sequence_length": 100_000}, ["fewer than a row"]),
        ({"train.batch_size": 4096}, ["fewer than the 4096", "train.batch_size=4096"]),
        ({"data.corpus": "{empty}"}, ["empty.txt", "no document"]),
        ({"data.corpus": "{binary}"}, ["binary.txt", "byte 4"]),
    ],
)
def test_what_is_wrong_with_the_data_is_named(
    changes, parts, small_overrides, small_corpus, tmp_path
):
    files = {
        "small": small_corpus,
        "empty": tmp_path / "empty.txt",
        "binary": tmp_path / "binary.txt",
    }
    files["empty"].write_text("\n\n")
    files["binary"].write_bytes(b"text\xff\xfe")

    def fill(value):
        if isinstance(value, tuple):
            return tuple(map(fill, value))
        return value.format(**files) if isinstance(value, str) else value

    changes = {key: fill(value) for key, value in changes.items()}
    message = refusal(small_overrides | changes, tmp_path / "run")
    for part in parts:
        assert part in message


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of a finished run, to be spoiled."""
    shutil.copytree(trained["masked_lm"], tmp_path / "run")
    return tmp_path / "run"


def test_another_config_is_refused_with_every_difference(finished, run_overrides):
    changes = {"seed.data": 5, "objective.mask_rate": 0.4, "log.every": 7, "checkpoint.keep": 9}
    before = (finished / metrics.FILE).read_text()
    message = refusal(run_overrides | changes, finished)
    assert "seed.data: 0 -> 5" in message
    assert "objective.mask_rate: 0.15 -> 0.4" in message
    assert "log.every" not in message
    assert (finished / metrics.FILE).read_text() == before


def test_other_data_is_refused(finished, run_overrides, small_corpus, tmp_path):
    moved = tmp_path / "other.txt"
    moved.write_text(small_corpus.read_text() + "\n\none more document")
    message = refusal(run_overrides | {"data.corpus": str(moved)}, finished)
    assert "data.corpus" in message
    config = run_folder.stored_config(finished)
    with config.unlocked():
        config.data.corpus = str(moved)
    (finished / run_folder.CONFIG).write_text(config_lib.to_json(config))
    message = refusal(run_overrides | {"data.corpus": str(moved)}, finished)
    assert "another tokenizer" in message
    model = finished / run_folder.VOCABULARY / "tokenizer.model"
    with config.unlocked():
        config.tokenizer.model = str(model)
    (finished / run_folder.CONFIG).write_text(config_lib.to_json(config))
    overrides = run_overrides | {"data.corpus": str(moved), "tokenizer.model": str(model)}
    assert "other data" in refusal(overrides, finished)


def test_durations_that_change_the_past_are_refused(finished, run_overrides):
    message = refusal(run_overrides | {"train.steps": 80}, finished)
    assert "train.steps: 40 -> 80" in message
    assert "at step 40" in message


def test_a_damaged_store_is_refused(finished, run_overrides, tmp_path):
    shutil.copytree(run_overrides["data.cache"], tmp_path / "cache")
    overrides = run_overrides | {"data.cache": str(tmp_path / "cache")}
    shards = [
        p for p in (tmp_path / "cache" / "stores").rglob("*") if p.is_file() and "c" in p.parts
    ]
    for shard in shards:
        shard.unlink()
    message = refusal(overrides, finished)
    assert str(tmp_path / "cache") in message


def test_two_processes_cannot_train_in_one_folder(finished, run_overrides):
    with run_folder.lock(finished):
        assert "another process is training in it" in refusal(run_overrides, finished)
