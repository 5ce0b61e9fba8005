"""Prepares the token stores of a config: text -> vocabulary -> one store per source.

  python -m pretraining.data.prepare --config=configs/quickstart.py
  python -m pretraining.data.prepare --config=configs/quickstart.py --verify

Training calls the same function and finds what is there. Below `config.data.cache` lie

  tokenizers/<address>/    a trained vocabulary, addressed by the fingerprints of the sources, the
                           share held out, and `config.tokenizer`
  stores/<address>/        one source, addressed by its fingerprint, the vocabulary, and the share

so that the same text is prepared once for all sequence lengths, objectives and mixtures.
"""

import collections
import contextlib
import functools
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from pretraining.data import cache, corpus, encode, store, tokenizer
from pretraining.data.store import Encoded, Store
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError

LOG_SECONDS = 30  # between lines of progress where there is no terminal


class Prepared(NamedTuple):
    """What a run reads.

    Attributes:
      vocabulary: with the unigram counts of the mixture.
      train: (store, weight) of each source of `config.data.corpus`; its `train` split is read.
      validation: the same; its `validation` split is read.
      sets: {name: store} of `config.evaluate.sets`; all their text is in `validation`.
      fingerprint: sha256 (hex) of the content and weights of `train`: equal means equal batches.
    """

    vocabulary: Vocabulary
    train: tuple[tuple[Store, float], ...]
    validation: tuple[tuple[Store, float], ...]
    sets: dict[str, Store]
    fingerprint: str


class Plan(NamedTuple):
    """One store that a config needs: its source, the share held out, the folder."""

    source: str
    share: float
    folder: pathlib.Path


def prepare(config, *, processes: int | None = None) -> Prepared:
    """Opens the stores of a config, after preparing those that are missing.

    Memory stays bounded, whatever the size of the corpus. Two processes that prepare the same at
    once agree: one works, the other waits. A process that is killed leaves nothing believed.

    Args:
      config: reads `data`, `tokenizer` and `evaluate.sets`.
      processes: that tokenise; None = `config.data.workers`, 0 = one per core. The stores do not
        depend on it.

    Raises:
      UserError: a source without documents, or with none on one side of the split; a store that is
        damaged; a cache that cannot be written; what `corpus` and `tokenizer` raise.
    """
    sources, sets = corpus.sources(config.data.corpus), _sets(config.evaluate.sets)
    vocabulary = _vocabulary(config, sources)
    pairs = _pairs(config, vocabulary, sources, config.data.validation, processes)
    stores = {
        name: _open(config, vocabulary, _plan(config, vocabulary, source, 1.0), processes)
        for name, source in sets.items()
    }
    mixed = vocabulary.with_counts(_mixed_counts(pairs))
    return Prepared(mixed, pairs, pairs, stores, _fingerprint(pairs))


def prepare_validation(
    config, vocabulary: Vocabulary, source: str | None = None, *, processes: int | None = None
) -> Prepared:
    """Held-out text for a stored model, in the model's own vocabulary: no tokenizer is trained.

    Args:
      config: of the run that made the model.
      vocabulary: of that run; handed back as it is.
      source: all its documents are used; None = what was held out of the run's own corpus.
      processes: see `prepare`.

    Returns:
      A `Prepared` with nothing but `vocabulary`, `validation` and its fingerprint.

    Raises:
      UserError: see `prepare`.
    """
    sources = corpus.sources(source or config.data.corpus)
    share = 1.0 if source else config.data.validation
    pairs = _pairs(config, vocabulary, sources, share, processes)
    return Prepared(vocabulary, (), pairs, {}, _fingerprint(pairs))


def find_problems(config) -> list[str]:
    """What is wrong with the stores of a config: every byte hashed, every source read again."""
    sources, sets = corpus.sources(config.data.corpus), _sets(config.evaluate.sets)
    folder = _tokenizer_folder(config, sources)
    if not config.tokenizer.model and (problems := cache.verify(folder)):
        return problems
    vocabulary = _vocabulary(config, sources)
    plans = [_plan(config, vocabulary, each.name, config.data.validation) for each in sources]
    plans += [_plan(config, vocabulary, source, 1.0) for source in sets.values()]
    return [problem for plan in plans for problem in _check(plan, config)]


