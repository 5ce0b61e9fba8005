"""Texts out of .txt, .jsonl and .parquet files, plain or compressed, as a stream."""

import itertools
import json
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import zstandard

from pretraining.errors import UserError

BLOCK = 1 << 16  # bytes read at once
INFLATED = 1 << 10  # compressed bytes inflated at once; they become 32 MiB at most


class Malformed(NamedTuple):
    """Stands for a text that cannot be had.

    Attributes:
      reason: what is counted, few words, the same for all of a kind.
      message: one line that names the place.
    """

    reason: str
    message: str


_NO_TEXT, _DAMAGED = "no text at text_field", "damaged file"  # reasons


class _Damaged(Exception):
    """The compressed data of a file ends early, or is none."""


def read(path: pathlib.Path, data_config) -> Iterator[str | Malformed]:
    """The texts of one file, in its order; a malformed one in the place of each that is lost.

    Of a file that is cut short or corrupt come the texts before the damage, then a `Malformed`. Of
    corrupt compressed data the last `INFLATED` bytes before the damage are lost too.

    Args:
      path: a file that `extension` accepts.
      data_config: `config.data`; reads `text_field`, `txt_documents` and `errors`.

    Raises:
      UserError: the file cannot be read.
    """
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    return readers[extension(path)](path, data_config)


def extension(path: pathlib.Path) -> str:
    """.txt, .jsonl or .parquet: the extension before that of a compression.

    Raises:
      UserError: another extension. Parquet files compress their own pages.
    """
    match = re.search(r"((\.txt|\.jsonl)(\.gz|\.xz|\.zst)?|(\.parquet))$", path.name.lower())
    if not match:
        raise UserError(
            f"config.data.corpus: {path} is none of .txt, .jsonl (plain, .gz, .xz, .zst), .parquet"
        )
    return match[2] or match[4]


def decode(data: bytes, errors: str, where: str, offset: int = 0) -> str | Malformed:
    """UTF-8 text; `where` names the bytes in the message, `offset` is the place of the first one.

    Args:
      errors: "replace" puts U+FFFD where bytes are not UTF-8; else the text is malformed.
    """
    try:
        return data.decode("utf-8", "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        message = (
            f"{where}: byte {offset + error.start} is not UTF-8 (config.data.errors=replace puts"
            " U+FFFD there, skip leaves the document out)"
        )
        return Malformed("not UTF-8", message)


def _txt(path, config) -> Iterator[str | Malformed]:
    """One malformed line makes its document malformed: none has a hole."""
    lines = _lines(path, config.errors)
    if config.txt_documents == "line":
        yield from lines
    elif config.txt_documents == "file":
        yield from _joined(lines)
    else:
        for blank, group in itertools.groupby(lines, key=_is_blank):
            if not blank:
                yield from _joined(group)


def _is_blank(line: str | Malformed) -> bool:
    return isinstance(line, str) and not line.strip()


def _joined(lines: Iterable[str | Malformed]) -> Iterator[str | Malformed]:
    """One document. The lines before a damage of the file are one too."""
    lines = list(lines)
    damage = [lines.pop()] if lines and _is_damage(lines[-1]) else []
    wrong = next((line for line in lines if isinstance(line, Malformed)), None)
    yield wrong or "\n".join(lines)
    yield from damage


def _is_damage(line: str | Malformed) -> bool:
    return isinstance(line, Malformed) and line.reason == _DAMAGED


def _jsonl(path, config) -> Iterator[str | Malformed]:
    for number, line in enumerate(_lines(path, config.errors), start=1):
        if isinstance(line, Malformed):
            yield line
        elif line.strip():
            yield _field(line, config, f"{path} line {number}")


def _field(line: str, config, where: str) -> str | Malformed:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Malformed("not JSON", f"{where} is not JSON: {error}")
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        message = (
            f"{where} is not an object with a string at"
            f" config.data.text_field={config.text_field!r}"
        )
        return Malformed(_NO_TEXT, message)
    return _without_surrogates(text, config.errors, where)


def _without_surrogates(text: str, errors: str, where: str) -> str | Malformed:
    r"""A lone surrogate, which JSON can write as \ud800, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors != "replace":
            message = f"{where}: character {error.start} is a lone surrogate"
            return Malformed("lone surrogate", message)
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _parquet(path, config) -> Iterator[str | Malformed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if problem := _wrong_column(file.schema_arrow, config.text_field):
                yield Malformed(_NO_TEXT, f"{path} {problem}")
                return
            for row, value in enumerate(_values(file, config.text_field)):
                where = f"{path} row {row} of column {config.text_field!r}"
                yield decode(value or b"", config.errors, where)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Malformed(_DAMAGED, f"{path} is not a readable parquet file: {reason}")


def _values(file, field: str) -> Iterator[bytes | None]:
    """Group by group, so that a damaged one takes none with it that comes before."""
    import pyarrow as pa

    for group in range(file.num_row_groups):
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
            yield from batch.column(0).cast(pa.large_binary()).to_pylist()


def _wrong_column(schema, field: str) -> str | None:
    if field not in schema.names:
        return f"has no column config.data.text_field={field!r}; it has {', '.join(schema.names)}"
    kind = schema.field(field).type
    return None if _is_text(kind) else f"has {kind}, not string, in column {field!r}"


def _is_text(kind) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _lines(path, errors: str) -> Iterator[str | Malformed]:
    """The lines of a text file without their ends; LF, CR LF and CR end a line."""
    offset = 0
    try:
        for line in _split(_blocks(path)):
            text = decode(line, errors, str(path), offset)
            if isinstance(text, str):
                text = (text.removeprefix("\ufeff") if offset == 0 else text).rstrip("\r\n")
            yield text
            offset += len(line)
    except _Damaged as error:
        yield Malformed(_DAMAGED, f"{path} is {error}")


def _split(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends. A CR that ends a block waits for its LF."""
    parts = []
    for block in blocks:
        parts.append(block)
        if b"\n" in block or b"\r" in block:
            lines = b"".join(parts).splitlines(keepends=True)
            parts = [] if lines[-1].endswith(b"\n") else [lines.pop()]
            yield from lines
    if rest := b"".join(parts):
        yield from rest.splitlines(keepends=True)


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
    decompressor = _decompressor(path.suffix.lower())
    try:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(INFLATED if decompressor else BLOCK), b"")
            yield from _decompress(blocks, decompressor) if decompressor else blocks
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decompressor(suffix: str):
    """Makes an object that inflates one member of a file; None = the file is plain."""
    return {
        ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
        ".xz": lzma.LZMADecompressor,
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    }.get(suffix)


def _decompress(blocks: Iterable[bytes], new) -> Iterator[bytes]:
    """A file may hold several members one after another, with zeros between them."""
    member, begun = new(), True
    try:
        for block in blocks:
            while block := block if begun else block.lstrip(b"\0"):
                begun = True
                yield member.decompress(block)
                block = member.unused_data
                if member.eof:
                    member, begun = new(), False
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _Damaged(f"corrupt: {error}") from None
    if begun:
        raise _Damaged("cut short: its compressed data has no end")
