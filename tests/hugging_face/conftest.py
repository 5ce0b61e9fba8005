"""Texts of many scripts, and what both tests of tokenizers do with them."""

import random
from pydoc_data.topics import topics

import pytest

from pretraining.errors import UserError

TEXTS = [
    *(topics[name] for name in sorted(topics)[:25]),
    *["中文没有空格。日本語も同じです。", "[CLS] [SEP] [MASK] [PAD] [UNK] <0x41>"] * 20,
    *["-------- ==== ...... 0000000 aaaa -- == 00 aa"] * 20,
]
SPECIAL = ["[MASK]", "a [CLS] b[SEP]", "<0x41>", "[UNK]", "▁▁x▁", "", " ", "\n", "\x00", "\u00ad"]
BLOCKS = [  # of Unicode, with what is composed, folded, joined and taken out
    *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x346), (0x370, 0x400), (0x400, 0x500), (0x5B0, 0x5F0)),
    *((0x620, 0x670), (0x900, 0x964), (0xB80, 0xBD0), (0xE00, 0xE5C), (0x1100, 0x1200)),
    *((0x1E00, 0x2070), (0x2100, 0x2190), (0x2570, 0x2590), (0x3040, 0x3100), (0x4E00, 0x4F00)),
    *((0xAC00, 0xAD00), (0xE000, 0xE010), (0xFB00, 0xFB50), (0xFF00, 0xFFEF), (0x1F1E6, 0x1F650)),
    *((1, 0x21), (0x1F3FB, 0x1F400), (0x10FFF0, 0x10FFFE), (0xFEFF, 0xFF00), (0x200B, 0x2010)),
]


@pytest.fixture(scope="session")
def random_texts():
    def draw_texts(number, seed=0):
        """Strings of many scripts."""
        draw = random.Random(seed)
        words = ["the", "E\u0301", "\r\n", "\n", "  ", "▁", "～", "[MASK]", "aaaa", "ſ", "ᾠ"]

        def part():
            low, high = draw.choice(BLOCKS)
            letters = "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 6)))
            return draw.choice([letters, letters, draw.choice(words)])

        return [
            draw.choice(["", "", " "]).join(part() for _ in range(draw.randrange(1, 6)))
            for _ in range(number)
        ]

    return draw_texts


@pytest.fixture(scope="session")
def ids_of():
    def encode(folder, texts):
        """By the library alone, special tokens as text."""
        from tokenizers import Tokenizer

        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        written.encode_special_tokens = True
        return [written.encode(text, add_special_tokens=False).ids for text in texts]

    return encode


@pytest.fixture(scope="session")
def fails():
    def message_of(function, *arguments, **named) -> str:
        with pytest.raises(UserError) as caught:
            function(*arguments, **named)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message_of


@pytest.fixture(scope="session")
def corpus():
    return TEXTS


@pytest.fixture(scope="session")
def special():
    return SPECIAL
