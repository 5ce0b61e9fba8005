"""Documents to tokens in parallel processes, in order and within bounded memory."""

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import queue
import re
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pretraining.data import corpus, store
from pretraining.data.store import Encoded
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError

CHUNK_CHARACTERS = 1 << 18  # of the documents that a worker gets at once

# Characters of a document that are tokenised at once, to bound memory (about 100 bytes for each).
# A longer one is cut before white space where there is any, which changes no token of a tokenizer
# whose tokens hold no space inside; a sentence that starts right at a cut is not marked.
PIECE = 1 << 16


def encode_all(
    texts: Iterable[str], vocabulary: Vocabulary, share: float, processes: int
) -> Iterator[dict[str, Encoded]]:
    """Tokenises documents and sorts them into splits; the result does not depend on `processes`.

    Memory holds two chunks for each process, whatever the length of `texts`. The processes are
    spawned and import neither the main module nor JAX; they end with the iterator, or when this
    process dies.

    Args:
      texts: the documents; those that have no token are dropped.
      share: of the documents that are held out, see `corpus.is_validation`.
      processes: 1 = this one.

    Yields:
      {"train": .., "validation": ..} in the order of the documents.
    """
    if processes == 1:
        yield from map(functools.partial(_encode, vocabulary, share), _chunked(texts))
        return
    with (
        _workers(vocabulary, share, processes) as idle,
        concurrent.futures.ThreadPoolExecutor(processes) as threads,
    ):
        submit = functools.partial(threads.submit, _encode_elsewhere, idle)
        try:
            yield from in_order(submit, _chunked(texts), 2 * processes)
        finally:
            threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _workers(vocabulary: Vocabulary, share: float, count: int) -> Iterator[queue.SimpleQueue]:
    """Connections of idle processes, each of which answers a chunk with its tokens.

    Each has a pipe of its own, so that the death of one ends a wait for it, whatever it was
    writing. (concurrent.futures.ProcessPoolExecutor shares one: a worker killed in the middle of a
    message leaves the others' writing ends open, and the reader waits for ever.)
    """
    idle, context = queue.SimpleQueue(), multiprocessing.get_context("spawn")
    with _stored(vocabulary) as path, contextlib.ExitStack() as stack:
        for _ in range(count):
            here, there = context.Pipe()
            worker = context.Process(target=_work, args=(there, path, share), daemon=True)
            with _main_hidden():
                worker.start()
            there.close()
            stack.callback(worker.join)
            stack.callback(worker.terminate)
            idle.put(stack.enter_context(here))
        yield idle


def _encode_elsewhere(idle: queue.SimpleQueue, texts: list[str]) -> dict[str, Encoded]:
    connection = idle.get()
    try:
        connection.send(texts)
        answer = connection.recv()
    except (EOFError, OSError):
        raise UserError(
            "a process that tokenised died, perhaps for want of memory; lower config.data.workers"
        ) from None
    finally:
        idle.put(connection)
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _stored(vocabulary: Vocabulary) -> Iterator[str]:
    """Path of a temporary file with the vocabulary.

    As an argument it would be written to the pipe that starts a worker, of which this process holds
    both ends: where the worker dies before it reads, what a pipe cannot hold would block for ever.
    """
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump(vocabulary, file)
        file.flush()
        yield file.name


def in_order(
    submit: Callable[..., concurrent.futures.Future], items: Iterable, window: int
) -> Iterator:
    """The results of `submit(item)` in the order of `items`, at most `window` of them at a time."""
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) == window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _chunked(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(vocabulary: Vocabulary, share: float, texts: list[str]) -> dict[str, Encoded]:
    sides = {name: [] for name in store.SPLITS}
    for text in texts:
        sides["validation" if corpus.is_validation(text, share) else "train"].append(text)
    return {name: _encode_split(vocabulary, side) for name, side in sides.items()}


def _encode_split(vocabulary: Vocabulary, texts: list[str]) -> Encoded:
    tokens, flags, lengths, text_bytes = [], [], [], 0
    for text in texts:
        ids, boundary = _encode_document(vocabulary, text)
        if ids.size:
            tokens += [ids, [vocabulary.eos]]
            flags += [boundary, [0]]
            lengths.append(ids.size + 1)
            text_bytes += len(text.encode())
    dtype = store.token_dtype(vocabulary.size)
    return Encoded(
        np.concatenate([*tokens, []], dtype=dtype, casting="unsafe"),
        np.concatenate([*flags, []], dtype=np.uint8, casting="unsafe"),
        np.array(lengths, np.int64),
        text_bytes,
    )


def _encode_document(vocabulary: Vocabulary, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and flags [n] of a document of any length; a long one is cut, see `PIECE`."""
    if len(text) <= PIECE:
        return vocabulary.encode_document(text)
    parts = re.findall(rf"(?s).{{1,{PIECE}}}(?:(?<=\S)(?=\s)|\Z)|.{{1,{PIECE}}}", text)
    encoded = [vocabulary.encode_document(part, i > 0) for i, part in enumerate(parts)]
    ids, boundary = zip(*encoded, strict=True)
    return np.concatenate(ids), np.concatenate(boundary)


# ------------------------------------------------------------------------------------- in workers


@contextlib.contextmanager
def _main_hidden():
    """Processes spawned inside do not import the main module, which in training imports JAX."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(connection, path: str, share: float):
    """Answers chunks until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    vocabulary = pickle.loads(pathlib.Path(path).read_bytes())
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_answer(vocabulary, share, connection.recv()))


def _answer(
    vocabulary: Vocabulary, share: float, texts: list[str]
) -> dict[str, Encoded] | Exception:
    try:
        return _encode(vocabulary, share, texts)
    except Exception as error:
        return error


def _exit_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
