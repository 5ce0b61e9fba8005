import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs import base
from pretraining.data import cache, corpus, encode, prepare, progress, store
from pretraining.errors import UserError

WORDS = "the cat sat on a mat and saw that dog run far away over green hills"


def documents(count: int, seed: int = 0) -> list[str]:
    """Two sentences each, no two documents alike."""
    rng = np.random.default_rng(seed)
    words = [" ".join(rng.choice(WORDS.split(), rng.integers(5, 60))) for _ in range(count)]
    return [f"Number {i} of {seed}. So {each}." for i, each in enumerate(words)]


def write_corpus(path: pathlib.Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "big") < share * 2**64


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 1000)
    config = base.get_config()
    config.data.corpus = write_corpus(tmp_path / "a.jsonl", documents(300))
    config.data.cache = str(tmp_path / "cache")
    config.data.validation = 0.2
    config.data.workers = 1
    config.tokenizer.size = 300
    config.tokenizer.kind = "bpe"
    return config


def folders(config, kind="stores") -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(config.data.cache, kind).iterdir() if path.is_dir())


def whole(split: store.Split):
    return split.read([0], split.n_tokens)


def test_the_stores_hold_the_text(config):
    prepared = prepare.prepare(config)
    ((opened, weight),) = prepared.train
    assert weight == 1.0
    assert prepared.validation == prepared.train
    vocabulary = prepared.vocabulary
    for name, split in (("train", opened.train), ("validation", opened.validation)):
        texts = [text for text in documents(300) if held_out(text, 0.2) == (name == "validation")]
        tokens = [i for text in texts for i in [*vocabulary.encode(text), vocabulary.eos]]
        row = whole(split)
        assert row.tokens[0].tolist() == tokens
        assert row.document[0, -1] == len(texts) - 1
        assert opened.manifest["splits"][name] == {
            "documents": len(texts),
            "tokens": len(tokens),
            "text_bytes": sum(len(text.encode()) for text in texts),
        }
        is_eos = row.tokens[0] == vocabulary.eos
        assert not row.boundary[0, is_eos].any()
        assert np.sum(row.boundary & 2 > 0) == 2 * len(texts)
        if name == "train":
            np.testing.assert_array_equal(vocabulary.unigram_counts, np.bincount(tokens, None, 300))
    assert 30 < opened.manifest["splits"]["validation"]["documents"] < 90


def test_any_number_of_workers_writes_the_same_bytes(config, tmp_path):
    one = prepare.prepare(config)
    config.data.cache = str(tmp_path / "other")
    two = prepare.prepare(config, processes=2)
    assert one.train[0][0].folder != two.train[0][0].folder
    assert one.train[0][0].manifest == two.train[0][0].manifest
    assert one.fingerprint == two.fingerprint
    assert cache.verify(two.train[0][0].folder) == []


def test_what_is_there_is_used_again(config, monkeypatch):
    first = prepare.prepare(config)
    monkeypatch.setattr(store, "write", None)
    monkeypatch.setattr(prepare.tokenizer, "train", None)
    config.data.sequence_length, config.train.batch_size, config.seed.data = 512, 8, 3
    config.data.workers, config.data.copies = 2, 4
    again = prepare.prepare(config)
    assert again.fingerprint == first.fingerprint
    assert again.train[0][0].folder == first.train[0][0].folder
    assert len(folders(config)) == len(folders(config, "tokenizers")) == 1


@pytest.mark.parametrize(
    "change, tokenizers",
    [
        (lambda config: config.tokenizer.update(size=310), 2),
        (lambda config: config.data.update(validation=0.3), 2),
        (lambda config: pathlib.Path(config.data.corpus).write_text('{"text": "x"}\n' * 9), 1),
    ],
)
def test_what_determines_the_content_determines_the_address(config, change, tokenizers):
    model = pathlib.Path(prepare.prepare(config).train[0][0].folder, "vocabulary/tokenizer.model")
    change(config)
    if tokenizers == 1:  # the same vocabulary for another text
        config.tokenizer.model = str(model)
        with pytest.raises(UserError, match="no .* document"):
            prepare.prepare(config)
        config.data.corpus = write_corpus(pathlib.Path(config.data.corpus), documents(300, seed=1))
    prepare.prepare(config)
    assert len(folders(config)) == 2
    assert len(folders(config, "tokenizers")) == tokenizers


