"""Texts out of .txt, .jsonl and .parquet files, plain or compressed, as a stream."""

import itertools
import json
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator

import zstandard

from pretraining.errors import UserError

BLOCK = 1 << 16  # bytes read at once


def read(path: pathlib.Path, data_config) -> Iterator[str]:
    """The texts of one file, in its order.

    Args:
      path: a file that `extension` accepts.
      data_config: `config.data`; reads `text_field`, `txt_documents` and `errors`.

    Raises:
      UserError: see `corpus.documents`.
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


def decode(data: bytes, errors: str, where: str, offset: int = 0) -> str:
    """UTF-8 text; `where` names the bytes in the error, `offset` is the place of the first one."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {offset + error.start} is not UTF-8"
            " (config.data.errors=replace puts U+FFFD there)"
        ) from None


def _txt(path, config) -> Iterator[str]:
    lines = _lines(path, config.errors)
    if config.txt_documents == "line":
        yield from lines
    elif config.txt_documents == "file":
        yield "\n".join(lines)
    else:
        for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield "\n".join(group)


def _jsonl(path, config) -> Iterator[str]:
    for number, line in enumerate(_lines(path, config.errors), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        text = record.get(config.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"{where} is not an object with a string at"
                f" config.data.text_field={config.text_field!r}"
            )
        yield _without_surrogates(text, config.errors, where)


def _without_surrogates(text: str, errors: str, where: str) -> str:
    r"""A lone surrogate, which JSON can write as \ud800, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise UserError(f"{where}: character {error.start} is a lone surrogate") from None
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _parquet(path, config) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, config.text_field)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[config.text_field]):
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    where = f"{path} row {row} of column {config.text_field!r}"
                    yield decode(value or b"", config.errors, where)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable parquet file: {reason}") from None


def _check_column(path, schema, field):
    if field not in schema.names:
        raise UserError(
            f"{path} has no column config.data.text_field={field!r}; it has"
            f" {', '.join(schema.names)}"
        )
    if "string" not in str(schema.field(field).type):
        raise UserError(f"{path}: column {field!r} is {schema.field(field).type}, not string")


def _lines(path, errors: str) -> Iterator[str]:
    """The lines of a text file without their ends; LF, CR LF and CR end a line."""
    offset = 0
    for line in _split(_blocks(path)):
        text = decode(line, errors, str(path), offset)
        yield (text.removeprefix("\ufeff") if offset == 0 else text).rstrip("\r\n")
        offset += len(line)


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
    try:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(BLOCK), b"")
            decompressor = _decompressor(path.suffix.lower())
            yield from _decompress(path, blocks, decompressor) if decompressor else blocks
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decompressor(suffix: str):
    """Makes an object that inflates one member of a file; None = the file is plain."""
    return {
        ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
        ".xz": lzma.LZMADecompressor,
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    }.get(suffix)


def _decompress(path, blocks: Iterable[bytes], new) -> Iterator[bytes]:
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
        raise UserError(f"{path} is corrupt: {error}") from None
    if begun:
        raise UserError(f"{path} is cut short: its compressed data has no end")
