import collections
import itertools
import threading
import time

import numpy as np
import pytest

from configs import base
from pretraining.data import cache, loader, store, tokenizer
from pretraining.data.row import Row
from pretraining.errors import UserError

TRAIN_TOKENS = {"a": 1203, "b": 607, "c": 5000, "d": 607}
VALIDATION_TOKENS = {"a": 95, "b": 41, "c": 5, "d": 41}


@pytest.fixture(scope="module")
def texts():
    """{(source, split): tokens}; eos after every tenth."""
    rng = np.random.default_rng(0)
    flat = {}
    for split, sizes in (("train", TRAIN_TOKENS), ("validation", VALIDATION_TOKENS)):
        for source, size in sizes.items():
            flat[source, split] = rng.integers(4, 40, size).astype(np.uint16)
            flat[source, split][9::10] = 3
            flat[source, split][-1] = 3
    return flat


@pytest.fixture(scope="module")
def stores(texts, tmp_path_factory):
    settings = base.get_config().tokenizer
    settings.size, settings.kind, settings.byte_fallback = 40, "bpe", False
    vocabulary = tokenizer.train(["abcdefgh " * 9, "the cat sat on the mat"], settings)

    def encoded(tokens):
        ends = np.flatnonzero(tokens == 3) + 1
        lengths = np.diff(ends, prepend=0)
        return store.Encoded(tokens, (tokens % 4).astype(np.uint8), lengths, tokens.size)

    def make(source):
        def build(folder):
            chunk = {split: encoded(texts[source, split]) for split in store.SPLITS}
            splits = store.write(folder, vocabulary, [chunk], shard=256, chunk=32)
            return {"source": source, "splits": splits}

        folder = tmp_path_factory.mktemp("stores") / source
        cache.publish(folder, build)
        return store.open_store(folder)

    return {source: make(source) for source in TRAIN_TOKENS}


@pytest.fixture
def config():
    """Rows of 10 tokens: 120 of source a, 60 of b, 500 of c."""
    config = base.get_config()
    config.data.sequence_length = 13
    config.train.batch_size = 8
    config.data.prefetch = 2
    config.data.threads = 2
    return config


def take(iterator, count):
    rows = list(itertools.islice(iterator, count))
    iterator.close()
    return rows


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in Row._fields:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), name)