def test_the_place_of_the_corpus_does_not_matter(config, tmp_path):
    first = prepare.prepare(config)
    (tmp_path / "elsewhere").mkdir()
    config.data.corpus = write_corpus(tmp_path / "elsewhere" / "a.jsonl", documents(300))
    assert prepare.prepare(config).train[0][0].folder == first.train[0][0].folder


def test_a_mixture_counts_by_weight(config, tmp_path):
    sources = [config.data.corpus, write_corpus(tmp_path / "b.jsonl", documents(50, seed=1))]
    config.data.corpus = ((sources[0], 1.0), (sources[1], 3.0))
    prepared = prepare.prepare(config)
    assert [weight for _, weight in prepared.train] == [1.0, 3.0]
    counts = [np.bincount(whole(opened.train).tokens[0], None, 300) for opened, _ in prepared.train]
    total = counts[0].sum() + counts[1].sum()
    for i, (a, b) in enumerate(zip(*counts, strict=True)):
        share = 0.25 * a / counts[0].sum() + 0.75 * b / counts[1].sum()
        expected = max(round(share * total), int(share > 0))
        assert abs(prepared.vocabulary.unigram_counts[i] - expected) <= (share * total % 1 == 0.5)
    assert prepared.vocabulary.unigram_counts[prepared.vocabulary.eos] > 0
    swapped = config.copy_and_resolve_references()
    swapped.data.corpus = ((sources[0], 1.0), (sources[1], 2.0))
    swapped.tokenizer.model = str(prepared.train[0][0].folder / "vocabulary" / "tokenizer.model")
    other = prepare.prepare(swapped)
    assert other.train[1][0].folder == prepared.train[1][0].folder
    assert other.fingerprint != prepared.fingerprint


def test_a_rare_id_keeps_a_count():
    class Opened:
        def __init__(self, counts):
            self.vocabulary = self
            self.unigram_counts = np.array(counts)

    pairs = [(Opened([900, 99, 1, 0]), 0.1), (Opened([0, 10, 0, 0]), 0.9)]
    # (0.09, 0.0099 + 0.9, 0.0001, 0) of 1010 tokens; 0.101 becomes 1
    assert prepare._mixed_counts(pairs).tolist() == [91, 919, 1, 0]


