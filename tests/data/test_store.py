import concurrent.futures
import pathlib
import pickle
import resource
import tracemalloc

import numpy as np
import pytest

from configs import base
from pretraining.data import cache, store, tokenizer
from pretraining.errors import UserError

EOS = 3


@pytest.fixture(scope="module")
def vocabulary():
    config = base.get_config().tokenizer
    config.size, config.kind, config.byte_fallback = 40, "bpe", False
    return tokenizer.train(["abcdefgh " * 9, "the cat sat on the mat"], config)


def encoded(documents, flags=None) -> store.Encoded:
    """Documents are lists of ids without eos; flags default to id % 4."""
    flags = flags or [[i % 4 for i in ids] for ids in documents]
    return store.Encoded(
        np.array([i for ids in documents for i in [*ids, EOS]], np.uint16),
        np.array([f for bits in flags for f in [*bits, 0]], np.uint8),
        np.array([len(ids) + 1 for ids in documents], np.int64),
        10 * len(documents),
    )


def random_documents(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 40, rng.integers(1, longest)).tolist() for _ in range(count)]


def make(folder: pathlib.Path, vocabulary, train, validation, step=1000, **sizes) -> store.Store:
    """Writes `step` documents of each split at a time."""
    starts = range(0, max(len(train), len(validation)), step)
    chunks = [
        {
            name: encoded(docs[i : i + step])
            for name, docs in (("train", train), ("validation", validation))
        }
        for i in starts
    ]

    def build(work):
        return {"splits": store.write(work, vocabulary, iter(chunks), **sizes)}

    cache.publish(folder, build)
    return store.open_store(folder)


def expected_rows(documents, T):
    """Token by token, without offsets: (tokens, flags, document) of each whole row."""
    flat = []
    for number, ids in enumerate(documents):
        flat += [(i, i % 4, number) for i in ids] + [(EOS, 0, number)]
    for start in range(0, len(flat) - T + 1, T):
        tokens, flags, numbers = np.array(flat[start : start + T]).T
        yield tokens, flags, numbers - numbers[0]


@pytest.mark.parametrize("T", [1, 5, 8, 13])
def test_rows_are_slices_of_the_text(tmp_path, vocabulary, T):
    train, validation = random_documents(30), random_documents(7, seed=1)
    opened = make(tmp_path / "a", vocabulary, train, validation, shard=16, chunk=4)
    for split, documents in ((opened.train, train), (opened.validation, validation)):
        expected = list(expected_rows(documents, T))
        assert split.rows(T) == len(expected)
        row = split.read(range(len(expected)), T)
        np.testing.assert_array_equal(row.tokens, [tokens for tokens, _, _ in expected])
        np.testing.assert_array_equal(row.boundary, [flags for _, flags, _ in expected])
        np.testing.assert_array_equal(row.document, [numbers for _, _, numbers in expected])
        np.testing.assert_array_equal(row.length, T)
    assert [field.dtype for field in row] == [np.int32] * 3 + [np.uint8] + [np.int32] * 2
    assert row.index.tolist() == row.copy.tolist() == [0] * len(expected)


def test_rows_in_any_order(tmp_path, vocabulary):
    opened = make(
        tmp_path / "a", vocabulary, random_documents(30), random_documents(1), shard=16, chunk=4
    )
    rows = opened.train.read([4, 0, 4], 5)
    expected = list(expected_rows(random_documents(30), 5))
    np.testing.assert_array_equal(rows.tokens, [expected[i][0] for i in (4, 0, 4)])


def test_a_split_shorter_than_a_row_is_one_short_row(tmp_path, vocabulary):
    opened = make(tmp_path / "a", vocabulary, [[7, 8], [9]], [], shard=16, chunk=4)
    assert (opened.train.n_tokens, opened.validation.n_tokens) == (5, 0)
    assert [opened.train.rows(T) for T in (2, 3, 5, 6)] == [2, 1, 1, 1]
    assert opened.validation.rows(2) == 0
    row = opened.train.read([0], 7)
    assert row.tokens.tolist() == [[7, 8, EOS, 9, EOS, 0, 0]]
    assert row.length.tolist() == [5]
    assert row.document[0, :5].tolist() == [0, 0, 0, 1, 1]


