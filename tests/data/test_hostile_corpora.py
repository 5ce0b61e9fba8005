"""Malformed corpora, through the real preparation: one clear line, or what is left out is counted.

Each corpus is an evaluation set, so that all its documents lie in one split, in order.
"""

import gzip
import io
import json
import lzma
import os
import pathlib
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretraining.data import prepare
from pretraining.errors import UserError

UTF8, JSON, FIELD, SURROGATE, DAMAGED = (
    "not UTF-8",
    "not JSON",
    "no text at text_field",
    "lone surrogate",
    "damaged file",
)


def lines(*texts) -> bytes:
    """JSON lines; bytes stand for themselves."""
    coded = [t if isinstance(t, bytes) else json.dumps({"text": t}).encode() for t in texts]
    return b"\n".join(coded) + b"\n"


def between(line: bytes) -> bytes:
    return lines("first", line, "last")


def wrong_line(reason: str, message: str) -> dict:
    """A wrong line 2 of 3: stops unless it is skipped."""
    stops = f"bad.jsonl line 2{message}"
    return {"strict": stops, "replace": stops, "skip": (["first", "last"], {reason: 1})}


def always(expected: str | list[str]) -> dict:
    whole = expected if isinstance(expected, str) else (expected, {})
    return dict.fromkeys(("strict", "replace", "skip"), whole)


TEXT = b"".join(b"Document %d has text.\n\n" % i for i in range(100))
DOCUMENTS = [f"Document {i} has text." for i in range(100)]
MORE = b"Document 100 is cut"


def inflated(compressor, mode: int) -> bytes:
    """What a writer that died had written: no member ends, all so far can be inflated."""
    return compressor.compress(TEXT + MORE) + compressor.flush(mode)


GZ = inflated(zlib.compressobj(wbits=31), zlib.Z_SYNC_FLUSH)
ZST = inflated(zstandard.ZstdCompressor().compressobj(), zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def damaged(message: str, *kept: str) -> dict:
    skip = ([*kept], {DAMAGED: 1}) if kept else f"no document but for malformed ones: 1 {DAMAGED}"
    return {"strict": message, "replace": message, "skip": skip}


def table(columns: dict, cut: int | None = None) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=1)
    return file.getvalue()[:cut]


NOT_UTF8 = pa.StringArray.from_buffers(
    3, *pa.array([b"first", b"ab\xff", b"last"], pa.binary()).buffers()[1:]
)
MARK = "(config.data.errors=replace puts U+FFFD there, skip leaves the document out)"
NO_TEXT = " is not an object with a string at config.data.text_field='text'"
ALL_BYTES = bytes(range(256))

