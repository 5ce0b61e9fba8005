"""A corpus read back from its store, text for text."""

import json
import pathlib

import numpy as np
import pytest

from configs import base
from pretraining.data import cache, prepare, tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> pathlib.Path:
    """A tokenizer that gives back every text as it was."""
    config = base.get_config().tokenizer
    config.size, config.kind, config.normalization = 300, "bpe", "identity"
    folder = tmp_path_factory.mktemp("model")
    tokenizer.train(["A document has text. first last"] * 9, config).save(folder)
    return folder


@pytest.fixture
def config(model, tmp_path):
    """A good corpus and a tokenizer; `evaluate.sets` is for another corpus."""
    config = base.get_config()
    good = [json.dumps({"text": f"Number {i}."}) for i in range(50)]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    config.data.corpus = str(tmp_path / "good.jsonl")
    config.data.cache = str(tmp_path / "cache")
    config.data.validation = 0.5
    config.data.workers = 1
    config.tokenizer.model = str(model)
    return config


@pytest.fixture
def read():
    """The function (config, source) -> (documents, counts of what was left out)."""
    return _read


def _read(config, source) -> tuple[list[str], dict[str, int]]:
    """(documents, counts of what was left out) of a corpus, from its store."""
    config.evaluate.sets = (("bad", str(source)),)
    prepared = prepare.prepare(config)
    opened = prepared.sets["bad"]
    split = opened.validation
    row = split.read([0], split.n_tokens)
    ends = np.flatnonzero(row.tokens[0] == prepared.vocabulary.eos)
    documents = np.split(row.tokens[0], ends + 1)[:-1]
    texts = [prepared.vocabulary.decode(document) for document in documents]
    assert opened.manifest["splits"]["validation"]["documents"] == len(texts)
    assert cache.verify(opened.folder) == prepare.find_problems(config) == []
    return texts, opened.manifest["skipped"]
