"""Text in: named sources, streamed document by document.

A source is `python-docs`, `tfds:<name>[/<config>][:<version>]:<split>`, or a path or glob of .txt,
.jsonl and .parquet files on a local disk; .txt and .jsonl may be compressed as .gz, .xz or .zst.

A document is what its source calls one; each newline inside it ends a paragraph:

  .txt         by `config.data.txt_documents`: "blank" = lines up to a blank one, "line" = one line,
               "file" = a whole file, blank lines included. A line is a paragraph.
  .jsonl       `config.data.text_field` of the object on each line; blank lines are skipped.
  .parquet     the column `config.data.text_field`; nulls are skipped.
  tfds         the feature `config.data.text_field`, in the order of storage.
  python-docs  a module's docstrings, or one topic of `help()`.

Everywhere CR LF and CR become LF, a byte order mark that starts a file is dropped, newlines around
a document are cut, and a document of whitespace alone is skipped.

What is malformed stops the preparation with its place, or is left out and counted where
`config.data.errors` is "skip": bytes that are not UTF-8, a lone surrogate, a line that is not JSON
or has no string at the field, a .parquet file without a column of strings. Always a whole document
is left out, none has a hole. Of a file that is cut short or corrupt the whole lines (or rows)
before the damage are kept, and the file is counted. With "replace", bytes that are not UTF-8 and
lone surrogates become U+FFFD, and everything else stops.
"""

import collections
import functools
import glob
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pretraining.data import python_docs, text_files, tfds_records
from pretraining.data.text_files import Malformed
from pretraining.errors import UserError


class Source(NamedTuple):
    """One source of `config.data.corpus`: the name that the user wrote, and its weight (> 0)."""

    name: str
    weight: float


def sources(corpus) -> tuple[Source, ...]:
    """Parses `config.data.corpus`.

    Args:
      corpus: one source, or a tuple or list whose items are sources (weight 1) and (source, weight)
        pairs.

    Raises:
      UserError: no source, a weight that is not a positive number, a source given twice.
    """
    items = [corpus] if isinstance(corpus, str) else corpus
    if not isinstance(items, list | tuple) or not items:
        raise UserError(f"config.data.corpus={corpus!r}: expected a source or a list of sources")
    parsed = tuple(map(_source, items))
    names = [source.name for source in parsed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"config.data.corpus names the source {twice[0]!r} twice; set its weight")
    return parsed


def _source(item) -> Source:
    name, weight = (item, 1.0) if isinstance(item, str) else _pair(item)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        raise UserError(f"config.data.corpus: the weight of {name!r} is {weight!r}, not positive")
    return Source(name, float(weight))


def _pair(item):
    if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
        return item
    raise UserError(f"config.data.corpus: {item!r} is neither a source nor (source, weight)")


class Part(NamedTuple):
    """What one process reads of a source: a file, or a range of records.

    Attributes:
      size: bytes of the file, or records.
      plain: the bytes are those of text that is not compressed.
      texts: streams what it holds.
    """

    size: int
    plain: bool
    texts: Callable[[], Iterator[str | Malformed]]


class Record(NamedTuple):
    """What was read.

    Attributes:
      digests: sha256 (hex) of the documents of each part.
      skipped: how many texts were left out, by reason.
    """

    digests: list[str]
    skipped: collections.Counter[str]


def documents(source: str, data_config) -> Iterator[str]:
    """Streams the documents of one source, always in the same order (files sorted by path).

    Memory holds one document and one block of a file (one batch of a row group for .parquet, one
    batch of records for TFDS), whatever the size of the corpus.

    Args:
      source: see the top of this file.
      data_config: `config.data`; reads `text_field`, `txt_documents` and `errors`.

    Raises:
      UserError: no such source, an unknown extension or setting, a file that cannot be read; what
        is malformed, unless it is skipped: bytes that are not UTF-8 (file and offset in the
        decompressed stream), a line that is not JSON or has no text (file and line), a file that is
        cut short or corrupt. What concerns a file is raised when the file is reached.
    """
    record = Record([], collections.Counter())
    return read(parts(source, data_config), data_config.errors, record)


def read(parts: Iterable[Part], errors: str, record: Record) -> Iterator[str]:
    """The documents of some parts of a source; see `documents`.

    Args:
      errors: `config.data.errors`.
      record: grows.
    """
    for part in parts:
        digest = hashlib.sha256()
        for text in filter(None, map(_tidy, _accept(part.texts(), errors, record.skipped))):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "big") + content)
            yield text
        record.digests.append(digest.hexdigest())


def _accept(texts: Iterable[str | Malformed], errors: str, skipped) -> Iterator[str]:
    for text in texts:
        if isinstance(text, str):
            yield text
        elif errors == "skip":
            skipped[text.reason] += 1
        else:
            raise UserError(text.message)


