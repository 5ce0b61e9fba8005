"""Figures by hand; vectors against those that a notebook gives."""

import numpy as np
import pytest

from pretraining.data.row import WORD_START
from pretraining.yardstick import probe
from pretraining.yardstick.tasks import Labelled, Sentence


@pytest.mark.parametrize(
    "tags, entities",
    [
        ("O O", set()),
        ("I-PER I-PER O", {(0, 2, "PER")}),
        ("I-PER B-PER I-PER", {(0, 1, "PER"), (1, 3, "PER")}),  # IOB1: B parts two of a kind
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),  # IOB2
        ("I-PER I-LOC", {(0, 1, "PER"), (1, 2, "LOC")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("O I-ORG", {(1, 2, "ORG")}),
    ],
)
def test_entities(tags, entities):
    assert probe.entities(tags.split()) == entities


def test_f1_counts_whole_entities():
    """3 entities, 4 guesses, 1 of them right in place and type: P = 1/4, R = 1/3, F1 = 2/7."""
    truth = [["I-PER", "I-PER", "O", "I-LOC"], ["I-ORG", "O"]]
    guess = [["I-PER", "O", "O", "I-LOC"], ["I-LOC", "I-ORG"]]
    assert probe.entity_f1(truth, guess) == pytest.approx(2 / 7)
    assert probe.entity_f1(truth, truth) == 1
    assert probe.entity_f1([["O"]], [["O"]]) == 0


def test_matthews_correlation():
    """TP 3, FN 1, FP 2, TN 4: (12 - 2) / sqrt(5 x 4 x 6 x 5)."""
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    guess = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    assert probe.matthews(truth, guess) == pytest.approx(10 / np.sqrt(600))
    assert probe.matthews(truth, 1 - truth) == pytest.approx(-1)
    assert probe.matthews(truth, np.ones(10)) == probe.matthews(np.ones(10), guess) == 0


def test_two_texts_are_compared():
    """Equal texts are 1: |u - v| tells, and no single vector does."""
    rng = np.random.default_rng(0)

    def make(count):
        labels = rng.integers(0, 2, count)
        pairs = [[u := rng.normal(size=2), u if label else rng.normal(size=2)] for label in labels]
        vectors = [[{"mean": v, "cls": v * 0} for v in pair] for pair in pairs]
        return [Labelled(("a", "b"), int(label)) for label in labels], vectors

    (train, of_train), (dev, of_dev) = make(300), make(100)
    figures = probe.classify(train, dev, of_train, of_dev, probe.accuracy)
    assert figures["mean"] > 0.9
    assert figures["cls"] == figures["majority"] < 0.7


def test_the_majority_is_that_of_the_training_examples():
    vectors = lambda count: [[{"mean": np.zeros(1)}] for _ in range(count)]
    train = [Labelled(("a",), label) for label in (1, 1, 0)]
    dev = [Labelled(("a",), label) for label in (0, 0, 0, 1)]
    figures = probe.classify(train, dev, vectors(3), vectors(4), probe.accuracy)
    assert figures == {"majority": 0.25, "mean": 0.25}


def test_a_word_has_the_vector_of_its_first_token(causal):
    texts = ["the documents of the unknown", "object " * 40]
    sentences = [Sentence(tuple(text.split()), (), ()) for text in texts]
    words, cut = probe._words(causal, sentences)
    assert cut == 1
    assert words.numbers[0].tolist() == [0, 1, 2, 3, 4]
    assert 0 < len(words.numbers[1]) < 40
    ids, boundary = causal.vocabulary.encode_document(texts[0])
    starts = np.flatnonzero(boundary & WORD_START)
    assert len(starts) == 5 < len(ids)
    (vectors,) = causal.encode([texts[0]])
    np.testing.assert_allclose(words.vectors[0], vectors[starts], atol=1e-5)
