"""Sources: what is a document, what is an error, and that nothing depends on blocks or order."""

import math
import pathlib
import re
import shutil

import numpy as np
import pytest

from configs import base
from pretraining.data import corpus, tfds_records
from pretraining.errors import UserError


def data_config(**changes):
    config = base.get_config().data
    config.update(changes)
    return config


def read(path, **changes):
    return list(corpus.documents(str(path), data_config(**changes)))


def fails(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_sources():
    one = corpus.Source("python-docs", 1.0)
    assert corpus.sources("python-docs") == (one,)
    assert corpus.sources(("python-docs", ["a.txt", 2])) == (one, corpus.Source("a.txt", 2.0))
    assert corpus.sources((("a.txt", 0.5),)) == (corpus.Source("a.txt", 0.5),)


@pytest.mark.parametrize(
    "value, named",
    [
        ((), "()"),
        (3, "3"),
        ((("a", 0),), "'a' is 0"),
        ((("a", -1.5),), "'a' is -1.5"),
        ((("a", math.inf),), "'a' is inf"),
        ((("a", math.nan),), "'a' is nan"),
        ((("a", True),), "'a' is True"),
        ((("a", "2"),), "'a' is '2'"),
        (("a", 0.5), "0.5"),
        ((("a", 1, 2),), "('a', 1, 2)"),
        (("a", "b", ("a", 2)), "'a' twice"),
    ],
)
def test_wrong_sources(value, named):
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        corpus.sources(value)
    assert "config.data.corpus" in str(caught.value)


def test_globs(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "x/y/c.jsonl", "x/[d].txt"):
        write(tmp_path / name, f'{{"text": "{name}"}}')
    names = lambda pattern: [p.name for p in corpus.files(str(tmp_path / pattern))]
    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.*") == ["a.txt", "b.txt", "[d].txt", "c.jsonl"]
    assert names("x/[d].txt") == ["[d].txt"]
    assert names("*") == ["a.txt", "b.txt"]
    assert read(tmp_path / "?.txt") == ['{"text": "a.txt"}', '{"text": "b.txt"}']
    assert corpus.files("python-docs") == corpus.files("tfds:x:train") == ()


@pytest.mark.parametrize(
    "name, named",
    [
        ("none.txt", "is no file"),
        ("*.none", "matches no file"),
        ("folder", "is a folder"),
        ("a.md", "a.md is none of"),
        ("a.m*", "a.md is none of"),
        ("a.parquet.gz", "a.parquet.gz is none of"),
        ("a.gz", "a.gz is none of"),
    ],
)
def test_wrong_files(tmp_path, name, named):
    (tmp_path / "folder").mkdir()
    for file in ("a.md", "a.parquet.gz", "a.gz", "a.txt"):
        write(tmp_path / file, "text")
    message = fails(tmp_path / name)
    assert named in message
    assert message.startswith("config.data.corpus")


def test_wrong_settings(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    assert "config.data.errors='ignore'" in fails(path, errors="ignore")
    assert "config.data.txt_documents='page'" in fails(path, txt_documents="page")


def test_fingerprint(tmp_path):
    content = bytes(range(256)) * 8192  # 2 MiB
    for folder in "xyz":
        (tmp_path / folder).mkdir()
    path = write(tmp_path / "x" / "a.txt", content)
    of = lambda path, **changes: corpus.fingerprint(str(path), data_config(**changes))
    base_print = of(path)
    assert re.fullmatch("[0-9a-f]{64}", base_print)
    assert of(write(tmp_path / "y" / "a.txt", content)) == base_print
    assert of(path, text_field="other", sequence_length=64, workers=3) == base_print
    changed = [of(write(tmp_path / "x" / "b.txt", content)), of(path, txt_documents="line")]
    changed += [of(path, errors="replace"), of(tmp_path / "x" / "*")]
    for place in (0, 150_000, len(content) - 1):  # the second block starts at 135,441
        other = bytearray(content)
        other[place] ^= 1
        changed.append(of(write(tmp_path / "z" / "a.txt", bytes(other))))
    changed.append(of(write(tmp_path / "z" / "a.txt", content + b"\n")))
    assert len({base_print, *changed}) == 1 + len(changed)


def test_fingerprint_covers_all_of_a_small_file(tmp_path):
    content = bytearray(1 << 20)
    prints = set()
    for place in range(0, 1 << 20, 65_521):
        content[place] ^= 1
        path = write(tmp_path / "a.jsonl", bytes(content))
        prints.add(corpus.fingerprint(str(path), data_config()))
    assert len(prints) == 17
    fields = [corpus.fingerprint(str(path), data_config(text_field=f)) for f in ("a", "b")]
    assert fields[0] != fields[1]


def test_validation_split():
    texts = [f"document {i}" for i in range(20_000)]
    held = [corpus.is_validation(text, 0.1) for text in texts]
    sd = math.sqrt(20_000 * 0.1 * 0.9)
    assert abs(sum(held) - 2000) < 4 * sd
    more = [corpus.is_validation(text, 0.3) for text in texts]
    assert all(large for small, large in zip(held, more, strict=True) if small)
    assert not any(corpus.is_validation(text, 0.0) for text in texts)
    assert all(corpus.is_validation(text, 1.0) for text in texts)


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture(scope="module")
def prepared(tfds, tmp_path_factory):
    """A dataset of 20 documents that TFDS wrote as ArrayRecord, and finds by its files alone."""
    from tensorflow_datasets.core.utils import file_utils

    class TinyCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            text = tfds.features.Text()
            features = {"text": text, "body": text, "n": np.int64}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            numbers = {"train": range(20), "test": range(3)}
            return {split: self._generate_examples(of) for split, of in numbers.items()}

        def _generate_examples(self, numbers):
            for n in numbers:
                yield n, {"text": f"document {n}\r\né", "body": b"\xff" * (n % 2), "n": n}

    folder = tmp_path_factory.mktemp("tfds")
    TinyCorpus(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    yield folder
    file_utils.clear_registered_data_dirs()


def test_tfds(prepared):
    texts = read("tfds:tiny_corpus:train")
    assert sorted(texts) == sorted(f"document {n}\né" for n in range(20))
    assert read("tfds:tiny_corpus:1.2.0:train[25%:75%]") == texts[5:15]


def test_tfds_is_divided_into_ranges_of_records(prepared, monkeypatch):
    whole = read("tfds:tiny_corpus:train")
    monkeypatch.setattr(tfds_records, "RANGE", 6)
    parts = corpus.parts("tfds:tiny_corpus:train", data_config())
    assert [part.size for part in parts] == [6, 6, 6, 2]
    shares = [corpus.share_of(parts, number, 3) for number in range(3)]
    texts = [text.replace("\r", "") for share in shares for part in share for text in part.texts()]
    assert texts == whole
    assert all(shares)


def test_tfds_fingerprint(prepared):
    of = lambda split, **changes: corpus.fingerprint(
        f"tfds:tiny_corpus:{split}", data_config(**changes)
    )
    assert of("train") == of("train")
    others = [of("train[:50%]"), of("train[50%:]"), of("test"), of("train", text_field="body")]
    assert len({of("train"), *others}) == 5


def test_tfds_fingerprint_counts_examples(prepared):
    shutil.copytree(prepared / "tiny_corpus", prepared / "cut_corpus")
    info = prepared / "cut_corpus" / "1.2.0" / "dataset_info.json"
    prints = []
    for count in ('"20"', '"19"'):
        text = info.read_text().replace("tiny_corpus", "cut_corpus")
        info.write_text(text.replace('"20"', count))
        prints.append(corpus.fingerprint("tfds:cut_corpus:train", data_config()))
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    "name, named",
    [
        ("tiny_corpus:dev", "no split 'dev'; tiny_corpus has train, test"),
        ("tiny_corpus:train[:x", "no split 'train[:x'"),
        ("tiny_corpus", "expected tfds:<name>"),
        ("imdb_review:train", "names like it: imdb_reviews"),
        ("imdb_reviews/none:train", "none"),
        ("ag_news_subset:train", 'tfds.builder("ag_news_subset", file_format="array_record")'),
    ],
)
def test_wrong_tfds(prepared, name, named):
    message = fails(f"tfds:{name}")
    assert named in message
    assert name in message


def test_tfds_in_another_format_is_named(prepared):
    shutil.copytree(prepared / "tiny_corpus", prepared / "other_corpus")
    info = prepared / "other_corpus" / "1.2.0" / "dataset_info.json"
    text = info.read_text().replace("tiny_corpus", "other_corpus")
    info.write_text(text.replace("array_record", "tfrecord"))
    assert "other_corpus:train' is not prepared as ArrayRecord" in fails("tfds:other_corpus:train")


def test_tfds_text_field(prepared):
    assert "'title'; its features are body, n, text" in fails(
        "tfds:tiny_corpus:train", text_field="title"
    )
    assert "no text at config.data.text_field='n'" in fails(
        "tfds:tiny_corpus:train", text_field="n"
    )
    assert re.search(r"example \d+: byte 0 ", fails("tfds:tiny_corpus:train", text_field="body"))
    assert read("tfds:tiny_corpus:train", text_field="body", errors="replace") == ["\ufffd"] * 10
