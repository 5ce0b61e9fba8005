"""Figures by hand; vectors against those that a notebook gives."""

from types import SimpleNamespace

import numpy as np
import pytest

from pretraining import predict
from pretraining.data.row import WORD_START
from pretraining.yardstick import probe, tasks, texts
from pretraining.yardstick.tasks import Labelled, Sentence, Tasks


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


# ---------------------------------------------------------------------------------------- all tasks

_IDS = {"no": 0, "yes": 1, "Ann": 2, "runs": 3}


@pytest.fixture
def telling(monkeypatch):
    """A run whose vectors are one-hot in the token: rows of 3 tokens, "-" has none."""

    def encode_document(text, continues=False):
        ids = np.array([_IDS[word] for word in text.split() if word != "-"], np.int32)
        return ids, np.zeros(len(ids), np.uint8)

    def pooled(objective, params, rows):
        first = np.array([np.eye(4)[row.tokens[0]] for row in rows], np.float32)
        return {"mean": first, "cls": 0 * first}

    encode = lambda objective, params, rows, layer: np.eye(4)[[row.tokens for row in rows]]
    monkeypatch.setattr(predict, "pooled", pooled)
    monkeypatch.setattr(predict, "encode", encode)
    monkeypatch.setattr(texts, "shorten", lambda run, payload: (run.objective, payload))
    objective = SimpleNamespace(query=1, encode=1)
    vocabulary = SimpleNamespace(encode_document=encode_document)
    return SimpleNamespace(objective=objective, vocabulary=vocabulary, params={}, payload=3)


def examples(*words, count=1):
    return [Labelled(tuple(text for text in words), _IDS[words[0].split()[0]])] * count


def test_all_tasks_of_a_run_that_tells_everything(telling):
    """CoNLL: of the 7 words of `dev` 5 have a vector; one of 2 entities, "Ann" behind the cut, is
    lost: PoS 5/7, and P = 1, R = 1/2, F1 = 2/3. "-" has no tokens."""
    both = [*examples("yes", count=8), *examples("no", count=8), *examples("yes", count=4)]
    pairs = [*examples("yes", "runs", count=8), *examples("no", "runs", count=12)]
    long = [*examples("no"), *examples("yes runs runs runs")]
    known = Sentence(("Ann", "runs"), ("NNP", "VBZ"), ("I-PER", "O"))
    tags = ("NNP", "VBZ", "VBZ", "NNP")
    asked = [
        Sentence(("Ann", "runs", "runs", "Ann"), tags, ("I-PER", "O", "O", "I-PER")),
        Sentence(("runs", "-", "runs"), ("VBZ", "VBZ", "VBZ"), ("O", "O", "O")),
    ]
    glue = {"sst2": (both, long), "cola": (both, long)}
    glue |= {"mrpc": (pairs, pairs[7:9]), "rte": (pairs, pairs[7:9])}
    found, cut = probe.measure(telling, Tasks([], glue, ([known] * 10, asked), {}, ()))
    assert cut == {"sst2": 1, "cola": 1, "mrpc": 0, "rte": 0, "conll2003": 1}
    assert [found[f"{task}/mean"] for task in glue] == pytest.approx([1, 1, 1, 1])
    # By a vector that tells nothing: the commonest, "yes" of the first two, else "no".
    assert [found[f"{task}/cls"] for task in glue] == [0.5, 0, 0.5, 0.5]
    assert found["conll2003/pos_accuracy"] == pytest.approx(5 / 7)
    assert found["conll2003/ner_f1"] == pytest.approx(2 / 3)
    assert found["conll2003/pos_accuracy_majority"] == pytest.approx(2 / 7)
    assert found["average"] == pytest.approx((4 + 5 / 7 + 2 / 3) / 6)


def test_no_average_of_some_tasks(telling):
    both = [*examples("yes", count=4), *examples("no", count=4)]
    found, _ = probe.measure(telling, tasks.NONE._replace(glue={"sst2": (both, both)}))
    assert set(found) == {"sst2/majority", "sst2/mean", "sst2/cls"}
