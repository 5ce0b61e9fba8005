"""Sources that change while they are prepared: nothing is kept under the old text's address."""

import json
import pathlib

import pytest

from pretraining.data import prepare, store
from pretraining.errors import UserError


def write_corpus(path: pathlib.Path, name: str) -> str:
    path.write_text("".join(json.dumps({"text": f"{name} {i}."}) + "\n" for i in range(200)))
    return str(path)


@pytest.fixture
def config(config, tmp_path):
    config.data.corpus = tuple(write_corpus(tmp_path / f"{name}.jsonl", name) for name in "ab")
    return config


def change_at(monkeypatch, owner, name: str, path: pathlib.Path):
    """Another text in the file, when a function is called."""
    original = getattr(owner, name)

    def call(*arguments):
        write_corpus(path, "another")
        return original(*arguments)

    monkeypatch.setattr(owner, name, call)


def complete(config, kind: str) -> int:
    return len(list(pathlib.Path(config.data.cache).glob(f"{kind}/*/manifest.json")))


@pytest.mark.parametrize(
    "changed, stores",
    [
        ("a.jsonl", 0),  # the one that is being read
        ("b.jsonl", 1),  # the one that comes next: its address is known already
    ],
)
def test_while_a_store_is_written(config, tmp_path, monkeypatch, changed, stores):
    change_at(monkeypatch, store, "write", tmp_path / changed)
    with pytest.raises(UserError, match=f"{changed}' changed while it was being prepared"):
        prepare.prepare(config)
    assert complete(config, "stores") == stores


def test_while_a_share_is_written(config, tmp_path, monkeypatch):
    change_at(monkeypatch, store, "write", tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="b.jsonl' changed while it was being prepared"):
        prepare.prepare_share(config, prepare.Share(0, 1))
    assert complete(config, "stores/*.shares-1") == 1


def test_while_a_tokenizer_is_trained(config, tmp_path, monkeypatch):
    config.tokenizer.model, config.tokenizer.kind, config.tokenizer.size = "", "bpe", 280
    change_at(monkeypatch, prepare.tokenizer, "train", tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="b.jsonl' changed while it was being prepared"):
        prepare.prepare(config)
    assert complete(config, "tokenizers") == 0