def test_the_tokenizer_learns_from_training_documents_by_weight(config, tmp_path, monkeypatch):
    sources = [config.data.corpus, write_corpus(tmp_path / "b.jsonl", documents(300, seed=1))]
    config.data.corpus = ((sources[0], 1.0), (sources[1], 3.0))
    config.tokenizer.sample_bytes = 4000
    seen = []

    def train(texts, tokenizer_config):
        seen.extend(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.tokenizer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(config)
    sides = [set(documents(300, seed)) for seed in (0, 1)]
    sizes = [sum(len(text) for text in seen if text in side) for side in sides]
    assert sum(sizes) == sum(len(text) for text in seen)
    assert 600 < sizes[0] <= 1000
    assert 2600 < sizes[1] <= 3000
    assert not any(held_out(text, 0.2) for text in seen)


def test_evaluation_sets_are_all_validation(config, tmp_path):
    texts = {config.data.corpus: documents(300), str(tmp_path / "b.jsonl"): documents(30, seed=1)}
    sources = [config.data.corpus, write_corpus(tmp_path / "b.jsonl", documents(30, seed=1))]
    config.evaluate.sets = (("same", sources[0]), ("other", sources[1]))
    prepared = prepare.prepare(config)
    vocabulary = prepared.vocabulary
    for name, source in config.evaluate.sets:
        opened = prepared.sets[name]
        assert opened.train.n_tokens == 0
        tokens = [i for text in texts[source] for i in [*vocabulary.encode(text), vocabulary.eos]]
        assert whole(opened.validation).tokens[0].tolist() == tokens
    assert vocabulary.unigram_counts.sum() == prepared.train[0][0].train.n_tokens
    for wrong in ((("other",),), ("other",), (("a", "x"), ("a", "y"))):
        config.evaluate.sets = wrong
        with pytest.raises(UserError, match="config.evaluate.sets"):
            prepare.prepare(config)


def test_validation_in_the_vocabulary_of_a_stored_model(config, tmp_path, monkeypatch):
    prepared = prepare.prepare(config)
    vocabulary = prepared.vocabulary
    monkeypatch.setattr(prepare.tokenizer, "train", None)
    own = prepare.prepare_validation(config, vocabulary)
    assert own.validation[0][0].folder == prepared.validation[0][0].folder
    assert own.vocabulary is vocabulary
    assert (own.train, own.sets) == ((), {})

    texts = documents(30, seed=1)
    source = write_corpus(tmp_path / "b.jsonl", texts)
    ((opened, weight),) = prepare.prepare_validation(config, vocabulary, source).validation
    tokens = [i for text in texts for i in [*vocabulary.encode(text), vocabulary.eos]]
    assert whole(opened.validation).tokens[0].tolist() == tokens
    assert (weight, opened.train.n_tokens) == (1.0, 0)


def test_text_that_cannot_be_split(config, tmp_path):
    prepare.prepare(config)
    config.tokenizer.model = str(folders(config)[0] / "vocabulary" / "tokenizer.model")

    def check(texts, share, message):
        config.data.corpus = write_corpus(tmp_path / "few.jsonl", texts)
        config.data.validation = share
        with pytest.raises(UserError, match=message):
            prepare.prepare(config)
        assert len(folders(config)) == 1

    name = r"few.jsonl'"
    check([], 0.2, f"{name} has no document")
    check(documents(5), 1e-9, rf"no validation document in .*{name}.* 5 .*validation=1e-09")
    check(documents(5), 1 - 1e-9, rf"no train document in .*{name}")
    check(["\ufffd"], 1e-9, f"{name} has no document")  # the normalisation leaves nothing


def test_a_damaged_store_is_not_used(config):
    folder = prepare.prepare(config).train[0][0].folder
    path = folder / "validation" / "offsets"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged: validation/offsets .*; delete the folder"):
        prepare.prepare(config)
    (tokenizer,) = folders(config, "tokenizers")
    (tokenizer / "vocabulary" / "unigram_counts.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged: vocabulary/unigram_counts.npy"):
        prepare.prepare(config)


def test_verify_finds_what_the_cheap_checks_do_not(config, capsys, monkeypatch):
    problems = prepare.find_problems(config)
    assert ["is not prepared" in problem for problem in problems] == [True]
    assert not pathlib.Path(config.data.cache).exists()

    folder = prepare.prepare(config).train[0][0].folder
    assert prepare.main(config, verify=True) == 0
    shard = folder / "train" / "tokens" / "c" / "0"
    intact = shard.read_bytes()
    shard.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
    store.open_store(folder, hashed=0)
    capsys.readouterr()
    assert prepare.main(config, verify=True) == 1
    assert "train/tokens/c/0 does not match its checksum" in capsys.readouterr().out
    shard.write_bytes(intact)

    fingerprint = corpus.fingerprint(config.data.corpus, config.data)
    monkeypatch.setattr(corpus, "fingerprint", lambda *_: fingerprint)
    texts = documents(300)
    texts[150] = texts[150].replace("a", "b", 1)
    write_corpus(pathlib.Path(config.data.corpus), texts)
    prepare.prepare(config)
    (problem,) = prepare.find_problems(config)
    assert f"{folder} holds an earlier text of" in problem


def test_progress_is_lines_without_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    prepare.prepare(config)
    lines = capsys.readouterr().err.splitlines()
    assert "\r" not in "".join(lines)
    total = os.path.getsize(config.data.corpus)
    last = lines[-1]
    assert "documents=300" in last
    assert "B/s" in last
    assert f"/{total / 1000:.1f}k" in last  # of the size of the file: so there is an ETA
    assert len(lines) > 10


# ------------------------------------------------------------------------------------ the command

RECIPE = """
import itertools, os, pkgutil, signal
from configs import base
from pretraining.data import encode

encode.CHUNK_CHARACTERS = 20_000

def get_config():
    config = base.get_config()
    config.data.corpus = {corpus!r}
    config.data.cache = {cache!r}
    config.data.validation = 0.2
    config.data.workers = 2
    config.tokenizer.size, config.tokenizer.kind = 300, "bpe"
    return config

def kill(owner, name, count):
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments, **options):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, call)

if "KILL" in os.environ:
    owner, name, count = os.environ["KILL"].split()
    kill(pkgutil.resolve_name(owner), name, int(count))
"""


@pytest.fixture
def recipe(config, tmp_path):
    config.data.corpus = write_corpus(tmp_path / "long.jsonl", documents(1200))
    text = RECIPE.format(corpus=config.data.corpus, cache=config.data.cache)
    (tmp_path / "recipe.py").write_text(text)
    return tmp_path / "recipe.py"


def start(recipe, *options, kill=None) -> subprocess.Popen:
    command = [sys.executable, "-m", "pretraining.data.prepare", f"--config={recipe}", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ({"KILL": kill} if kill else {}),
    )


def reference(config, tmp_path):
    """What an uninterrupted preparation by one process makes."""
    other = config.copy_and_resolve_references()
    other.data.cache = str(tmp_path / "reference")
    return prepare.prepare(other)


def test_the_command(recipe, config):
    process = start(recipe)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    ((opened, _),) = prepare.prepare(config).train
    tokens = opened.train.n_tokens + opened.validation.n_tokens
    expected = {config.data.corpus, "1,200", f"{tokens:,}", str(opened.folder)}
    assert expected <= set(out.splitlines()[1].split())
    process = start(recipe, "--verify")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_two_commands_at_once_agree(recipe, config, tmp_path):
    processes = [start(recipe) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(folders(config)) == len(folders(config, "tokenizers")) == 1
    assert prepare.find_problems(config) == []
    assert prepare.prepare(config).fingerprint == reference(config, tmp_path).fingerprint


def test_killed_at_any_moment_nothing_is_believed(recipe, config, tmp_path):
    root = pathlib.Path(config.data.cache)
    for moment, where in [
        ("pretraining.data.tokenizer train 1", "tokenizers"),
        ("pathlib:Path rename 1", "tokenizers"),  # all is there, manifest too, but for the name
        ("pretraining.data.store:_SplitWriter append 7", "stores"),  # workers are at work
        ("pretraining.data.store:_Array flush 2", "stores"),
        ("pretraining.data.cache _hashes 1", "stores"),
        ("pathlib:Path rename 1", "stores"),
    ]:
        process = start(recipe, kill=moment)
        # Ends when all that inherited the pipes have ended: workers do not outlive their parent.
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
        assert len(list(root.glob(f"{where}/*.partial-*"))) == 1
        (problem,) = prepare.find_problems(config)
        assert re.search(f"cache/{where}/.* is not prepared", problem)
    prepared = prepare.prepare(config)
    assert prepared.train[0][0].manifest == reference(config, tmp_path).train[0][0].manifest
    assert prepare.find_problems(config) == []
    assert list(root.glob("*/*.partial-*")) == []