def _check(plan: Plan, config) -> Iterator[str]:
    problems = cache.verify(plan.folder)
    yield from problems
    if not problems:
        digest = hashlib.sha256()
        collections.deque(_read(plan.source, config.data, digest), maxlen=0)
        if cache.read_manifest(plan.folder)["text_sha256"] != digest.hexdigest():
            yield (
                f"{plan.folder} holds an earlier text of {plan.source!r}, whose change is too small"
                " for the fingerprint; delete the folder, and it will be prepared again"
            )


def _sets(sets) -> dict[str, str]:
    pairs = [item for item in sets if isinstance(item, tuple | list) and len(item) == 2]
    if len(dict(pairs)) < len(sets):
        raise UserError(
            f"config.evaluate.sets={sets!r}: expected (name, source) pairs, no name twice"
        )
    return dict(pairs)


# ------------------------------------------------------------------------------------- vocabulary


def _vocabulary(config, sources) -> Vocabulary:
    if config.tokenizer.model:
        vocabulary = tokenizer.load_model(config.tokenizer.model)
    else:
        folder = _tokenizer_folder(config, sources)
        cache.publish(folder, functools.partial(_train_tokenizer, config, sources))
        cache.read_manifest(folder)
        vocabulary = Vocabulary.load(folder / "vocabulary")
    if vocabulary.eos is None:
        raise UserError(f"config.tokenizer.model={config.tokenizer.model!r} has no eos (or sep)")
    return vocabulary


def _tokenizer_folder(config, sources) -> pathlib.Path:
    texts = [[corpus.fingerprint(source.name, config.data), source.weight] for source in sources]
    name = cache.address(store.FORMAT, texts, config.data.validation, config.tokenizer.to_dict())
    return cache.root(config.data) / "tokenizers" / name


def _train_tokenizer(config, sources, folder: pathlib.Path) -> dict[str, Any]:
    """Samples each source's training documents by its weight, all of them bounded together."""
    names = [source.name for source in sources]
    print(f"training a tokenizer on {', '.join(names)}", file=sys.stderr)
    total = sum(source.weight for source in sources)
    texts = []
    for source in sources:
        budget = int(config.tokenizer.sample_bytes * source.weight / total)
        texts += tokenizer.sample(_training_documents(source.name, config.data), budget)
    if not texts:
        listed = ", ".join(map(repr, names))
        raise UserError(f"config.data.corpus: {listed} has no document to train a tokenizer on")
    tokenizer.train(texts, config.tokenizer).save(folder / "vocabulary")
    return {"sources": names, "tokenizer": config.tokenizer.to_dict()}


def _training_documents(source: str, data_config) -> Iterator[str]:
    for text in corpus.documents(source, data_config):
        if not corpus.is_validation(text, data_config.validation):
            yield text


def _mixed_counts(pairs) -> np.ndarray:
    """[V] counts of the mixture: its relative frequencies times the tokens of all its sources.

    An id that occurs anywhere keeps a count of at least 1.
    """
    counts = [opened.vocabulary.unigram_counts for opened, _ in pairs]
    weights = [weight for _, weight in pairs]
    mixed = sum(weight * each / each.sum() for weight, each in zip(weights, counts, strict=True))
    expected = mixed / sum(weights) * np.sum(counts)
    return np.maximum(np.rint(expected), expected > 0).astype(np.int64)


# ------------------------------------------------------------------------------------------ store


def _plan(config, vocabulary: Vocabulary, source: str, share: float) -> Plan:
    text = corpus.fingerprint(source, config.data)
    name = cache.address(store.FORMAT, text, vocabulary.fingerprint, share)
    return Plan(source, share, cache.root(config.data) / "stores" / name)


def _pairs(config, vocabulary, sources, share, processes) -> tuple[tuple[Store, float], ...]:
    plans = [_plan(config, vocabulary, source.name, share) for source in sources]
    opened = [_open(config, vocabulary, plan, processes) for plan in plans]
    return tuple(zip(opened, (source.weight for source in sources), strict=True))


def _open(config, vocabulary: Vocabulary, plan: Plan, processes: int | None) -> Store:
    count = processes or config.data.workers or os.cpu_count() or 1
    cache.publish(plan.folder, functools.partial(_build, plan, config, vocabulary, count))
    return store.open_store(plan.folder)


