"""Prepares the token stores of a config: text -> vocabulary -> one store per source.

  python -m pretraining.data.prepare --config=configs/quickstart.py
  python -m pretraining.data.prepare --config=configs/quickstart.py --verify

A corpus too big for one machine is prepared by several processes or hosts that see the same files
and the same `config.data.cache`. Each takes a share of the files, numbered from 0; when all are
done, one merges them into the store that one process would have written, byte for byte:

  python -m pretraining.data.prepare --config=... --shares=16 --share=0     (to --share=15)
  python -m pretraining.data.prepare --config=... --shares=16

No file is cut, so there should be more files than shares; of a TFDS split ranges of 65,536 records
are dealt out, and python-docs goes to the first share. The first to come trains the tokenizer on
the whole corpus while the others wait (where the file system has no locks between hosts, each
trains the same): prepare `config.tokenizer.model` beforehand to spare that.

Training calls the same function and finds what is there. Below `config.data.cache` lie

  tokenizers/<address>/    a trained vocabulary, addressed by the fingerprints of the sources, the
                           share held out, and `config.tokenizer`
  stores/<address>/        one source, addressed by its fingerprint, the vocabulary, and the share

so that the same text is prepared once for all sequence lengths, objectives and mixtures.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.data.prepare",
        __doc__,
        verify="flag: check every byte of the stores and read the sources again",
        shares="divide the files among so many processes; without --share: merge what they made",
        share="the number of this process, from 0",
    )

import collections
import functools
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pretraining.data import build, cache, corpus, store, tokenizer
from pretraining.data.build import Plan, Share
from pretraining.data.store import Store
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError


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


def prepare(config, *, processes: int | None = None) -> Prepared:
    """Opens the stores of a config, after preparing those that are missing.

    Memory stays bounded, whatever the size of the corpus. Two processes that prepare the same at
    once agree: one works, the other waits. A process that is killed leaves nothing believed. What
    was left out under `config.data.errors=skip` is printed, by reason.

    Args:
      config: reads `data`, `tokenizer` and `evaluate.sets`.
      processes: that tokenise; None = `config.data.workers`, 0 = one per core. The stores do not
        depend on it.

    Raises:
      UserError: a source without documents, or with none on one side of the split; a store that is
        damaged; a source that changes meanwhile; a cache that cannot be written; what `corpus` and
        `tokenizer` raise.
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


def prepare_share(config, share: Share, *, processes: int | None = None) -> None:
    """Prepares one share of every store of a config; see `merge_shares`.

    Args:
      share: which of how many.
      processes: see `prepare`.

    Raises:
      UserError: see `prepare`.
    """
    vocabulary = _vocabulary(config, corpus.sources(config.data.corpus))
    for plan in _plans(config, vocabulary):
        count = _count(config, processes)
        skipped = build.build_share(plan, share, config.data, vocabulary, count)
        _report_skipped(plan.source, skipped)


def merge_shares(config, count: int) -> None:
    """Makes the stores of a config out of their shares, and removes those.

    Raises:
      UserError: a share is missing (all are named) or damaged; see `prepare`.
    """
    vocabulary = _vocabulary(config, corpus.sources(config.data.corpus))
    plans = _plans(config, vocabulary)
    missing = {plan.source: build.missing(plan, count) for plan in plans}
    listed = [f"{', '.join(map(str, some))} of {name!r}" for name, some in missing.items() if some]
    if listed:
        raise UserError(
            f"--shares={count}: not prepared are shares {'; '.join(listed)}; prepare each with"
            f" --shares={count} --share=<number>"
        )
    for plan in plans:
        build.merge(plan, count, vocabulary)


def find_problems(config) -> list[str]:
    """What is wrong with the stores of a config: every byte hashed, every source read again."""
    sources = corpus.sources(config.data.corpus)
    if not config.tokenizer.model:
        folder = _tokenizer_folder(config, sources, _fingerprints(config, sources))
        if problems := cache.verify(folder):
            return problems
    plans = _plans(config, _vocabulary(config, sources))
    return [problem for plan in plans for problem in _check(plan, config)]


