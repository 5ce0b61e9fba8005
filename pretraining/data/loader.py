"""Batches: a function of (seed, step), so that a run resumes without any state of an iterator.

Row number g of a run is a pure function of `config.seed.data`: the mixture says which store it
comes from and how many rows of that store came before, the store's own shuffle which row that is.
Each pass over a store has another order and holds every row once; the last rows of one pass and the
first of the next may share a batch. A batch takes the next batch_size / copies rows.

Each process reads the places of the global batch that its devices hold, and `index` counts in the
global batch: any number of processes, on any mesh, makes the same one.
"""

import collections
import functools
import math
import pathlib
import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

from pretraining.data import cache
from pretraining.data.row import SPECIAL_POSITIONS, Row
from pretraining.data.store import Split, Store, empty_rows
from pretraining.errors import UserError

Stores = Sequence[tuple[Store, float]]  # with their weights


Skips = Sequence[tuple[int, int]]  # (step, n): from that step on batches are taken n further on


def train_batches(
    stores: Stores,
    config,
    start_step: int,
    places: np.ndarray | None = None,
    skips: Skips = (),
) -> grain.DatasetIterator[Row]:
    """The endless batches of steps `start_step`, `start_step` + 1, ... of one process.

    Args:
      stores: `Prepared.train`.
      config: reads `data.{sequence_length,copies,prefetch,threads}`, `train.batch_size` and
        `seed.data`.
      start_step: reached in constant time.
      places: [n] places in the global batch, ascending; None = all.
      skips: batches that the run has left out.

    Returns:
      An iterator of rows [n, ...] in numpy. `index` is the number of the row among the distinct
      ones of the global batch, `copy` that of the copy; the copies of a row stand next to each
      other and share its index. `close()` ends its threads.

    Raises:
      UserError: a batch that copies don't divide; a source with less text than a row, or with fewer
        rows than it has in one batch. When a damaged row is read, the iterator raises it.
    """
    check(stores, config)
    distinct = _distinct_rows(config)
    addresses = _addresses(stores, config)
    places = np.arange(config.train.batch_size) if places is None else places
    index, copy = (part.astype(np.int32) for part in divmod(places, config.data.copies))
    wanted, among_wanted = np.unique(index, return_inverse=True)

    def read(step: int) -> Row:
        first = batch_number(step, skips) * distinct
        row = _read(
            [store.train for store, _ in stores],
            [addresses[first + number] for number in wanted.tolist()],
            _payload(config),
        )
        row = Row(*(field[among_wanted] for field in row))
        return row._replace(index=index, copy=copy)

    return _iterate(grain.MapDataset.range(sys.maxsize)[start_step:].map(read), config)


def row_addresses(
    stores: Stores, config, step: int, skips: Skips = ()
) -> list[tuple[pathlib.Path, int]]:
    """(folder of the store, number of the row) of each distinct row of a step, in batch order.

    Those are rows of the training split, as cut by `config.data.sequence_length`.
    """
    distinct = _distinct_rows(config)
    addresses, first = _addresses(stores, config), batch_number(step, skips) * distinct
    places = [addresses[first + place] for place in range(distinct)]
    return [(stores[which][0].folder, number) for which, number in places]


def batch_number(step: int, skips: Skips) -> int:
    """The place of a step's batch among all batches, those included that were left out."""
    return step + sum(batches for since, batches in skips if step >= since)


def evaluation_batches(
    stores: Stores,
    config,
    rows_wanted: int,
    batch_size: int,
    places: np.ndarray | None = None,
) -> grain.DatasetIterator[Row]:
    """The batches of a held-out set, in a fixed order.

    Args:
      stores: `Prepared.validation`, or ((store, 1.0),) of one of `Prepared.sets`.
      config: reads `data.{sequence_length,prefetch,threads}`.
      rows_wanted: rows used, from the start of each split and by weight; a split that has fewer
        gives all it has. 0 = all rows of all splits.
      batch_size: of the global batch.
      places: [n] places in the global batch, ascending; None = all.

    Returns:
      An iterator of rows [n, ...] in numpy. `index` is the number of the row in the set, whatever
      the batch size; rows of length 0 fill up the last batch.

    Raises:
      UserError: when a damaged row is read, the iterator raises it.
    """
    T = _payload(config)
    ends = np.cumsum(_rows_used(stores, T, rows_wanted))
    places = np.arange(batch_size) if places is None else places

    def read(batch: int) -> Row:
        index = (batch * batch_size + places).astype(np.int32)
        return _read(
            [store.validation for store, _ in stores],
            [_locate(ends, number) for number in index[index < ends[-1]].tolist()],
            T,
            size=index.size,
        )._replace(index=index)

    return _iterate(grain.MapDataset.range(math.ceil(ends[-1] / batch_size)).map(read), config)