def _fingerprint(pairs) -> str:
    return cache.digest([[opened.fingerprint, weight] for opened, weight in pairs])


def _build(plan: Plan, config, vocabulary, processes: int, folder: pathlib.Path) -> dict[str, Any]:
    before = corpus.fingerprint(plan.source, config.data)
    digest = hashlib.sha256()
    texts = _read(plan.source, config.data, digest)
    with contextlib.closing(encode.encode_all(texts, vocabulary, plan.share, processes)) as chunks:
        splits = store.write(folder, vocabulary, _show_progress(chunks, plan.source))
    _check_splits(plan, splits)
    if corpus.fingerprint(plan.source, config.data) != before:
        raise UserError(f"config.data.corpus: {plan.source!r} changed while it was being prepared")
    return {
        "format": store.FORMAT,
        "source": plan.source,
        "share": plan.share,
        "corpus": before,
        "text_sha256": digest.hexdigest(),
        "vocabulary": vocabulary.fingerprint,
        "splits": splits,
    }


def _read(source: str, data_config, digest) -> Iterator[str]:
    for text in corpus.documents(source, data_config):
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
        yield text


def _check_splits(plan: Plan, splits: dict[str, dict[str, int]]):
    if not any(split["documents"] for split in splits.values()):
        raise UserError(f"config.data.corpus: {plan.source!r} has no document")
    for name in ("train", "validation")[plan.share == 1.0 :]:
        if not splits[name]["documents"]:
            raise UserError(
                f"config.data.corpus: no {name} document in {plan.source!r}, which has"
                f" {sum(split['documents'] for split in splits.values())} documents;"
                f" config.data.validation={plan.share} is the share held out"
            )


def _show_progress(
    chunks: Iterable[dict[str, Encoded]], source: str
) -> Iterator[dict[str, Encoded]]:
    """Passes chunks through; shows documents, MB/s and, for plain text, the time that is left."""
    terminal = sys.stderr.isatty()
    sizes = [(path.stat().st_size, path.suffix) for path in corpus.files(source)]
    plain = sizes and all(suffix in (".txt", ".jsonl") for _, suffix in sizes)
    documents = 0
    with tqdm.tqdm(
        desc=pathlib.PurePath(source).name,
        total=sum(size for size, _ in sizes) if plain else None,
        unit="B",
        unit_scale=True,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else LOG_SECONDS,
        miniters=1,
    ) as bar:
        for chunk in chunks:
            documents += sum(part.lengths.size for part in chunk.values())
            bar.set_postfix(documents=documents, refresh=False)
            bar.update(sum(part.text_bytes for part in chunk.values()))
            yield chunk


class _Lines:
    """Takes the redraws of a bar and prints them as lines."""

    def write(self, text: str):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


# ------------------------------------------------------------------------------------ the command


def main(config, verify: bool) -> int:
    """Prepares and prints a summary; or checks what is there, and returns 1 where it is wrong."""
    from pretraining import init_from  # which imports most of the engine

    config = init_from.adopt(config, None)
    if verify:
        problems = find_problems(config)
        print("\n".join(problems) or "every byte is as it was written, every source as it was read")
        return 1 if problems else 0
    prepared = prepare(config)
    opened = [*(opened for opened, _ in prepared.train), *prepared.sets.values()]
    print(_table([_HEADER, *map(_summary, opened)]))
    return 0


_HEADER = ("source", "documents", "MB", "tokens", "tokens/byte", "held out", "folder")


def _summary(opened: Store) -> tuple[str, ...]:
    train, validation = (opened.manifest["splits"][name] for name in store.SPLITS)
    documents, tokens, size = (
        train[key] + validation[key] for key in ("documents", "tokens", "text_bytes")
    )
    return (
        opened.manifest["source"],
        f"{documents:,}",
        f"{size / 1e6:,.1f}",
        f"{tokens:,}",
        f"{tokens / size:.3f}",
        f"{validation['tokens'] / tokens:.1%}",
        str(opened.folder),
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    """Numbers to the right, the first and the last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last in rows:
        right = (text.rjust(width) for text, width in zip(numbers, widths[1:-1], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right, last]))
    return "\n".join(lines)


if __name__ == "__main__":
    from pretraining import cli

    cli.run(main, __doc__, verify="flag: check every byte of the stores and read the sources again")