def test_the_bytes_do_not_depend_on_the_chunks_they_came_in(tmp_path, vocabulary):
    train, validation = random_documents(150), random_documents(20, seed=1)
    stores = [
        make(tmp_path / str(step) / "a", vocabulary, train, validation, step, shard=64, chunk=16)
        for step in (1, 3, 1000)
    ]
    assert stores[0].manifest == stores[1].manifest == stores[2].manifest
    assert len(list((tmp_path / "1" / "a" / "train" / "tokens" / "c").iterdir())) > 9
    other = make(tmp_path / "other", vocabulary, train[::-1], validation, shard=64, chunk=16)
    assert stores[0].fingerprint == stores[2].fingerprint != other.fingerprint


def test_counts(tmp_path, vocabulary):
    train, validation = random_documents(50), random_documents(20, seed=1)
    opened = make(tmp_path / "a", vocabulary, train, validation, 7)
    counts = np.zeros(40, int)
    for ids in train:
        for i in [*ids, EOS]:
            counts[i] += 1
    np.testing.assert_array_equal(opened.vocabulary.unigram_counts, counts)
    assert opened.vocabulary.fingerprint == vocabulary.fingerprint
    tokens = [sum(len(ids) + 1 for ids in documents) for documents in (train, validation)]
    assert opened.manifest["splits"] == {
        "train": {"documents": 50, "tokens": tokens[0], "text_bytes": 500},
        "validation": {"documents": 20, "tokens": tokens[1], "text_bytes": 200},
    }