# (file name, its content, {config.data.errors: message, or (documents, counts)})
CASES = {
    "binary named .txt": (
        "bad.txt",
        b"first\n\n\x7fELF\x02\xff\xfe\n\x80\n\nlast",
        {
            "strict": f"bad.txt: byte 12 is not UTF-8 {MARK}",
            "replace": (["first", "\x7fELF\x02\ufffd\ufffd\n\ufffd", "last"], {}),
            "skip": (["first", "last"], {UTF8: 1}),
        },
    ),
    "nothing but binary": (
        "bad.txt",
        ALL_BYTES[128:] * 9,
        {"strict": "byte 0 is not", "skip": f"no document but for malformed ones: 1 {UTF8}"},
    ),
    "NUL in text": ("bad.txt", b"fi\0rst\n\n\0\n\nlast\0", always(["fi\0rst", "\0", "last\0"])),
    "invalid UTF-8 in the middle": (
        "bad.txt",
        b"first\n\na line\nab\xc3\x28cd\nits end\n\nlast",
        {
            "strict": "bad.txt: byte 16 is not UTF-8",
            "replace": (["first", "a line\nab\ufffd(cd\nits end", "last"], {}),
            "skip": (["first", "last"], {UTF8: 1}),
        },
    ),
    "UTF-16": (
        "bad.txt",
        "first\n\nlast".encode("utf-16"),
        {"strict": "byte 0 is not", "skip": f"no document but for malformed ones: 1 {UTF8}"},
    ),
    "UTF-8 with a mark": ("bad.jsonl", b"\xef\xbb\xbf" + lines("first"), always(["first"])),
    "UTF-16 as JSON": (
        "bad.jsonl",
        lines("first").decode().encode("utf-16"),
        {"strict": "byte 0 is not", "skip": "no document but for malformed ones: 1 not"},
    ),
    "invalid UTF-8 in JSON": (
        "bad.jsonl",
        between(b'{"text": "a\xff"}'),
        {
            "strict": "bad.jsonl: byte 29 is not UTF-8",
            "replace": (["first", "a\ufffd", "last"], {}),
            "skip": (["first", "last"], {UTF8: 1}),
        },
    ),
    "lone surrogate": (
        "bad.jsonl",
        between(rb'{"text": "ab\ud800"}'),
        wrong_line(SURROGATE, ": character 2 is a lone surrogate")
        | {"replace": (["first", "ab\ufffd", "last"], {})},
    ),
    "missing field": ("bad.jsonl", between(b'{"body": "x"}'), wrong_line(FIELD, NO_TEXT)),
    "null field": ("bad.jsonl", between(b'{"text": null}'), wrong_line(FIELD, NO_TEXT)),
    "number field": ("bad.jsonl", between(b'{"text": 3}'), wrong_line(FIELD, NO_TEXT)),
    "list": ("bad.jsonl", between(b'["text"]'), wrong_line(FIELD, NO_TEXT)),
    "truncated JSON": ("bad.jsonl", between(b'{"text": "ab'), wrong_line(JSON, " is not JSON")),
    "no JSON": ("bad.jsonl", between(b"text"), wrong_line(JSON, " is not JSON")),
    "two objects": ("bad.jsonl", between(b"{} {}"), wrong_line(JSON, " is not JSON: Extra data")),
    "deeply nested": (
        "bad.jsonl",
        between(b'{"a": ' * 100_000),
        wrong_line(JSON, " is not JSON: maximum recursion"),
    ),
    "endless number": (
        "bad.jsonl",
        between(b'{"a": ' + b"9" * 5000 + b"}"),
        wrong_line(JSON, " is not JSON: Exceeds the limit"),
    ),
    "duplicate keys: the last counts": (
        "bad.jsonl",
        between(b'{"text": 3, "text": "b"}'),
        always(["first", "b", "last"]),
    ),
    "several kinds": (
        "bad.jsonl",
        lines("first", b"{", b"[]", b"x", b"\xff", rb'{"text": "\udc00"}', "last"),
        {
            "strict": "bad.jsonl line 2 is not JSON",
            "skip": (["first", "last"], {FIELD: 1, JSON: 2, SURROGATE: 1, UTF8: 1}),
        },
    ),
    "empty file": ("bad.txt", b"", always("bad.txt' has no document")),
    "empty documents": ("bad.jsonl", lines("", "\n", " "), always("bad.jsonl' has no document")),
    "white space": ("bad.txt", b" \n\t\r\n \x0c \n" * 99, always("bad.txt' has no document")),
    "one character": ("bad.txt", b"x", always(["x"])),
    "gz cut short": ("bad.txt.gz", GZ, damaged("gz is cut short", *DOCUMENTS)),
    "gz cut in its header": ("bad.txt.gz", GZ[:5], damaged("gz is cut short")),
    "zst cut short": ("bad.txt.zst", ZST, damaged("zst is cut short", *DOCUMENTS)),
    "xz cut short": (
        "bad.txt.xz",
        lzma.compress(TEXT + MORE) + lzma.compress(TEXT)[:-1],
        damaged("xz is cut short", *DOCUMENTS, MORE.decode() + DOCUMENTS[0], *DOCUMENTS[1:]),
    ),
    "gz of JSON cut short": (
        "bad.jsonl.gz",
        gzip.compress(lines("first", "last") + b'{"text": "x"') + gzip.compress(b"}")[:-1],
        damaged("gz is cut short", "first", "last"),
    ),
    "wrong magic": ("bad.txt.gz", TEXT, damaged("bad.txt.gz is corrupt")),
    "zst that is gz": ("bad.txt.zst", gzip.compress(TEXT), damaged("bad.txt.zst is corrupt")),
    "garbage after the end": (
        "bad.txt.xz",
        lzma.compress(TEXT + MORE) + b"garbage",
        damaged("xz is corrupt", *DOCUMENTS),
    ),
    "wrong checksum": (
        "bad.txt.gz",
        gzip.compress(TEXT) + gzip.compress(b"last")[:-8] + bytes(8),
        damaged("gz is corrupt", *DOCUMENTS),
    ),
    "parquet cut short": (
        "bad.parquet",
        table({"text": ["first", "last"]}, cut=-9),
        damaged("bad.parquet is not a readable parquet file"),
    ),
    "no parquet": (
        "bad.parquet",
        b"text",
        damaged("bad.parquet is not a readable parquet file"),
    ),
    "parquet of numbers": (
        "bad.parquet",
        table({"text": [1, 2]}),
        {"strict": "has int64, not string, in column 'text'", "skip": f"malformed ones: 1 {FIELD}"},
    ),
    "parquet of lists of strings": (
        "bad.parquet",
        table({"text": [["first"], ["last"]]}),
        {
            "strict": "has list<element: string>, not string, in column 'text'",
            "skip": f"no document but for malformed ones: 1 {FIELD}",
        },
    ),
    "parquet without the column": (
        "bad.parquet",
        table({"body": ["x"]}),
        {
            "strict": "has no column config.data.text_field='text'; it has body",
            "skip": f"malformed ones: 1 {FIELD}",
        },
    ),
    "parquet that is not UTF-8": (
        "bad.parquet",
        table({"text": NOT_UTF8}),
        {
            "strict": "bad.parquet row 1 of column 'text': byte 2 is not UTF-8",
            "replace": (["first", "ab\ufffd", "last"], {}),
            "skip": (["first", "last"], {UTF8: 1}),
        },
    ),
    "unknown extension": ("bad.pdf", b"first", always("bad.pdf is none of .txt, .jsonl")),
}


