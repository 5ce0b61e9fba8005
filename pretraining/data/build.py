"""Builds the store of one source: alone, or in shares by several processes or hosts.

A share tokenises some of the files into a folder of its own, `<store>.shares-16/3`, complete when
its manifest is there, like the store. Merging streams the shares in order through the same writer,
so the store has the bytes that one process would have written, and removes them.
"""

import collections
import contextlib
import functools
import itertools
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from pretraining.data import cache, corpus, encode, progress, store
from pretraining.data.store import Encoded, Store
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError


class Plan(NamedTuple):
    """One store that a config needs.

    Attributes:
      source: as the user wrote it.
      fingerprint: of the source, see `corpus.fingerprint`; `folder` is named after it.
      held_out: the share of the documents.
      folder: the store's.
    """

    source: str
    fingerprint: str
    held_out: float
    folder: pathlib.Path


class Share(NamedTuple):
    """One of `count` processes that divide a source; counted from 0."""

    number: int
    count: int


_ALONE = Share(0, 1)


def build(plan: Plan, data_config, vocabulary: Vocabulary, processes: int) -> None:
    """Makes a store complete, unless it is.

    Raises:
      UserError: see `prepare.prepare`.
    """

    def fill(folder: pathlib.Path) -> dict[str, Any]:
        facts = _tokenise(plan, _ALONE, data_config, vocabulary, processes, folder)
        return _manifest(plan, vocabulary, facts)

    cache.publish(plan.folder, fill)


def build_share(
    plan: Plan, share: Share, data_config, vocabulary: Vocabulary, processes: int
) -> dict[str, int]:
    """Makes one share of a store complete, unless it or the store is.

    Returns:
      How many documents it left out, by reason.

    Raises:
      UserError: see `prepare.prepare`.
    """
    if cache.is_complete(plan.folder):
        return {}
    folder = _share_folder(plan, share)
    fill = functools.partial(_tokenise, plan, share, data_config, vocabulary, processes)
    cache.publish(folder, fill)
    return cache.read_manifest(folder, hashed=0)["skipped"]


def missing(plan: Plan, count: int) -> list[int]:
    """The shares of a store that have to be built before it can be merged."""
    if cache.is_complete(plan.folder):
        return []
    folders = {n: _share_folder(plan, Share(n, count)) for n in range(count)}
    return [number for number, folder in folders.items() if not cache.is_complete(folder)]


def merge(plan: Plan, count: int, vocabulary: Vocabulary) -> None:
    """Makes a store complete out of its shares, none of which is missing, and removes all shares.

    Memory holds one shard (file) of the store, whatever the sizes.

    Raises:
      UserError: a share that is damaged or of another text, a store that would have no document
        on one side; see `prepare.prepare`.
    """
    folders = [_share_folder(plan, Share(number, count)) for number in range(count)]

    def fill(folder: pathlib.Path) -> dict[str, Any]:
        shares = [store.open_store(each) for each in folders]
        for share in shares:
            _check_share(plan, share, vocabulary)
        manifests = [share.manifest for share in shares]
        counts = sum((collections.Counter(m["skipped"]) for m in manifests), collections.Counter())
        chunks = itertools.chain.from_iterable(map(_chunks, shares))
        total = sum(split["tokens"] for m in manifests for split in m["splits"].values())
        title = f"merging {count} shares of {_name(plan)}"
        shown = progress.show(chunks, title, " tokens", total, lambda part: part.tokens.size)
        facts = {
            "texts": [digest for m in manifests for digest in m["texts"]],
            "skipped": dict(sorted(counts.items())),
            "splits": store.write(folder, vocabulary, shown),
        }
        return _manifest(plan, vocabulary, facts)

    cache.publish(plan.folder, fill)
    for shares in plan.folder.parent.glob(f"{plan.folder.name}.shares-*"):  # of every count
        shutil.rmtree(shares, ignore_errors=True)


def text_digest(digests: list[str]) -> str:
    """What a manifest keeps of the text: a hash that shares can put together."""
    return cache.digest(digests)


def _share_folder(plan: Plan, share: Share) -> pathlib.Path:
    return plan.folder.with_name(f"{plan.folder.name}.shares-{share.count}") / str(share.number)


def _chunks(share: Store) -> Iterator[dict[str, Encoded]]:
    for name in store.SPLITS:
        totals = share.manifest["splits"][name]
        for part in getattr(share, name).encoded(totals["text_bytes"]):
            yield {name: part}


def _check_share(plan: Plan, share: Store, vocabulary: Vocabulary):
    found = share.manifest["corpus"], share.vocabulary.fingerprint
    if found != (plan.fingerprint, vocabulary.fingerprint):
        raise UserError(
            f"{share.folder} is no share of {plan.source!r}, but of another text or vocabulary;"
            " delete the folder and prepare that share again"
        )


def _tokenise(
    plan: Plan, share: Share, data_config, vocabulary, processes: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Fills a folder with a share of the text, and returns what the manifest of a share holds."""
    parts = corpus.share_of(corpus.parts(plan.source, data_config), *share)
    record = corpus.Record([], collections.Counter())
    texts = corpus.read(parts, data_config.errors, record)
    encoded = encode.encode_all(texts, vocabulary, plan.held_out, processes)
    with contextlib.closing(encoded) as chunks:
        splits = store.write(folder, vocabulary, _show(chunks, plan, share, parts))
    corpus.check_unchanged(plan.source, plan.fingerprint, data_config)
    return {
        "corpus": plan.fingerprint,
        "texts": record.digests,
        "skipped": dict(sorted(record.skipped.items())),
        "splits": splits,
    }


def _show(chunks, plan: Plan, share: Share, parts: list[corpus.Part]):
    """Progress in bytes of text; how many there will be is known of plain files."""
    total = sum(part.size for part in parts) if all(part.plain for part in parts) else None
    title = _name(plan) + (f" share {share.number} of {share.count}" if share.count > 1 else "")
    return progress.show(chunks, title, "B", total, lambda encoded: encoded.text_bytes)


def _name(plan: Plan) -> str:
    return pathlib.PurePath(plan.source).name


def _manifest(plan: Plan, vocabulary: Vocabulary, facts: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of a store holds, of the facts of its shares."""
    _check_splits(plan, facts)
    return {
        "format": store.FORMAT,
        "source": plan.source,
        "share": plan.held_out,
        "corpus": plan.fingerprint,
        "text_sha256": text_digest(facts["texts"]),
        "skipped": facts["skipped"],
        "vocabulary": vocabulary.fingerprint,
        "splits": facts["splits"],
    }


def _check_splits(plan: Plan, facts: dict[str, Any]):
    documents = {name: split["documents"] for name, split in facts["splits"].items()}
    if not sum(documents.values()):
        left_out = describe_skipped(facts["skipped"])
        raise UserError(
            f"config.data.corpus: {plan.source!r} has no document"
            + (f" but for malformed ones: {left_out}" if left_out else "")
        )
    for name in ("train", "validation")[plan.held_out == 1.0 :]:
        if not documents[name]:
            raise UserError(
                f"config.data.corpus: no {name} document in {plan.source!r}, which has"
                f" {sum(documents.values())} documents;"
                f" config.data.validation={plan.held_out} is the share held out"
            )


def describe_skipped(counts: dict[str, int]) -> str:
    """Counts in words, "3 not JSON, 1 lone surrogate"; "" = none."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
