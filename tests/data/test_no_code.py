"""Nothing that is read from a store, a vocabulary or a corpus is ever executed."""

import hashlib
import io
import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pretraining.data import cache, prepare, store
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError

# Python reports what could execute code to audit hooks, whichever module or C library asks.
SCRIPT = """
import pathlib, pickle, sys
import numpy as np
from pretraining.data import store, text_files, tokenizer
from configs import base

folder, model, jsonl, parquet = map(pathlib.Path, sys.argv[1:])

def read():
    opened = store.open_store(folder)
    for split in (opened.train, opened.validation):
        split.read(range(split.rows(9)), 9)
        list(split.encoded(0))
    opened.vocabulary.encode_document("first last")
    tokenizer.load_model(model).encode("text")
    tokenizer.Vocabulary.load(model)
    for path in (jsonl, parquet):
        list(text_files.read(path, base.get_config().data))

read()  # imports what it needs
calls = []
watched = ("pickle.find_class", "marshal.loads", "marshal.load", "exec", "import",
           "os.system", "subprocess.Popen")

def hook(event, arguments):
    if event in watched:
        calls.append((event, str(arguments)[:80]))

sys.addaudithook(hook)
tokenizer._load.cache_clear()
read()
print(calls)
pickle.loads(b"cos\\ngetcwd\\n.")  # which the hook must see
print(calls[-1][0])
"""


@pytest.fixture
def opened(config) -> store.Store:
    return prepare.prepare(config).train[0][0]


def test_reading_executes_nothing(config, opened, model, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["first"]}), tmp_path / "a.parquet")
    paths = [opened.folder, model, config.data.corpus, tmp_path / "a.parquet"]
    words = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "pickle.find_class"]


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(Bomb.place),)


def test_a_pickle_in_a_vocabulary_is_refused(model, tmp_path):
    """Even where every checksum fits, as a stranger would make it."""
    Bomb.place = str(tmp_path / "executed")
    vocabulary = Vocabulary.load(model)
    vocabulary.save(tmp_path / "vocabulary")
    content = io.BytesIO()
    np.save(content, np.array([Bomb()], object), allow_pickle=True)
    check_refused(tmp_path / "vocabulary", content.getvalue())
    check_refused(tmp_path / "vocabulary", pickle.dumps(Bomb()))
    assert not (tmp_path / "executed").exists()


def check_refused(folder: pathlib.Path, content: bytes):
    (folder / "unigram_counts.npy").write_bytes(content)
    description = json.loads((folder / "vocabulary.json").read_text())
    description["sha256"]["unigram_counts.npy"] = hashlib.sha256(content).hexdigest()
    (folder / "vocabulary.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="vocabulary.json is damaged"):
        Vocabulary.load(folder)


def test_a_pickle_in_place_of_the_offsets_is_refused(opened):
    (opened.folder / "train" / "offsets").write_bytes(pickle.dumps(Bomb))
    with pytest.raises(UserError, match="train/offsets has"):
        store.open_store(opened.folder)
    assert cache.verify(opened.folder) != []