def numbers(rows: Row, flat: np.ndarray, T: int = 10) -> list[int]:
    """Which row of a text each row is, found by its tokens."""
    known = {flat[i : i + T].tobytes(): i // T for i in range(0, flat.size - T + 1, T)}
    return [known[tokens.astype(np.uint16).tobytes()] for tokens in rows.tokens]


def test_a_batch_holds_rows_of_the_text(stores, texts, config):
    (batch,) = take(loader.train_batches([(stores["a"], 1.0)], config, 5), 1)
    found = numbers(batch, texts["a", "train"])
    assert len(set(found)) == 8
    addresses = loader.row_addresses([(stores["a"], 1.0)], config, 5)
    assert addresses == [(stores["a"].folder, number) for number in found]
    np.testing.assert_array_equal(batch.boundary, batch.tokens % 4)
    assert batch.index.tolist() == list(range(8))
    assert batch.length.tolist() == [10] * 8
    assert batch.copy.tolist() == [0] * 8
    assert [field.dtype for field in batch] == [np.int32] * 3 + [np.uint8] + [np.int32] * 2
    assert batch.document.min() == 0
    assert batch.document.max() == 0  # every tenth token ends a document, and a row


def test_a_batch_is_a_function_of_its_step(stores, config):
    pairs = [(stores["a"], 2.0), (stores["b"], 1.0)]
    whole = take(loader.train_batches(pairs, config, 0), 60)
    for start in (1, 17, 59):
        assert_equal(take(loader.train_batches(pairs, config, start), 60 - start), whole[start:])
    config.data.prefetch, config.data.threads = 0, 1
    assert_equal(take(loader.train_batches(pairs, config, 0), 60), whole)
    config.data.prefetch, config.data.threads = 7, 5
    assert_equal(take(loader.train_batches(pairs, config, 0), 60), whole)


def test_a_far_step_is_reached_at_once(stores, texts, config):
    start = time.monotonic()
    (batch,) = take(loader.train_batches([(stores["a"], 1.0)], config, 10**12), 1)
    assert time.monotonic() - start < 1
    assert len(set(numbers(batch, texts["a", "train"]))) == 8


@pytest.mark.parametrize("copies", [1, 2])
def test_any_number_of_processes_makes_the_same_global_batch(stores, config, copies):
    config.data.copies = copies
    pairs = [(stores["a"], 2.0), (stores["b"], 1.0)]
    whole = take(loader.train_batches(pairs, config, 3), 20)
    # Blocks, a process with every other row, and two processes that hold the same rows.
    for shares in (np.split(np.arange(8), 4), [[0, 2, 4, 6], [1, 3, 5, 7]], [range(8)] * 2):
        for share in map(np.array, shares):
            part = take(loader.train_batches(pairs, config, 3, share), 20)
            assert_equal(part, [Row(*(field[share] for field in batch)) for batch in whole])


def test_every_epoch_holds_every_row_once_in_another_order(stores, texts, config):
    batches = take(loader.train_batches([(stores["b"], 1.0)], config, 0), 30)
    order = [number for batch in batches for number in numbers(batch, texts["b", "train"])]
    epochs = [tuple(order[i : i + 60]) for i in range(0, 240, 60)]  # 4 epochs of 7.5 batches
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert sorted(range(60)) != list(epochs[0])


def test_seeds_have_orders_of_their_own(stores, texts, config):
    orders = []
    for seed in (0, 1, 2):
        config.seed.data = seed
        batches = take(loader.train_batches([(stores["b"], 1.0)], config, 0), 15)
        order = [number for batch in batches for number in numbers(batch, texts["b", "train"])]
        orders += [tuple(order[:60]), tuple(order[60:])]
    assert len(set(orders)) == 6  # the second epoch of seed 0 is not the first of seed 1 either


def test_stores_have_orders_of_their_own(stores, config):
    config.train.batch_size = 60
    b, d = (loader.row_addresses([(stores[name], 1.0)], config, 0) for name in "bd")
    assert [number for _, number in b] != [number for _, number in d]


def test_lengths_cut_one_store_in_their_own_way(stores, texts, config):
    for length, T in ((8, 5), (103, 100)):
        config.data.sequence_length = length
        (batch,) = take(loader.train_batches([(stores["a"], 1.0)], config, 0), 1)
        assert batch.tokens.shape == (8, T)
        assert len(set(numbers(batch, texts["a", "train"], T))) == 8
        documents = np.cumsum(np.roll(batch.tokens == 3, 1, axis=1) * (np.arange(T) > 0), axis=1)
        np.testing.assert_array_equal(batch.document, documents)


@pytest.mark.parametrize(
    "weights, period",
    [
        ((1.0, 1.0), (1, 1)),
        ((0.7, 0.3), (7, 3)),
        ((0.125, 0.875), (1, 7)),
        ((3.0, 0.5, 0.5), (6, 1, 1)),
        ((123.0, 877.0), (123, 877)),
    ],
)
def test_a_mixture_is_exact(weights, period):
    mixture = loader._Mixture(weights)
    total = sum(period)
    for start in (0, total, 10**12 * total):
        taken = [mixture[place] for place in range(start, start + total)]
        for which, count in enumerate(period):
            rows = [row for source, row in taken if source == which]
            assert rows == list(range(start // total * count, (start // total + 1) * count))
    # Never far from its share in between: no source comes in bursts.
    so_far = np.cumsum(
        [[which == source for source in range(len(period))] for which, _ in taken], 0
    )
    places = np.arange(1, total + 1)[:, None]
    assert np.abs(so_far - places * np.array(period) / total).max() < len(period)


def test_a_mixture_reads_its_sources_by_weight(stores, texts, config):
    config.train.batch_size = 10
    pairs = [(stores["a"], 0.7), (stores["c"], 0.3)]
    batches = take(loader.train_batches(pairs, config, 0), 40)
    rows = {"a": [], "c": []}
    for step, batch in enumerate(batches):
        folders = [folder.name for folder, _ in loader.row_addresses(pairs, config, step)]
        assert collections.Counter(folders) == {"a": 7, "c": 3}
        for place, name in enumerate(folders):
            one = batch._replace(tokens=batch.tokens[place : place + 1])
            rows[name] += numbers(one, texts[name, "train"])
    # 280 rows of a: two epochs of 120 and part of a third; 120 of 500 rows of c
    assert sorted(rows["a"][:120]) == sorted(rows["a"][120:240]) == list(range(120))
    assert len(set(rows["c"])) == 120


def test_the_shares_of_a_mixture_do_not_drift(stores, config):
    config.train.batch_size = 10
    pairs = [(stores["a"], 0.7), (stores["b"], 0.3)]
    start = 10**6  # 3 million rows of b: exactly 50,000 epochs of its 60 rows, and here is the next
    addresses = [loader.row_addresses(pairs, config, start + step) for step in range(20)]
    rows = [number for step in addresses for folder, number in step if folder.name == "b"]
    assert sorted(rows) == list(range(60))


def test_copies_stand_together_and_share_an_index(stores, config):
    pairs = [(stores["a"], 1.0)]
    config.train.batch_size = 4
    single = take(loader.train_batches(pairs, config, 0), 6)
    config.train.batch_size, config.data.copies = 12, 3
    for batch, once in zip(take(loader.train_batches(pairs, config, 0), 6), single, strict=True):
        assert batch.copy.tolist() == [0, 1, 2] * 4
        assert batch.index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        for name in ("tokens", "document", "boundary", "length"):
            repeated = getattr(once, name)[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
            np.testing.assert_array_equal(getattr(batch, name), repeated)
    assert len(loader.row_addresses(pairs, config, 0)) == 4


def test_evaluation_reads_in_order_and_fills_up(stores, texts, config):
    batches = take(loader.evaluation_batches([(stores["a"], 1.0)], config, 0, 4), 9)
    assert len(batches) == 3  # 9 rows of 10 tokens; the last 5 tokens are dropped
    index = np.concatenate([batch.index for batch in batches])
    length = np.concatenate([batch.length for batch in batches])
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert index.tolist() == list(range(12))
    assert length.tolist() == [10] * 9 + [0] * 3
    np.testing.assert_array_equal(tokens[:9].ravel(), texts["a", "validation"][:90])
    assert not tokens[9:].any()


def test_evaluation_rows_do_not_depend_on_the_batch(stores, config):
    pairs = [(stores["a"], 1.0), (stores["b"], 1.0)]

    def rows(*arguments):
        batches = take(loader.evaluation_batches(pairs, config, *arguments), 99)
        joined = Row(*map(np.concatenate, zip(*batches, strict=True)))
        return {
            int(index): tokens.tobytes()
            for index, tokens, length in zip(
                joined.index, joined.tokens, joined.length, strict=True
            )
            if length
        }

    whole = rows(0, 1)
    assert sorted(whole) == list(range(9 + 4))
    assert rows(0, 4) == rows(0, 8) == rows(0, 100) == whole
    halves = [rows(0, 6, np.arange(half, half + 3)) for half in (0, 3)]
    assert not set(halves[0]) & set(halves[1])
    assert halves[0] | halves[1] == whole
    assert len(take(loader.evaluation_batches(pairs, config, 0, 14, np.arange(7, 14)), 9)) == 1


def test_evaluation_takes_the_wanted_rows_by_weight(stores, texts, config):
    def read(weights, wanted):
        pairs = [(stores[name], weight) for name, weight in weights.items()]
        (batch,) = take(loader.evaluation_batches(pairs, config, wanted, 20), 9)
        return batch.tokens[batch.length > 0].ravel(), pairs

    a, b = texts["a", "validation"], texts["b", "validation"]
    np.testing.assert_array_equal(read({"a": 1.0}, 5)[0], a[:50])
    np.testing.assert_array_equal(read({"a": 1.0}, 1000)[0], a[:90])
    np.testing.assert_array_equal(read({"a": 3.0, "b": 1.0}, 8)[0], np.append(a[:60], b[:20]))
    np.testing.assert_array_equal(read({"a": 1.0, "b": 3.0}, 8)[0], np.append(a[:20], b[:40]))


def test_evaluation_of_less_than_a_row(stores, texts, config):
    (batch,) = take(loader.evaluation_batches([(stores["c"], 1.0)], config, 0, 2), 9)
    assert batch.length.tolist() == [5, 0]
    np.testing.assert_array_equal(batch.tokens[0], [*texts["c", "validation"], 0, 0, 0, 0, 0])


def readers(monkeypatch, at_once=1):
    """The threads that read; the first `at_once` reads wait for each other."""
    seen, original, together = [], store.Split.read, threading.Barrier(at_once, timeout=10)

    def read(self, rows, T):
        seen.append(threading.current_thread())
        if len(seen) <= at_once:
            together.wait()
        return original(self, rows, T)

    monkeypatch.setattr(store.Split, "read", read)
    return seen


def alive():
    return {thread for thread in threading.enumerate() if "grain" in thread.name}


def test_rows_are_read_ahead_off_the_main_thread(stores, config, monkeypatch):
    seen, before = readers(monkeypatch, at_once=2), alive()
    iterator = loader.train_batches([(stores["a"], 1.0)], config, 0)
    deadline = time.monotonic() + 10
    while len(seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(seen) == 2  # config.data.prefetch, and nothing was asked for yet
    for _ in range(20):
        next(iterator)
    assert threading.main_thread() not in seen
    assert len(set(seen)) == 2  # config.data.threads
    iterator.close()
    while alive() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive() - before


def test_without_prefetch_there_are_no_threads(stores, config, monkeypatch):
    config.data.prefetch = 0
    seen, before = readers(monkeypatch), alive()
    iterator = loader.train_batches([(stores["a"], 1.0)], config, 0)
    assert seen == []
    next(iterator)
    assert set(seen) == {threading.main_thread()}
    assert not alive() - before


def test_a_batch_that_cannot_be_divided(stores, config):
    config.train.batch_size, config.data.copies = 8, 3
    message = "config.train.batch_size=8 is not divisible by config.data.copies=3"
    with pytest.raises(UserError, match=message):
        loader.train_batches([(stores["a"], 1.0)], config, 0)


def test_skipped_batches_are_left_out_from_their_step_on(stores, config):
    pairs, skips = [(stores["a"], 1.0)], ((5, 3), (8, 10))
    whole = take(loader.train_batches(pairs, config, 0), 30)
    expected = whole[:5] + whole[8:11] + whole[8 + 13 :]
    for start in (0, 5, 7, 9):
        rest = take(loader.train_batches(pairs, config, start, skips=skips), 15 - start)
        assert_equal(rest, expected[start:15])
    for step, number in {2: 2, 4: 4, 5: 8, 7: 10, 8: 21, 9: 22}.items():
        skipped = loader.row_addresses(pairs, config, step, skips)
        assert skipped == loader.row_addresses(pairs, config, number)


def test_too_little_text(stores, config):
    config.data.sequence_length = 700
    message = "'b' has 607 training tokens, fewer than a row of config.data.sequence_length=700"
    with pytest.raises(UserError, match=message):
        loader.train_batches([(stores["b"], 1.0)], config, 0)
    config.data.sequence_length = 13
    config.train.batch_size = 61
    with pytest.raises(UserError, match=r"'b' has 60 rows .* the 61 .*config.train.batch_size=61"):
        loader.train_batches([(stores["b"], 1.0)], config, 0)
    config.train.batch_size = 60
    loader.train_batches([(stores["b"], 1.0)], config, 0).close()
    config.train.batch_size = 62  # half of it from b
    loader.train_batches([(stores["a"], 1.0), (stores["b"], 1.0)], config, 0).close()
    config.train.batch_size = 124
    with pytest.raises(UserError, match="'b' has 60 rows .* the 62 that one batch takes"):
        loader.train_batches([(stores["a"], 1.0), (stores["b"], 1.0)], config, 0)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_damaged_row_stops_the_run(stores, config, prefetch):
    config.data.prefetch = prefetch
    config.train.batch_size = 60
    shard = stores["b"].folder / "train" / "tokens" / "c" / "1"
    intact = shard.read_bytes()
    opened = store.open_store(stores["b"].folder)
    shard.write_bytes(intact[:9] + bytes([intact[9] ^ 1]) + intact[10:])
    try:
        with pytest.raises(UserError, match="b is damaged: .*train/tokens/c/1"):
            take(loader.train_batches([(opened, 1.0)], config, 0), 1)
    finally:
        shard.write_bytes(intact)
