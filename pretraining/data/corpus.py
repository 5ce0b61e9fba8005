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
"""

import difflib
import glob
import hashlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pretraining.data import python_docs, text_files
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


def documents(source: str, data_config) -> Iterator[str]:
    """Streams the documents of one source, always in the same order (files sorted by path).

    Memory holds one document and one block of a file (one batch of a row group for .parquet, one
    batch of records for TFDS), whatever the size of the corpus.

    Args:
      source: see the top of this file.
      data_config: `config.data`; reads `text_field`, `txt_documents` and `errors`. With
        errors="replace" undecodable bytes and lone surrogates become U+FFFD.

    Raises:
      UserError: no such source or field, an unknown extension or setting, bytes that are not UTF-8
        (file and offset in the decompressed stream), a line that is not JSON (file and line), a
        file that is cut short or corrupt. What concerns a file is raised when the file is reached.
    """
    _check("errors", data_config.errors, ("strict", "replace"))
    _check("txt_documents", data_config.txt_documents, ("blank", "line", "file"))
    if source == "python-docs":
        texts = python_docs.documents()
    elif source.startswith("tfds:"):
        texts = _tfds_documents(source, data_config)
    else:
        each = (text_files.read(path, data_config) for path in files(source))
        texts = itertools.chain.from_iterable(each)
    return filter(None, map(_tidy, texts))


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
      UserError: no such source.
    """
    if source == "python-docs":
        return _digest(python_docs.contents())
    if source.startswith("tfds:"):
        known = _tfds_identity(source)
        settings = [data_config.text_field, data_config.errors]
        return _digest([json.dumps([known, settings]).encode()])
    paths = files(source)
    fields = {".txt": data_config.txt_documents}
    formats = sorted(set(map(text_files.extension, paths)))
    settings = [[form, fields.get(form, data_config.text_field)] for form in formats]
    contents = itertools.chain.from_iterable(map(_sampled, paths))
    return _digest([json.dumps([settings, data_config.errors]).encode(), *contents])


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _sampled(path: pathlib.Path, blocks: int = 16) -> Iterator[bytes]:
    size = path.stat().st_size
    yield json.dumps([path.name, size]).encode()
    last = max(size - text_files.BLOCK, 0)
    with path.open("rb") as file:
        for offset in sorted({i * last // (blocks - 1) for i in range(blocks)}):
            file.seek(offset)
            yield file.read(text_files.BLOCK)


def files(source: str) -> tuple[pathlib.Path, ...]:
    """The files of a path or glob (`**` crosses folders), sorted; () for python-docs and TFDS.

    Raises:
      UserError: no such file, nothing matches, a folder, or an unknown extension.
    """
    if source == "python-docs" or source.startswith("tfds:"):
        return ()
    pattern = str(pathlib.Path(source).expanduser())
    exact = pathlib.Path(pattern)
    if exact.is_dir():
        raise UserError(f"config.data.corpus: {source!r} is a folder; name its files: '{source}/*'")
    matches = [exact] if exact.exists() else map(pathlib.Path, glob.glob(pattern, recursive=True))
    paths = tuple(sorted(path for path in matches if path.is_file()))
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


def _tfds_documents(source: str, config) -> Iterator[str]:
    builder, split = _tfds(source)
    records = builder.as_data_source(split=split)
    for start in range(0, len(records), 256):
        numbers = range(start, min(start + 256, len(records)))
        for number, record in zip(numbers, records.__getitems__(numbers), strict=True):
            text = record.get(config.text_field)
            if not isinstance(text, bytes):
                raise UserError(
                    f"{source} has no text at config.data.text_field={config.text_field!r};"
                    f" its features are {', '.join(record)}"
                )
            yield text_files.decode(text, config.errors, f"{source} example {number}")


def _tfds_identity(source: str) -> list:
    builder, split = _tfds(source)
    return [builder.info.full_name, split, builder.info.splits[split].num_examples]


def _tfds(source: str):
    """The builder of a dataset that is prepared on disk, and the split.

    TFDS looks in TFDS_DATA_DIR (~/tensorflow_datasets) and where `tfds.core.add_data_dir` said.
    Nothing is downloaded here, which may take days and a disk: the error says how to do it.
    """
    import tensorflow_datasets as tfds

    match = re.fullmatch(r"tfds:([\w.+/-]+(?::[\d.*]+)?):([A-Za-z_].*)", source)
    if not match:
        raise UserError(f"config.data.corpus={source!r}: expected tfds:<name>[/<config>]:<split>")
    name, split = match.groups()
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        known = set(tfds.list_builders(with_community_datasets=False))
        close = ", ".join(difflib.get_close_matches(re.split("[:/]", name)[0], known)) or "none"
        raise UserError(
            f"{source!r}: TFDS neither knows {name!r} nor finds it prepared in"
            f" {tfds.core.constants.DATA_DIR}; names like it: {close}"
        ) from None
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"{source!r}: {str(error).splitlines()[0]}") from None
    _check_prepared(source, name, builder)
    _check_split(source, split, builder)
    return builder, split


def _check_prepared(source, name, builder):
    formats = {form.value for form in builder.info.available_file_formats()}
    if not builder.is_prepared() or not formats & {"array_record", "parquet"}:
        raise UserError(
            f"{source!r} is not prepared as ArrayRecord in {builder.data_path}; run: python -c"
            f' \'import tensorflow_datasets as tfds; tfds.builder("{name}",'
            ' file_format="array_record").download_and_prepare()\''
        )


def _check_split(source, split, builder):
    try:
        builder.info.splits[split]
    except (KeyError, ValueError):
        raise UserError(
            f"{source!r}: no split {split!r}; {builder.name} has {', '.join(builder.info.splits)}"
        ) from None