def _rows_used(stores: Stores, T: int, rows_wanted: int) -> list[int]:
    available = [store.validation.rows(T) for store, _ in stores]
    if not rows_wanted:
        return available
    mixture = _Mixture([weight for _, weight in stores])
    by_weight = collections.Counter(mixture[place][0] for place in range(rows_wanted))
    return [min(rows, by_weight[which]) for which, rows in enumerate(available)]


def _locate(ends: np.ndarray, number: int) -> tuple[int, int]:
    which = int(np.searchsorted(ends, number, side="right"))
    return which, number - (int(ends[which - 1]) if which else 0)


# ---------------------------------------------------------------------------------------- addresses


def _addresses(stores: Stores, config) -> grain.MapDataset[tuple[int, int]]:
    """The endless sequence of (which store, number of the row)."""
    datasets = [
        grain.MapDataset.range(store.train.rows(_payload(config)))
        .shuffle(_seed(config.seed.data, store))
        .map(functools.partial(_pair, which))
        .repeat()
        for which, (store, _) in enumerate(stores)
    ]
    mixture = _Mixture([weight for _, weight in stores])
    mixed = grain.MapDataset.select_from_datasets(datasets, mixture)
    # Grain sets a node up when it is first used, which is not safe in several threads at once.
    _ = [node[0] for node in (*datasets, mixed)]
    return mixed


def _pair(which: int, number: int) -> tuple[int, int]:
    return which, number


def _seed(seed: int, store: Store) -> int:
    """Hashed, because Grain adds the number of the epoch: seed 1 would be seed 0 an epoch later."""
    return int(cache.digest(["order of rows", seed, store.fingerprint])[:8], 16)


class _Mixture(grain.transforms.DatasetSelectionMap):
    """Place in the mixture -> (source, its number among that source's rows), by weight.

    The first source takes every place at which the multiples of its share pass an integer, the
    next one does the same with the places that remain, and so on. With weights that are integers of
    sum W, any W places that start at a multiple of W hold each source exactly as often as its
    weight says. (Grain's own mixture does the same with weights cut to two or three digits.)
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        self._shares = [(weight, sum(whole[which:])) for which, weight in enumerate(whole)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> tuple[int, int]:
        for which, (weight, remaining) in enumerate(self._shares):
            before = place * weight // remaining
            if (place + 1) * weight // remaining > before:
                return which, before
            place -= before
        raise AssertionError("the last source takes every place that remains")


# ------------------------------------------------------------------------------------------ reading


def _read(
    splits: list[Split], addresses: list[tuple[int, int]], T: int, size: int | None = None
) -> Row:
    """The rows at addresses [n], and behind them rows of length 0 up to `size`."""
    batch = empty_rows(len(addresses) if size is None else size, T)
    for which, split in enumerate(splits):
        places = [place for place, address in enumerate(addresses) if address[0] == which]
        rows = split.read([addresses[place][1] for place in places], T)
        for field, values in zip(batch, rows, strict=True):
            field[places] = values
    return batch


def _iterate(batches: grain.MapDataset[Row], config) -> grain.DatasetIterator[Row]:
    """Starts to read ahead, in threads of its own unless `config.data.prefetch` is 0."""
    ahead = config.data.prefetch
    options = grain.ReadOptions(min(config.data.threads, ahead), ahead)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.start_prefetch()
    return iterator


def _payload(config) -> int:
    return config.data.sequence_length - SPECIAL_POSITIONS


def _distinct_rows(config) -> int:
    size, copies = config.train.batch_size, config.data.copies
    if size % copies:
        raise UserError(
            f"config.train.batch_size={size} is not divisible by config.data.copies={copies}"
        )
    return size // copies


def check(stores: Stores, config) -> None:
    """Refuses what `train_batches` cannot serve.

    Raises:
      UserError: a batch that copies don't divide; a source with less text than a row, or with fewer
        rows than it has in one batch.
    """
    distinct = _distinct_rows(config)
    T, total = _payload(config), sum(weight for _, weight in stores)
    for store, weight in stores:
        source, rows = store.manifest["source"], store.train.rows(T)
        if store.train.n_tokens < T:
            raise UserError(
                f"config.data.corpus: {source!r} has {store.train.n_tokens} training tokens, fewer"
                f" than a row of config.data.sequence_length={config.data.sequence_length} holds"
            )
        needed = math.ceil(round(distinct * weight / total, 6))
        if rows < needed:
            raise UserError(
                f"config.data.corpus: {source!r} has {rows} rows of config.data.sequence_length="
                f"{config.data.sequence_length}, fewer than the {needed} that one batch takes:"
                f" lower config.train.batch_size={config.train.batch_size}"
            )
