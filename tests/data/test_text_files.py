"""Files: what is a document in each format, whatever the compression and the size of a block."""

import gzip
import json
import lzma
import pathlib
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs import base
from pretraining.data import corpus, text_files
from pretraining.errors import UserError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstandard.compress,
}


def data_config(**changes):
    config = base.get_config().data
    config.update(changes)
    return config


def read(path, **changes):
    return list(corpus.documents(str(path), data_config(**changes)))


def fails(path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXT = "\ufeff\r\nOne é\r\n two\r\n\r\n \t\r\n\nThree\rfour 😀\n\n\nfive"
BLANK = ["One é\n two", "Three\nfour 😀", "five"]
LINE = ["One é", " two", "Three", "four 😀", "five"]
FILE = ["One é\n two\n\n \t\n\nThree\nfour 😀\n\n\nfive"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 16])
@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("how, expected", [("blank", BLANK), ("line", LINE), ("file", FILE)])
def test_txt(tmp_path, monkeypatch, how, expected, suffix, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    monkeypatch.setattr(text_files, "INFLATED", block)
    path = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](TEXT.encode()))
    assert read(path, txt_documents=how) == expected


def test_txt_of_white_space_has_no_document(tmp_path):
    path = write(tmp_path / "a.txt", " \n\t\r\n\u3000\n")
    assert [read(path, txt_documents=how) for how in ("blank", "line", "file")] == [[], [], []]


def test_a_byte_order_mark_goes_only_from_the_start(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffa\n\n\ufeffb")
    assert read(path) == ["a", "\ufeffb"]


def test_a_line_of_white_space_is_blank(tmp_path):
    assert read(write(tmp_path / "a.txt", "a\n \t\nb")) == ["a", "b"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(tmp_path, suffix):
    lines = [{"text": "a\r\nb\n\n c\rd\n"}, {"n": 1, "text": " \n"}, {"text": "é😀"}]
    content = "\ufeff" + "\r\n\r\n".join(map(json.dumps, lines)) + "\n"
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](content.encode()))
    assert read(path) == ["a\nb\n\n c\nd", "é😀"]
    assert read(write(tmp_path / "b.jsonl", '{"t": "x", "text": 1}'), text_field="t") == ["x"]


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"text": "a"', "not JSON"),
        ("[]", "'text'"),
        ('"text"', "'text'"),
        ("{}", "'text'"),
        ('{"text": null}', "'text'"),
        ('{"text": 3}', "'text'"),
        (r'{"text": "ab\ud800"}', "character 2 is a lone surrogate"),
    ],
)
def test_wrong_jsonl(tmp_path, line, named):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n\n{line}\n')
    message = fails(path)
    assert named in message
    assert f"{path} line 3" in message


def test_lone_surrogates_can_be_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00 \ude00 \ud83d!"}')
    assert read(path, errors="replace") == ["😀 \ufffd \ufffd!"]


def test_parquet(tmp_path):
    texts = [f"document {i}\r\né" for i in range(1000)]
    texts[3], texts[4] = None, " "
    kinds = [pa.string(), pa.large_string(), pa.string_view()]
    for i, kind in enumerate([*kinds, pa.dictionary(pa.int32(), pa.string())]):
        column = pa.array(texts, pa.string()).cast(kind)
        table = pa.table({"id": range(1000), "text": column})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=300)
        expected = [t.replace("\r", "") for t in texts if t and t.strip()]
        assert read(tmp_path / f"{i}.parquet") == expected


def test_wrong_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    assert "'text'; it has body, n" in fails(path)
    assert "int64, not string, in column 'n'" in fails(path, text_field="n")
    content = path.read_bytes()
    assert str(path) in fails(write(path, content[:-20]))
    assert str(path) in fails(write(path, b"no parquet"))


def test_parquet_text_that_is_not_utf8(tmp_path):
    values = pa.array([b"a", b"ab\xff"])
    column = pa.StringArray.from_buffers(2, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "row 1 of column 'text': byte 2" in fails(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", errors="replace") == ["a", "ab\ufffd"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("block", [5, 1 << 16])
def test_undecodable_bytes(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    monkeypatch.setattr(text_files, "INFLATED", block)
    content = "\ufeffé\r\n\nabc".encode() + b"\xff\xc3\n\nok"
    path = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](content))
    assert f"{path}: byte 11 " in fails(path)
    assert read(path, errors="replace") == ["é", "abc\ufffd\ufffd", "ok"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_members_and_damage(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    member = COMPRESS[suffix](b"a line that is long enough\n\n" * 20)
    write(path, member + bytes(8) + COMPRESS[suffix](b"end"))
    assert read(path) == ["a line that is long enough"] * 20 + ["end"]
    for length in range(len(member)):
        assert str(path) in fails(write(path, member[:length]))
    assert "corrupt" in fails(write(path, b"no such format"))
    assert "corrupt" in fails(write(path, member + b"rest"))


def test_zst_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(b"text") + compressor.flush()
    assert read(write(tmp_path / "a.txt.zst", content)) == ["text"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_memory_is_bounded(tmp_path, suffix):
    numbers = random.Random(0)
    content = "\n\n".join(f"{numbers.getrandbits(4000):x}" for _ in range(5000)).encode()
    path = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](content))
    tracemalloc.start()
    count = sum(1 for _ in corpus.documents(str(path), data_config()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 1.5e6  # of 5 MB
