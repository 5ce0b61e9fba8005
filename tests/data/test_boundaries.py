"""Words and sentences start at the right tokens, under every normalisation."""

import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest

from configs import base
from pretraining.data import boundaries, tokenizer
from pretraining.data.row import SENTENCE_START, WORD_START

TEXTS = [topics[name] for name in sorted(topics)[:25]] + ["中文没有空格。日本語も同じです。"] * 20
NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")


def tokenizer_config(**changes):
    config = base.get_config().tokenizer
    config.update({"size": 900, **changes})
    return config


@pytest.fixture(scope="module")
def vocabularies():
    made = {}

    def make(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = tokenizer.train(TEXTS, tokenizer_config(**changes))
        return made[key]

    return make


@pytest.fixture(scope="module")
def vocabulary(vocabularies):
    return vocabularies()


def groups(vocabulary, text, bit):
    """The text cut before every token that has the bit."""
    ids, boundary = vocabulary.encode_document(text)
    assert ids.dtype == np.int32
    assert boundary.dtype == np.uint8
    starts = np.flatnonzero(boundary & bit)
    assert starts[0] == 0
    return [vocabulary.decode(part).strip() for part in np.split(ids, starts[1:])]


SENTENCES = [
    ["One sentence only"],
    ["  It ended. ", "Then it began.  ", "The end. "],
    ["version 1.2.3 e.g. this, i.e. that ... and so on"],
    ["Really?! ", "Yes! ", "3 times."],
    ['She said "no." ', '"Why?" ', "(Nobody knows.) ", "Fine... ", "Done.[1] x"],
    ["A line\n", "another line\n\n \t", "indented.\n", "the end. \n", "(so)\n\n"],
    ["It was «done». ", "Élan vital. ", "“Quoted.” ", "‘So.’"],
    ["我来了。", "他说：“好！”", "走吧！？ ", "Then Latin. ", "中文。"],
    ["هل هذا؟ ", "نعم هذا۔ ", "यह है। ", "हाँ।"],
    ["¿Qué? ", "¡Nada! fin"],
    ["Rare ☃. ☃ is no letter. ", "Ж is."],
]


@pytest.mark.parametrize("rule", NORMALIZATIONS)
@pytest.mark.parametrize("sentences", SENTENCES)
def test_sentences(vocabularies, rule, sentences):
    vocabulary = vocabularies(normalization=rule)
    expected = [vocabulary.normalize(sentence).strip() for sentence in sentences]
    assert groups(vocabulary, "".join(sentences), SENTENCE_START) == expected


def test_words(vocabulary):
    assert groups(vocabulary, "Well-known words,  (and)\tothers.", WORD_START) == (
        ["Well-known", "words,", "(and)", "others."]
    )
    assert groups(vocabulary, "naïve ☃☃ Ж x☃y", WORD_START) == ["naïve", "☃☃", "Ж", "x☃y"]


def test_words_without_spaces(vocabulary):
    assert "中文" not in vocabulary.pieces(range(900))
    assert "丏" not in vocabulary.pieces(range(900))  # in bytes
    words = groups(vocabulary, "丏中Python3丏。x", WORD_START)
    assert [word for word in words if word] == ["丏", "中", "Python3", "丏。x"]
    assert groups(vocabulary, "ab中", WORD_START) == ["ab", "中"]


def test_a_piece_of_several_letters_without_spaces_is_one_word():
    vocabulary = tokenizer.train(["没有空格。日本。"] * 9, tokenizer_config(kind="bpe", size=276))
    ids, boundary = vocabulary.encode_document("没有空格。日本")
    pieces = vocabulary.pieces(ids)
    assert max(map(len, pieces)) > 1
    assert [bits & WORD_START for bits in boundary] == [piece != "。" for piece in pieces]


def test_words_of_lines(vocabularies):
    vocabulary = vocabularies(normalization="identity")
    ids, boundary = vocabulary.encode_document("one\n☃two\t(three\n\n four")
    pieces = vocabulary.pieces(ids)
    shown = "".join("|" * (bits & WORD_START) + p for p, bits in zip(pieces, boundary, strict=True))
    assert shown == "|▁one|\n|<0xE2><0x98><0x83>two|<0x09>|(three|\n|\n|▁four"


def test_random_documents_keep_their_sentences_and_words(vocabularies):
    draw = random.Random(1)
    words = ["the", "Python", "naïve", "☃", "x1", "statement", "ﬁne", "👩\u200d👧"]
    for rule in ("nmt_nfkc", "identity"):
        vocabulary = vocabularies(normalization=rule)
        for _ in range(50):
            sentences = ["The " + " ".join(draw.choices(words, k=5)) + "." for _ in range(9)]
            text = "".join(s + draw.choice([" ", "\n"]) for s in sentences)
            expected = [vocabulary.normalize(sentence) for sentence in sentences]
            assert groups(vocabulary, text, SENTENCE_START) == expected
            found = [word for word in groups(vocabulary, text, WORD_START) if word]
            assert found == [word for sentence in expected for word in sentence.split()]


def test_unknown_characters_keep_their_places(vocabularies):
    vocabulary = vocabularies(byte_fallback=False, size=600)
    ids, boundary = vocabulary.encode_document("It ☃☃ Ж. Then\n☃ is. Жук Or.")
    assert vocabulary.unk in ids
    pieces = ["?" if i == vocabulary.unk else vocabulary.pieces([i])[0] for i in ids]
    marks = ["", "|", "", "#"]  # a sentence starts with a word
    shown = "".join(marks[bits] + piece for piece, bits in zip(pieces, boundary, strict=True))
    assert shown == "#▁It|▁?|▁?.#▁Then#▁?|▁is.#▁?|▁Or."


def test_word_starts_by_id(vocabulary):
    pieces = vocabulary.pieces(range(vocabulary.size))
    expected = [p[0] in "▁\n" or p[0] in "中文没有空格日本語も同じです" for p in pieces[261:]]
    spaces = [i in (9, 10, 11, 12, 13, 28, 29, 30, 31, 32) for i in range(256)]
    assert vocabulary.word_start.tolist() == [False] * 5 + spaces + expected


# The three ends of a sentence, each by itself and slow: a line break, a full stop of scripts
# without spaces, and a mark that a space follows.
CLOSING = r"""["'“”‘’«»„‹›「」『』《》〈〉)\]）】]*"""
PLAIN = (
    r"\n\s*(?=\S)",
    rf"[。！？｡]+{CLOSING}[^\S\n]*(?=\S)",
    rf"[.!?…؟۔।]+{CLOSING}[^\S\n]+(?=[(\[¿¡]*(\S))",
)


def test_the_fast_pattern_of_sentences_is_the_plain_one():
    plain, generator = re.compile("|".join(PLAIN)), random.Random(0)
    spans = lambda pattern, text: [(m.span(), m[1]) for m in pattern.finditer(text)]
    found = 0
    for _ in range(20_000):
        text = "".join(generator.choices("\n\n 。！.!?…\"')）(¿aA1é ", k=generator.randint(1, 12)))
        assert spans(boundaries._SENTENCE, text) == spans(plain, text), repr(text)
        found += len(spans(plain, text))
    assert found > 20_000
