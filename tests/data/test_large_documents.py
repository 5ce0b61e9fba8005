"""Long documents, many documents, and little that inflates to much."""

import gzip
import json
import lzma
import tracemalloc

import numpy as np
import pytest
import zstandard

from configs import base
from pretraining.data import encode, tokenizer

WORDS = ["first", "last.", "text", "A", "document"]


def words(count: int) -> str:
    return " ".join(np.random.default_rng(0).choice(WORDS, count))


@pytest.fixture
def longest(monkeypatch) -> list[int]:
    """Characters of each text that was tokenised at once, which takes 100 bytes for each."""
    original, lengths = tokenizer.Vocabulary.encode_document, []

    def spy(self, text, continues=False):
        lengths.append(len(text))
        return original(self, text, continues)

    monkeypatch.setattr(tokenizer.Vocabulary, "encode_document", spy)
    return lengths


def test_one_long_line(config, read, tmp_path, longest):
    text = words(300_000)
    assert len(text) > 1.5e6
    (tmp_path / "bad.txt").write_text(text)
    assert read(config, tmp_path / "bad.txt") == ([text], {})
    assert 60_000 < max(longest) <= 1 << 16


def test_a_word_without_an_end(config, read, tmp_path, longest):
    text = "x" * 300_000
    line = json.dumps({"text": text})
    (tmp_path / "bad.jsonl").write_text(line)
    assert read(config, tmp_path / "bad.jsonl") == ([text], {})
    assert max(longest) == 1 << 16


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_cuts_change_no_token(monkeypatch, kind, normalization):
    """White space around a cut, of any kind, stays where it was; so do words, and sentences."""
    settings = base.get_config().tokenizer
    settings.size, settings.kind, settings.normalization = 290, kind, normalization
    sentences = "A text has words. Not many.\n\nIt\tends with the last document, not the first."
    vocabulary = tokenizer.train([sentences] * 9, settings)
    spaces = [" ", "  ", "\n", " \n\n ", "\t", "\u3000"]
    rng = np.random.default_rng(1)
    text = "".join(f"{word}{rng.choice(spaces)}" for word in words(400).split())
    ids, flags = vocabulary.encode_document(text)
    monkeypatch.setattr(encode, "PIECE", 50)
    cut_ids, cut_flags = encode._encode_document(vocabulary, text)
    np.testing.assert_array_equal(cut_ids, ids)
    np.testing.assert_array_equal(cut_flags & 1, flags & 1)
    lost = np.flatnonzero(cut_flags != flags)  # sentences that start right at a cut
    assert lost.size < len(text) / 40
    assert set(cut_flags[lost] & 2) <= {0}


def test_many_tiny_documents(config, read, tmp_path):
    (tmp_path / "bad.txt").write_text("x\n\n" * 10_000)
    documents, counts = read(config, tmp_path / "bad.txt")
    assert (documents, counts) == (["x"] * 10_000, {})


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_little_that_inflates_to_much(config, read, tmp_path, suffix):
    line = b" " * 99_999 + b"\n"
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    content = compress(line * 1000 + b"first\n\n" + line + b"last")
    assert len(content) < 1e6  # of 100 MB
    (tmp_path / f"bad.txt{suffix}").write_bytes(content)
    tracemalloc.start()
    assert read(config, tmp_path / f"bad.txt{suffix}") == (["first", "last"], {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e7