def fails(config, source) -> str:
    config.evaluate.sets = ()
    prepare.prepare(config)
    before = folders(config)
    config.evaluate.sets = (("bad", str(source)),)
    with pytest.raises(UserError) as caught:
        prepare.prepare(config)
    assert folders(config) == before  # nothing believed, and no remains
    message = str(caught.value)
    assert "\n" not in message
    return message


def folders(config) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(config.data.cache).rglob("*") if path.is_dir())


@pytest.mark.parametrize(
    "name, errors", [(name, errors) for name, case in CASES.items() for errors in case[2]]
)
def test_each_is_one_line_or_left_out(config, read, tmp_path, capsys, name, errors):
    file, content, expected = CASES[name]
    config.data.errors = errors
    path = tmp_path / file
    path.write_bytes(content)
    if isinstance(expected[errors], str):
        message = fails(config, path)
        assert expected[errors] in message
        assert file in message
        return
    documents, counts = expected[errors]
    assert read(config, path) == (documents, counts)
    shown = f"{path}: left out {', '.join(f'{n} {reason}' for reason, n in sorted(counts.items()))}"
    assert (shown in capsys.readouterr().err) == bool(counts)


def test_no_document_has_a_hole(config, read, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"first\n\na\n\xff\nb\n\nlast")
    config.data.errors = "skip"
    assert read(config, tmp_path / "bad.txt") == (["first", "last"], {UTF8: 1})
    config.data.txt_documents = "line"
    assert read(config, tmp_path / "bad.txt") == (["first", "a", "b", "last"], {UTF8: 1})
    config.data.txt_documents = "file"
    assert "no document but for malformed ones" in fails(config, tmp_path / "bad.txt")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a\n\nb\nc")[:-8])
    assert read(config, tmp_path / "b.txt.gz") == (["a\n\nb"], {DAMAGED: 1})


def test_counts_of_all_files_add_up(config, read, tmp_path):
    """The text around them is that of the files without what is malformed."""
    config.data.errors = "skip"
    for number in range(12):
        (tmp_path / f"{number:02}.jsonl").write_bytes(lines(f"a{number}", b"{", f"b{number}"))
    documents, counts = read(config, tmp_path / "[01]*.jsonl")
    assert documents == [f"{letter}{number}" for number in range(12) for letter in "ab"]
    assert counts == {JSON: 12}


def test_what_is_kept_of_corrupt_data(config, read, tmp_path):
    """Up to the last 1024 bytes before the damage; zlib tells what the bytes before them hold."""
    rng = np.random.default_rng(0)
    text = b"".join(b"%s\n\n" % rng.bytes(40).hex().encode() for _ in range(200))
    compressor = zlib.compressobj(wbits=31)
    sound = compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert len(sound) > 5 * 1024
    (tmp_path / "bad.txt.gz").write_bytes(sound + b"\xff" * 9)  # no block has such a type
    config.data.errors = "skip"
    before = zlib.decompressobj(wbits=31).decompress(sound[: len(sound) // 1024 * 1024])
    kept = before[: before.rindex(b"\n")].decode().split()
    assert read(config, tmp_path / "bad.txt.gz") == (kept, {DAMAGED: 1})
    config.data.errors = "strict"
    assert "bad.txt.gz is corrupt" in fails(config, tmp_path / "bad.txt.gz")


def test_a_damaged_page_of_parquet(config, read, tmp_path):
    texts = [f"Text {i}. " + "word " * 50 for i in range(5)]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1, use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 60] = b"\xff" * 60
    path.write_bytes(content)
    assert "bad.parquet is not a readable parquet file" in fails(config, path)
    config.data.errors = "skip"
    assert read(config, path) == (texts[:3], {DAMAGED: 1})


# ---------------------------------------------------------------------------- what is not a file


@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
@pytest.mark.parametrize(
    "source, message",
    [
        ("folder.txt", "folder.txt' is a folder; name its files"),
        ("folder*", r"folder*' matches no file"),
        ("*.none", r"*.none' matches no file"),
        ("none.txt", "none.txt' is no file"),
        ("link.txt", "link.txt is a link to nothing"),
        ("li*", "link.txt is a link to nothing"),
    ],
)
def test_what_is_no_file(config, tmp_path, source, message, errors):
    config.data.errors = errors
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    assert message in fails(config, tmp_path / source)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem is a file that cannot be read")
@pytest.mark.parametrize("errors", ["strict", "skip"])
def test_a_file_that_cannot_be_read_always_stops(config, tmp_path, errors):
    config.data.errors = errors
    (tmp_path / "bad.txt").symlink_to("/proc/self/mem")
    assert "cannot read " in (message := fails(config, tmp_path / "bad.txt"))
    assert "bad.txt: Input/output error" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(config, tmp_path):
    (tmp_path / "bad.txt").write_text("text")
    (tmp_path / "bad.txt").chmod(0)
    assert "bad.txt: Permission denied" in fails(config, tmp_path / "bad.txt")
