"""A corpus that several processes prepare in shares: the store is that of one process."""

import concurrent.futures
import gzip
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pretraining.data import build, cache, corpus, prepare, store
from pretraining.data.build import Share
from pretraining.errors import UserError


def text(rng) -> str:
    return " ".join(rng.choice(["first", "last", "text", "document"], rng.integers(1, 30))) + "."


@pytest.fixture
def config(config, tmp_path):
    """Nine files of very different sizes, some without a document; and an evaluation set."""
    rng = np.random.default_rng(0)
    (tmp_path / "files").mkdir()
    for number, count in enumerate([40, 1, 0, 5, 300, 2, 2, 0, 90]):
        lines = "".join(json.dumps({"text": text(rng)}) + "\n" for _ in range(count))
        content = (lines + ("no JSON\n" if number in (1, 4) else "")).encode()
        packed = gzip.compress(content) if number == 3 else content
        (tmp_path / "files" / f"{number}.jsonl{'.gz' * (number == 3)}").write_bytes(packed)
    config.evaluate.sets = (("good", config.data.corpus),)
    config.data.corpus = str(tmp_path / "files" / "*")
    config.data.errors = "skip"
    return config


def alone(config, folder: pathlib.Path) -> prepare.Prepared:
    """What one process makes."""
    other = config.copy_and_resolve_references()
    other.data.cache = str(folder / "alone")
    return prepare.prepare(other)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Every byte of the stores below a cache."""
    stores = folder / "stores"
    paths = [path for path in stores.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(stores)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_the_merged_store_has_the_bytes_of_one_process(config, tmp_path, count):
    expected = alone(config, tmp_path)
    for number in reversed(range(count)):  # in any order
        prepare.prepare_share(config, Share(number, count))
        prepare.prepare_share(config, Share(number, count))  # finds it
    assert len(list(tmp_path.glob("cache/stores/*.shares-*"))) == 2
    prepare.merge_shares(config, count)
    merged = prepare.prepare(config)
    assert merged.fingerprint == expected.fingerprint
    assert files(tmp_path / "cache") == files(tmp_path / "alone")
    assert list(tmp_path.glob("cache/stores/*.shares-*")) == []
    manifest = merged.train[0][0].manifest
    assert manifest["skipped"] == {"not JSON": 2}
    assert sum(manifest["splits"][name]["documents"] for name in store.SPLITS) == 440
    assert prepare.find_problems(config) == []
    prepare.prepare_share(config, Share(0, count))  # the store is there: nothing to do
    prepare.merge_shares(config, count)
    assert files(tmp_path / "cache") == files(tmp_path / "alone")


def test_pieces_of_a_share_may_cut_documents(config, tmp_path, monkeypatch):
    """The store has one shard (file) for 1,024 tokens; a piece of 100 tokens cuts documents."""
    write, encoded = store.write, store.Split.encoded
    monkeypatch.setattr(store, "write", lambda *args: write(*args, shard=1024, chunk=32))
    expected = alone(config, tmp_path)
    monkeypatch.setattr(store.Split, "encoded", lambda split, size: encoded(split, size, 100))
    for number in range(3):
        prepare.prepare_share(config, Share(number, 3))
    prepare.merge_shares(config, 3)
    assert files(tmp_path / "cache") == files(tmp_path / "alone")
    assert len(list(expected.train[0][0].folder.glob("train/tokens/c/*"))) > 5


def test_a_merge_removes_the_shares_of_every_count(config, tmp_path):
    prepare.prepare_share(config, Share(1, 3))
    prepare.prepare_share(config, Share(0, 1))
    assert len(list(tmp_path.glob("cache/stores/*.shares-*"))) == 4
    prepare.merge_shares(config, 1)
    assert list(tmp_path.glob("cache/stores/*.shares-*")) == []
    assert prepare.find_problems(config) == []


def test_a_source_is_sampled_once_before_and_once_after(config, monkeypatch):
    fingerprint, sampled = corpus.fingerprint, []

    def count(source, data_config):
        sampled.append(source)
        return fingerprint(source, data_config)

    monkeypatch.setattr(corpus, "fingerprint", count)
    sources = [config.data.corpus, config.evaluate.sets[0][1]]
    for number in range(3):
        prepare.prepare_share(config, Share(number, 3))
        assert sorted(sampled) == sorted(2 * sources)
        sampled.clear()
    prepare.merge_shares(config, 3)
    assert sorted(sampled) == sorted(sources)


def test_missing_shares_are_listed(config, tmp_path):
    for number in (0, 2):
        prepare.prepare_share(config, Share(number, 4))
    before = files(tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        prepare.merge_shares(config, 4)
    source, held_out = config.data.corpus, config.evaluate.sets[0][1]
    assert str(caught.value) == (
        f"--shares=4: not prepared are shares 1, 3 of {source!r}; 1, 3 of {held_out!r};"
        " prepare each with --shares=4 --share=<number>"
    )
    assert files(tmp_path / "cache") == before
    with pytest.raises(UserError, match="shares 0, 1, 2 of "):  # of another count
        prepare.merge_shares(config, 3)


def share_folder(config, number: int, count: int) -> pathlib.Path:
    """That of the corpus, which has more than the evaluation set."""
    found = pathlib.Path(config.data.cache, "stores").glob(f"*.shares-{count}/{number}")
    return max(found, key=lambda folder: (folder / "train/offsets").stat().st_size)


def test_a_damaged_or_foreign_share_stops_the_merge(config, tmp_path):
    for number in range(2):
        prepare.prepare_share(config, Share(number, 2))
    folder = share_folder(config, 0, 2)
    shard = folder / "train" / "tokens" / "c" / "0"
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(UserError, match="0 is damaged: train/tokens/c/0 does not match"):
        prepare.merge_shares(config, 2)
    shard.write_bytes(intact)
    good = shutil.copytree(folder, tmp_path / "kept")

    shutil.rmtree(folder)
    shutil.copytree(share_folder(config, 1, 2), folder)
    with pytest.raises(UserError, match="0 is damaged: manifest.json is that of 1"):
        prepare.merge_shares(config, 2)

    other = [path for path in folder.parents[1].glob("*.shares-2/0") if path != folder]
    shutil.rmtree(folder)
    shutil.copytree(other[0], folder)
    with pytest.raises(UserError, match="2/0 is no share of .*, but of another text or vocabulary"):
        prepare.merge_shares(config, 2)
    assert not list(tmp_path.glob("cache/stores/*/manifest.json"))

    shutil.rmtree(folder)
    shutil.copytree(good, folder)
    prepare.merge_shares(config, 2)
    assert prepare.prepare(config).fingerprint == alone(config, tmp_path).fingerprint


def test_a_changed_corpus_has_other_shares(config, tmp_path):
    for number in range(2):
        prepare.prepare_share(config, Share(number, 2))
    (tmp_path / "files" / "1.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(UserError, match="not prepared are shares 0, 1 of .*files"):
        prepare.merge_shares(config, 2)


# ---------------------------------------------------------------------------------- dividing files


def parts_of(sizes) -> list[corpus.Part]:
    return [corpus.Part(size, True, lambda: iter(())) for size in sizes]


def divided(sizes, count: int) -> list[list[int]]:
    parts = parts_of(sizes)
    return [[part.size for part in corpus.share_of(parts, n, count)] for n in range(count)]


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ([10, 10, 10, 10], 2, [[10, 10], [10, 10]]),
        ([30, 10, 10, 10], 2, [[30], [10, 10, 10]]),
        ([1, 1, 1, 97], 2, [[1, 1, 1], [97]]),
        ([97, 1, 1, 1], 2, [[97], [1, 1, 1]]),
        ([5], 3, [[], [5], []]),
        ([0, 0], 2, [[0, 0], []]),
        ([], 2, [[], []]),
        ([7, 8], 1, [[7, 8]]),
    ],
)
def test_files_are_divided_by_size(sizes, count, expected):
    assert divided(sizes, count) == expected


def test_shares_are_contiguous_and_balanced():
    sizes = np.random.default_rng(0).integers(0, 100, 1000).tolist()
    shares = divided(sizes, 16)
    assert [size for share in shares for size in share] == sizes
    assert all(abs(sum(share) - sum(sizes) / 16) <= 100 for share in shares)


def test_python_docs_are_one_part(config):
    (part,) = corpus.parts("python-docs", config.data)
    assert corpus.share_of([part], 0, 1) == [part]


# ------------------------------------------------------------------------------------ the command

RECIPE = """
from configs import base