def _check(plan: Plan, config) -> Iterator[str]:
    problems = cache.verify(plan.folder)
    yield from problems
    if not problems:
        record = corpus.Record([], collections.Counter())
        parts = corpus.parts(plan.source, config.data)
        collections.deque(corpus.read(parts, config.data.errors, record), maxlen=0)
        known = cache.read_manifest(plan.folder, hashed=0)["text_sha256"]
        if known != build.text_digest(record.digests):
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
        texts = _fingerprints(config, sources)
        folder = _tokenizer_folder(config, sources, texts)
        cache.publish(folder, functools.partial(_train_tokenizer, config, sources, texts))
        cache.read_manifest(folder)
        vocabulary = Vocabulary.load(folder / "vocabulary")
    if vocabulary.eos is None:
        raise UserError(f"config.tokenizer.model={config.tokenizer.model!r} has no eos (or sep)")
    return vocabulary


def _fingerprints(config, sources) -> list[str]:
    return [corpus.fingerprint(source.name, config.data) for source in sources]


def _tokenizer_folder(config, sources, fingerprints: list[str]) -> pathlib.Path:
    texts = [[text, each.weight] for text, each in zip(fingerprints, sources, strict=True)]
    name = cache.address(store.FORMAT, texts, config.data.validation, config.tokenizer.to_dict())
    return cache.root(config.data) / "tokenizers" / name


def _train_tokenizer(
    config, sources, fingerprints: list[str], folder: pathlib.Path
) -> dict[str, Any]:
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
    for source, known in zip(sources, fingerprints, strict=True):
        corpus.check_unchanged(source.name, known, config.data)
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


def _plan(config, vocabulary: Vocabulary, source: str, held_out: float) -> Plan:
    text = corpus.fingerprint(source, config.data)
    name = cache.address(store.FORMAT, text, vocabulary.fingerprint, held_out)
    return Plan(source, text, held_out, cache.root(config.data) / "stores" / name)


def _plans(config, vocabulary: Vocabulary) -> list[Plan]:
    """Of the sources, then of the evaluation sets."""
    sources, sets = corpus.sources(config.data.corpus), _sets(config.evaluate.sets)
    plans = [_plan(config, vocabulary, each.name, config.data.validation) for each in sources]
    return plans + [_plan(config, vocabulary, source, 1.0) for source in sets.values()]


def _pairs(config, vocabulary, sources, held_out, processes) -> tuple[tuple[Store, float], ...]:
    plans = [_plan(config, vocabulary, source.name, held_out) for source in sources]
    opened = [_open(config, vocabulary, plan, processes) for plan in plans]
    return tuple(zip(opened, (source.weight for source in sources), strict=True))


def _open(config, vocabulary: Vocabulary, plan: Plan, processes: int | None) -> Store:
    build.build(plan, config.data, vocabulary, _count(config, processes))
    opened = store.open_store(plan.folder)
    _report_skipped(plan.source, opened.manifest["skipped"])
    return opened


def _count(config, processes: int | None) -> int:
    return processes or config.data.workers or os.cpu_count() or 1


def _report_skipped(source: str, counts: dict[str, int]):
    if counts:
        print(f"{source}: left out {build.describe_skipped(counts)}", file=sys.stderr)


def _fingerprint(pairs) -> str:
    return cache.digest([[opened.fingerprint, weight] for opened, weight in pairs])


# ------------------------------------------------------------------------------------ the command


def main(config, verify: bool, shares: str | None = None, share: str | None = None) -> int:
    """Prepares and prints a summary; or checks what is there, and returns 1 where it is wrong."""
    from pretraining import init_from  # which imports most of the engine

    chosen = _chosen_share(shares, share, verify)
    config = init_from.adopt(config, None)
    if verify:
        problems = find_problems(config)
        print("\n".join(problems) or "every byte is as it was written, every source as it was read")
        return 1 if problems else 0
    if share:
        prepare_share(config, chosen)
        print(f"share {chosen.number} of {chosen.count} is prepared")
        return 0
    if shares:
        merge_shares(config, chosen.count)
    prepared = prepare(config)
    opened = [*(opened for opened, _ in prepared.train), *prepared.sets.values()]
    print(_table([_HEADER, *map(_summary, opened)]))
    return 0


def _chosen_share(shares: str | None, share: str | None, verify: bool) -> Share:
    """Of --shares alone, share 0; checked."""
    count = cli.number("shares", shares, 1, at_least=1)
    number = cli.number("share", share, 0)
    if share and not shares:
        raise UserError(f"--share={share}: of how many? --shares is missing")
    if number >= count:
        raise UserError(f"--share={share}: with --shares={shares} allowed are 0 to {count - 1}")
    if verify and shares:
        raise UserError("--verify checks whole stores: leave out --shares")
    return Share(number, count)


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