@pytest.mark.parametrize("size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_the_largest_id_survives(tmp_path, size, dtype, vocabulary, monkeypatch):
    class Large:
        def with_counts(self, counts):
            assert counts[size - 1] == 1
            return self

        def save(self, folder):
            pass

    Large.size = size
    monkeypatch.setattr(store.Vocabulary, "load", lambda folder: None)
    part = store.Encoded(np.array([size - 1], store.token_dtype(size)), *encoded([[]])[1:])
    cache.publish(
        tmp_path / "a",
        lambda work: {"splits": store.write(work, Large(), [{"train": part}], 16, 4)},
    )
    split = store.open_store(tmp_path / "a").train
    assert split.tokens.dtype.numpy_dtype == dtype
    assert split.read([0], 1).tokens.tolist() == [[size - 1]]


def read_all(folder: pathlib.Path):
    opened = store.open_store(folder)
    for split in (opened.train, opened.validation):
        split.read(range(split.rows(1)), 1)


def test_every_flipped_bit_is_found(tmp_path, vocabulary):
    folder = tmp_path / "a"
    make(folder, vocabulary, random_documents(40), random_documents(9), shard=64, chunk=16)
    read_all(folder)
    rng = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 15
    for path in files:
        intact = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(intact)
            damaged[rng.integers(len(intact))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"a is damaged: .*delete the folder"):
                read_all(folder)
            assert [str(path.relative_to(folder)) in line for line in cache.verify(folder)] == [
                True
            ]
        path.write_bytes(intact)
    read_all(folder)


def test_no_damage_opens(tmp_path, vocabulary):
    """Every file: gone, cut, changed in places over all files, or taken from another store."""
    config = base.get_config().tokenizer
    config.size, config.kind, config.byte_fallback = 40, "bpe", False
    other_words = tokenizer.train(["hgfedcba " * 9, "a mat sat on the cat"], config)
    folder, train = tmp_path / "a", random_documents(40)
    make(folder, vocabulary, train, random_documents(9, 1), shard=64, chunk=16)
    other = tmp_path / "b"
    make(other, other_words, [[*ids[:-1], 5] for ids in train], [[6]] * 9, shard=64, chunk=16)
    contents = {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    rng = np.random.default_rng(0)
    places = rng.integers(0, sum(map(len, contents.values())), 20)
    for name, intact in contents.items():
        damages = [None, intact[:-1], intact[: len(intact) // 2], b""]
        if (other / name).exists() and (other / name).read_bytes() != intact:
            damages.append((other / name).read_bytes())
        for place in places[(places >= 0) & (places < len(intact))]:
            damages.append(intact[:place] + bytes([intact[place] ^ 0x40]) + intact[place + 1 :])
        places -= len(intact)
        for damage in damages:
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            repair = "is not prepared: it has no manifest.json|a is damaged: .*; delete the folder"
            with pytest.raises(UserError, match=repair) as caught:
                store.open_store(folder)
            assert str(name) in str(caught.value)
            (folder / name).write_bytes(intact)
    store.open_store(folder)
    assert (places < 0).all()


def test_a_shard_that_is_lost_or_cut_does_not_read_as_zeros(tmp_path, vocabulary):
    zeros = [[[5, 5, 5]] * 20, [[[0, 0, 0]] * 20]]
    chunks = [{"train": encoded(zeros[0], zeros[1][0]), "validation": encoded([[5]])}]
    cache.publish(
        tmp_path / "a", lambda work: {"splits": store.write(work, vocabulary, chunks, 16, 4)}
    )
    shard = tmp_path / "a" / "train" / "flags" / "c" / "1"
    intact = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(intact[:-9]), shard.unlink):
        opened = store.open_store(tmp_path / "a")
        damage()
        with pytest.raises(UserError, match="a is damaged: .*train/flags/"):
            opened.train.read([4], 4)
        with pytest.raises(UserError, match="train/flags/c/1 (has|is missing)"):
            store.open_store(tmp_path / "a")
        shard.write_bytes(intact)


def test_threads_and_pickles_read_the_same(tmp_path, vocabulary):
    opened = make(tmp_path / "a", vocabulary, random_documents(300), [[5]], shard=256, chunk=16)
    numbers = np.random.default_rng(0).integers(0, opened.train.rows(7), (40, 5))
    serial = [opened.train.read(each, 7) for each in numbers]
    copy = pickle.loads(pickle.dumps(opened))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(lambda each: copy.train.read(each, 7), numbers))
    for one, other in zip(serial, parallel, strict=True):
        for field, again in zip(one, other, strict=True):
            np.testing.assert_array_equal(field, again)


def test_writing_holds_one_shard_in_memory(tmp_path, vocabulary):
    part = encoded([[5] * 999] * 8)
    chunks = ({"train": part, "validation": encoded([])} for _ in range(300))
    tracemalloc.start()
    splits = store.write(tmp_path, vocabulary, chunks, shard=1 << 15, chunk=1 << 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert splits["train"]["tokens"] == 2_400_000  # 7.2 MB with their flags
    assert peak < 1e6


def test_a_store_streams_into_another(tmp_path, vocabulary):
    """In pieces that cut documents, with one shard in memory."""
    sizes = dict(shard=1 << 15, chunk=1 << 12)
    first = make(tmp_path / "1" / "a", vocabulary, [[5] * 1500] * 1000, [[7] * 9] * 3, **sizes)

    def build(work):
        totals = first.manifest["splits"]
        parts = (
            {name: part}
            for name in store.SPLITS
            for part in getattr(first, name).encoded(totals[name]["text_bytes"], 1 << 14)
        )
        return {"splits": store.write(work, vocabulary, parts, **sizes)}

    tracemalloc.start()
    cache.publish(tmp_path / "2" / "a", build)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # of 4.5 MB
    assert store.open_store(tmp_path / "2" / "a").manifest == first.manifest


def test_a_full_disk_is_reported(tmp_path, vocabulary):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be prepared: .*File too large"):
            make(tmp_path / "a", vocabulary, [[5] * 9000], [[5]], shard=1 << 13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