def get_config():
    config = base.get_config()
    config.data.update({data!r})
    config.evaluate.sets = {sets!r}
    config.tokenizer.size, config.tokenizer.kind = 280, "bpe"
    return config
"""


@pytest.fixture
def recipe(config, tmp_path):
    data = config.data.to_dict()
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(data=data, sets=config.evaluate.sets))
    config.tokenizer.model, config.tokenizer.size, config.tokenizer.kind = "", 280, "bpe"
    return path


def command(recipe, *options) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "pretraining.data.prepare", f"--config={recipe}", *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


def test_the_command(recipe, config, tmp_path):
    """Three at once, which train one tokenizer; then the merge."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        commands = [f"--share={number}" for number in range(3)]
        done = list(pool.map(lambda each: command(recipe, "--shares=3", each), commands))
    assert [each.returncode for each in done] == [0, 0, 0], done
    assert [each.stdout for each in done] == [f"share {n} of 3 is prepared\n" for n in range(3)]
    assert "share 1 of 3" in done[1].stderr
    assert sum(each.stderr.count("training a tokenizer") for each in done) == 1
    merged = command(recipe, "--shares=3")
    assert merged.returncode == 0, merged.stderr
    assert "merging 3 shares" in merged.stderr
    assert "left out 2 not JSON" in merged.stderr
    assert "440" in merged.stdout
    expected = alone(config, tmp_path)
    assert prepare.prepare(config).fingerprint == expected.fingerprint
    assert files(tmp_path / "cache") == files(tmp_path / "alone")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shares="3", share="3"), "--share=3: with --shares=3 allowed are 0 to 2"),
        (dict(shares="3", share="-1"), "--share='-1': a whole number of at least 0"),
        (dict(shares="0"), "--shares='0': a whole number of at least 1"),
        (dict(share="0"), "--share=0: of how many"),
        (dict(shares="2", verify=True), "--verify checks whole stores"),
    ],
)
def test_wrong_options(config, options, message):
    with pytest.raises(UserError, match=message):
        prepare.main(config, **({"verify": False} | options))


def test_a_killed_share_is_not_believed(config):
    (plan, _) = prepare._plans(config, prepare._vocabulary(config, ()))
    remains = plan.folder.with_name(f"{plan.folder.name}.shares-2") / "0.partial-elsewhere-0"
    remains.mkdir(parents=True)
    assert build.missing(plan, 2) == [0, 1]
    for number in range(2):
        prepare.prepare_share(config, Share(number, 2))
    prepare.merge_shares(config, 2)
    assert not remains.exists()
    assert cache.verify(plan.folder) == []