def parts(source: str, data_config) -> list[Part]:
    """The files of a source, its records in ranges, or the whole of python-docs; in order.

    Raises:
      UserError: no such source, an unknown extension or setting.
    """
    _check("errors", data_config.errors, ("strict", "replace", "skip"))
    _check("txt_documents", data_config.txt_documents, ("blank", "line", "file"))
    if source == "python-docs":
        return [Part(1, False, python_docs.documents)]
    if source.startswith("tfds:"):
        ranges = tfds_records.ranges(source, data_config)
        return [Part(size, False, texts) for size, texts in ranges]
    return [_part(path, data_config) for path in files(source)]


def _part(path: pathlib.Path, data_config) -> Part:
    texts = functools.partial(text_files.read, path, data_config)
    return Part(path.stat().st_size, path.suffix.lower() in (".txt", ".jsonl"), texts)


def share_of(parts: list[Part], share: int, shares: int) -> list[Part]:
    """Those of one of several processes that divide a source: contiguous, and balanced by size.

    A part goes where its middle byte lies, if the bytes of all are divided equally. Shares may be
    empty: a part is never cut.
    """
    total = sum(part.size for part in parts)
    ends = itertools.accumulate(part.size for part in parts)
    middles = (2 * end - part.size for end, part in zip(ends, parts, strict=True))
    owners = (min(middle * shares // max(2 * total, 1), shares - 1) for middle in middles)
    return [part for part, owner in zip(parts, owners, strict=True) if owner == share]


def _check(key: str, value, allowed: tuple[str, ...]):
    if value not in allowed:
        raise UserError(f"config.data.{key}={value!r}: allowed are {', '.join(allowed)}")


def _tidy(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    return "" if text.isspace() else text


def fingerprint(source: str, data_config) -> str:
    """sha256 (hex) that changes when what `documents` yields changes.

    Files: their names without directories, sizes, and 16 blocks of 64 KiB spread evenly from the
    first byte to the last (everything, up to 1 MiB): a change elsewhere that keeps the size goes
    unseen, and full hashes are for the preparer. TFDS: name, config, version, split and its number
    of examples. python-docs: the version of Python and the bytes of its files. And the settings
    that change how the source is read.

    Raises:
      UserError: no such source, or a file that cannot be read.
    """
    if source == "python-docs":
        return _digest(python_docs.contents())
    if source.startswith("tfds:"):
        known = tfds_records.identity(source)
        settings = [data_config.text_field, data_config.errors]
        return _digest([json.dumps([known, settings]).encode()])
    paths = files(source)
    fields = {".txt": data_config.txt_documents}
    formats = sorted(set(map(text_files.extension, paths)))
    settings = [[form, fields.get(form, data_config.text_field)] for form in formats]
    contents = itertools.chain.from_iterable(map(_sampled, paths))
    known = json.dumps([settings, data_config.errors]).encode()
    return _digest(itertools.chain([known], contents))


def check_unchanged(source: str, known: str, data_config) -> None:
    """Before what was made of a source is kept under the address of the text that it had.

    Args:
      known: its `fingerprint` when the address was made.

    Raises:
      UserError: it has another one.
    """
    if fingerprint(source, data_config) != known:
        raise UserError(f"config.data.corpus: {source!r} changed while it was being prepared")


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _sampled(path: pathlib.Path, blocks: int = 16) -> Iterator[bytes]:
    try:
        size = path.stat().st_size
        yield json.dumps([path.name, size]).encode()
        last = max(size - text_files.BLOCK, 0)
        with path.open("rb") as file:
            for offset in sorted({i * last // (blocks - 1) for i in range(blocks)}):
                file.seek(offset)
                yield file.read(text_files.BLOCK)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def files(source: str) -> tuple[pathlib.Path, ...]:
    """The files of a path or glob (`**` crosses folders), sorted; () for python-docs and TFDS.

    Raises:
      UserError: no such file, nothing matches, a folder, a link to nothing, or an unknown
        extension.
    """
    if source == "python-docs" or source.startswith("tfds:"):
        return ()
    pattern = str(pathlib.Path(source).expanduser())
    exact = pathlib.Path(pattern)
    if exact.is_dir():
        raise UserError(f"config.data.corpus: {source!r} is a folder; name its files: '{source}/*'")
    found = [exact] if exact.exists() else map(pathlib.Path, glob.glob(pattern, recursive=True))
    matches = sorted(found)
    if dangling := [path for path in matches if not path.exists()]:
        raise UserError(f"config.data.corpus: {dangling[0]} is a link to nothing")
    paths = tuple(path for path in matches if path.is_file())
    if not paths:
        wrong = "matches no file" if glob.has_magic(pattern) else "is no file"
        raise UserError(
            f"config.data.corpus: {source!r} {wrong}"
            " (other sources: python-docs, tfds:<name>[/<config>]:<split>)"
        )
    for path in paths:
        text_files.extension(path)
    return paths


def is_validation(text: str, share: float) -> bool:
    """Whether a document is held out: a function of its text alone.

    So the split depends neither on order nor on workers, and equal documents fall on one side.

    Args:
      text: the document.
      share: expected share of the documents that are held out, in [0, 1].
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "big") < share * 2.0**64
