"""The token store: one source as a flat sequence of tokens on disk, checksummed and complete.

A store is a folder:

  manifest.json            written last; sizes and sha256 of every other file, counts, settings
  vocabulary/              what the tokens mean, with the unigram counts of the training split
  train/, validation/      for each split
    tokens/                zarr3 array [tokens], uint16 where the vocabulary allows it, else uint32
    flags/                 zarr3 array [tokens] uint8: the bits of `Row.boundary`
    offsets                [documents + 1] little-endian int64: where documents start, and the end

Every document ends with eos. The arrays are cut into shards (files) of many chunks; chunks and the
index of each shard carry a crc32c, so a damaged byte is an error when it is read, not a token.
Everything else is hashed when a store is opened, and so are the shards of a store of up to
`cache.HASHED`; `cache.verify` hashes those of any.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from pretraining.data import cache
from pretraining.data.row import Row
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError

# Part of every address: raise it when the same text would now be stored in another way.
FORMAT = 3
SPLITS = ("train", "validation")

SHARD = 1 << 24  # tokens of a file: what the writer holds in memory, twice
CHUNK = 1 << 12  # tokens read and checked at once

# Holds the indices of the shards, which otherwise are read again for every row.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})


class Encoded(NamedTuple):
    """Tokenised documents of one split.

    Attributes:
      tokens: [n] ids, eos after every document.
      flags: [n] uint8, bits of `Row.boundary`.
      lengths: [documents] int64, tokens of each that ends here, eos included.
      text_bytes: UTF-8 bytes of their text.
    """

    tokens: np.ndarray
    flags: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, cut into rows of T tokens: row i is tokens [i * T, (i + 1) * T).

    Attributes:
      folder: where it lies.
      tokens, flags: [n_tokens] TensorStore handles.
      offsets: [documents + 1] int64, where documents start, and the end; stays on disk.
      n_tokens: tokens, eos included.
    """

    folder: pathlib.Path
    tokens: ts.TensorStore
    flags: ts.TensorStore
    offsets: np.ndarray
    n_tokens: int

    def rows(self, T: int) -> int:
        """Rows of T tokens: a partial last one is dropped, unless there is no other."""
        return max(self.n_tokens // T, min(self.n_tokens, 1))

    def read(self, numbers: Iterable[int], T: int) -> Row:
        """The rows of those numbers, [B] of them: `index` and `copy` are 0, for the caller to set.

        `document` counts from 0 within each row. Safe to call from several threads.

        Raises:
          UserError: a chunk does not match its checksum, or a file is gone.
        """
        spans = [(int(i) * T, min((int(i) + 1) * T, self.n_tokens)) for i in numbers]
        pending = [(self.tokens[a:b].read(), self.flags[a:b].read()) for a, b in spans]
        row = empty_rows(len(spans), T)
        for place, ((a, b), (tokens, flags)) in enumerate(zip(spans, pending, strict=True)):
            row.tokens[place, : b - a] = self._wait(tokens)
            row.boundary[place, : b - a] = self._wait(flags)
            first, last = np.searchsorted(self.offsets, (a + 1, b))
            row.document[place, self.offsets[first:last] - a] = 1
            row.length[place] = b - a
        np.cumsum(row.document, axis=1, out=row.document)
        return row

    def encoded(self, text_bytes: int, piece: int = 1 << 20) -> Iterator[Encoded]:
        """All of it in order as `write` takes it, `piece` tokens at a time.

        A document counts where it ends, and all of its `text_bytes` in the first piece.

        Raises:
          UserError: see `read`.
        """
        for a in range(0, self.n_tokens, piece):
            b = min(a + piece, self.n_tokens)
            first, last = np.searchsorted(self.offsets, (a, b), side="right")
            lengths = np.diff(self.offsets[first - 1 : last])
            tokens, flags = self.tokens[a:b].read(), self.flags[a:b].read()
            yield Encoded(self._wait(tokens), self._wait(flags), lengths, text_bytes)
            text_bytes = 0

    def _wait(self, future: ts.Future) -> np.ndarray:
        try:
            return future.result()
        except ValueError as error:
            raise UserError(cache.damaged(self.folder.parent, _one_line(error))) from None


@dataclasses.dataclass(frozen=True)
class Store:
    """An open store; pickled as its folder and opened again.

    Attributes:
      folder: where it lies.
      manifest: counts and settings, see `write`.
      vocabulary: with the unigram counts of this store's training split.
      train, validation: the splits.
    """

    folder: pathlib.Path
    manifest: dict[str, Any]
    vocabulary: Vocabulary
    train: Split
    validation: Split

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: equal in all places where the same text was prepared."""
        return cache.digest(self.manifest["files"])

    def __reduce__(self):
        return open_store, (self.folder, 0)


def empty_rows(size: int, T: int) -> Row:
    """[size] rows of length 0."""
    numbers = [np.zeros(size, np.int32) for _ in range(3)]
    tokens, document = (np.zeros((size, T), np.int32) for _ in range(2))
    return Row(tokens, numbers[0], document, np.zeros((size, T), np.uint8), *numbers[1:])


# ---------------------------------------------------------------------------------------- writing


def write(
    folder: pathlib.Path,
    vocabulary: Vocabulary,
    chunks: Iterable[dict[str, Encoded]],
    shard: int = SHARD,
    chunk: int = CHUNK,
) -> dict[str, dict[str, int]]:
    """Writes tokens, flags, offsets and vocabulary into an empty folder; holds one shard in memory.

    The bytes depend on the documents and their order alone, not on how they come in chunks.

    Args:
      folder: the work folder that `cache.publish` hands out.
      vocabulary: of the tokens; saved with the unigram counts of the training split.
      chunks: {split: Encoded}, in order; a split may be absent, a document may go on in the next.
      shard, chunk: tokens of a file, and of what is checked at once.

    Returns:
      {split: {"documents": .., "tokens": .., "text_bytes": ..}}
    """
    counts = np.zeros(vocabulary.size, np.int64)
    writers = {name: _SplitWriter(folder / name, vocabulary.size, shard, chunk) for name in SPLITS}
    for encoded in chunks:
        for name, part in encoded.items():
            writers[name].append(part)
        if "train" in encoded:
            counts += np.bincount(encoded["train"].tokens, minlength=vocabulary.size)
    vocabulary.with_counts(counts).save(folder / "vocabulary")
    return {name: writer.close() for name, writer in writers.items()}


def token_dtype(vocabulary_size: int) -> type:
    """The smallest type of the two that holds every id."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0]


class _SplitWriter:
    def __init__(self, folder: pathlib.Path, vocabulary_size: int, shard: int, chunk: int):
        folder.mkdir()
        dtype = np.dtype(token_dtype(vocabulary_size)).name
        self._tokens = _Array(folder / "tokens", dtype, shard, chunk)
        self._flags = _Array(folder / "flags", "uint8", shard, chunk)
        self._offsets = folder / "offsets"
        self._offsets.write_bytes(np.zeros(1, "<i8").tobytes())
        self._end = 0  # of the last document
        self._totals = dict(documents=0, tokens=0, text_bytes=0)

    def append(self, part: Encoded):
        ends = self._end + np.cumsum(part.lengths, dtype="<i8")
        self._end = ends[-1] if ends.size else self._end
        with self._offsets.open("ab") as file:
            file.write(ends.tobytes())
        self._tokens.append(part.tokens)
        self._flags.append(part.flags)
        self._totals["documents"] += part.lengths.size
        self._totals["tokens"] += part.tokens.size
        self._totals["text_bytes"] += part.text_bytes

    def close(self) -> dict[str, int]:
        self._tokens.flush()
        self._flags.flush()
        return self._totals


class _Array:
    """A zarr3 array that grows at its end by whole shards; `flush` adds the rest, once."""

    def __init__(self, folder: pathlib.Path, dtype: str, shard: int, chunk: int):
        self._array = _written(ts.open(_new_array(folder, dtype, shard, chunk), create=True))
        self._shard = shard
        self._waiting: list[np.ndarray] = []
        self._n_waiting = 0

    def append(self, values: np.ndarray):
        self._waiting.append(values)
        self._n_waiting += values.size
        if self._n_waiting >= self._shard:
            joined = np.concatenate(self._waiting)
            whole = joined.size - joined.size % self._shard
            for start in range(0, whole, self._shard):
                self._write(joined[start : start + self._shard])
            self._waiting, self._n_waiting = [joined[whole:].copy()], joined.size - whole

    def flush(self):
        if self._n_waiting:
            self._write(np.concatenate(self._waiting))

    def _write(self, values: np.ndarray):
        start = self._array.shape[0]
        stop = start + values.size
        self._array = _written(self._array.resize(exclusive_max=[stop]))
        _written(self._array[start:stop].write(values))


def _written(future: ts.Future):
    try:
        return future.result()
    except ValueError as error:  # what TensorStore raises when the disk is full
        raise OSError(_one_line(error)) from None


def _new_array(folder: pathlib.Path, dtype: str, shard: int, chunk: int) -> dict[str, Any]:
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk], "codecs": checked, "index_codecs": checked}
    return {
        "driver": "zarr3",
        "kvstore": _kvstore(folder),
        "metadata": {
            "shape": [0],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # Otherwise a chunk of zeros is not stored, and one that is lost reads as zeros.
        "store_data_equal_to_fill_value": True,
    }


def _kvstore(folder: pathlib.Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder}/"}


# ---------------------------------------------------------------------------------------- reading


def open_store(folder: str | pathlib.Path, hashed: int = cache.HASHED) -> Store:
    """Opens a complete store; checks every file, see `cache.read_manifest`.

    Raises:
      UserError: not complete, or damaged; names the file and says how to repair it.
    """
    folder = pathlib.Path(folder).absolute()
    manifest = cache.read_manifest(folder, hashed)
    return Store(
        folder,
        manifest,
        Vocabulary.load(folder / "vocabulary"),
        *(_open_split(folder / name, manifest["splits"][name]["tokens"]) for name in SPLITS),
    )


def _open_split(folder: pathlib.Path, n_tokens: int) -> Split:
    spec = {"driver": "zarr3", "fill_missing_data_reads": False, "recheck_cached_data": "open"}
    tokens, flags = (
        ts.open(spec | {"kvstore": _kvstore(folder / name)}, context=_CONTEXT, open=True).result()
        for name in ("tokens", "flags")
    )
    offsets = np.asarray(np.memmap(folder / "offsets", "<i8", mode="r"))
    return Split(folder, tokens, flags, offsets, n_tokens)
