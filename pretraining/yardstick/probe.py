"""Linear probes of frozen vectors: what a classifier reads out of the last block."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pretraining import predict
from pretraining.yardstick import classifier, texts
from pretraining.yardstick.tasks import Labelled, Sentence, Tasks

# One figure of each of GLUE's tasks, of the vectors that all objectives have, and CoNLL-2003's.
AVERAGED = (
    *(f"{task}/mean" for task in ("sst2", "cola", "mrpc", "rte")),
    "conll2003/ner_f1",
    "conll2003/pos_accuracy",
)


def measure(run, tasks: Tasks) -> tuple[dict[str, float], dict[str, int]]:
    """{"<task>/<mean|cls>", "<task>/majority", "conll2003/...", "average"}, and {task: how many
    texts were cut}.

    Sentence tasks have two figures: of the mean over the vectors of a text's tokens, "mean", and of
    the objective's `summary`, "cls": [CLS] where a text is framed by one, the last token where
    positions see their left. They are accuracies, of CoLA Matthews' correlation. "majority" is the
    same figure of the training sample's commonest class. "average" is the mean over tasks, see
    AVERAGED, where all are there; as GLUE's it mixes accuracies, a correlation and an F1.

    The classifier is a logistic regression, see classifier.py. An objective without `query` and
    `encode` has no figures.
    """
    if run.objective.query is None or run.objective.encode is None:
        return {}, {}
    figures, cut = {}, {}
    if tasks.glue:
        figures, cut = _sentence_tasks(run, tasks.glue)
    if tasks.conll2003:
        found, cut["conll2003"] = tag(run, *tasks.conll2003)
        figures |= {f"conll2003/{key}": found[key] for key in found}
    if set(AVERAGED) <= set(figures):
        figures["average"] = float(np.mean([figures[name] for name in AVERAGED]))
    return figures, cut


# --------------------------------------------------------------------------------- sentence tasks


def _sentence_tasks(run, glue: dict[str, tuple[list[Labelled], list[Labelled]]]):
    """The figures of all tasks, whose texts are read together, and of each how many were cut."""
    examples = [example for splits in glue.values() for split in splits for example in split]
    flat = texts.tokenize(run, [text for example in examples for text in example.texts])

    def pooled(objective, rows, _):
        found = predict.pooled(objective, run.params, rows)
        return [{kind: found[kind][i] for kind in found} for i in range(len(rows))]

    vectors, figures, cut = iter(texts.apply(run, flat, pooled, "probe texts")), {}, {}
    were_cut = iter(flat.cut)
    for name, splits in glue.items():
        of = [[[next(vectors) for _ in each.texts] for each in split] for split in splits]
        found = classify(*splits, *of, matthews if name == "cola" else accuracy)
        figures |= {f"{name}/{key}": found[key] for key in found}
        count = sum(len(each.texts) for split in splits for each in split)
        cut[name] = sum(itertools.islice(were_cut, count))
    return figures, cut


def classify(
    train: list[Labelled],
    dev: list[Labelled],
    train_vectors: list[list[dict[str, np.ndarray]]],
    dev_vectors: list[list[dict[str, np.ndarray]]],
    metric: Callable[[np.ndarray, np.ndarray], float],
) -> dict[str, float]:
    """{"majority", and each kind of vector: figure} of one task.

    Two texts become [u, v, |u - v|, u * v] (InferSent: Conneau et al. 2017, figure 1).

    Args:
      train_vectors, dev_vectors: of each example, of each of its texts: {kind: [D]}.
      metric: (truth [n], guess [n]) -> figure.
    """
    learnt, asked = (np.array([example.label for example in split]) for split in (train, dev))
    classes = max(learnt.max(), asked.max()) + 1
    figures = {"majority": metric(asked, _majority(learnt, len(asked)))}
    for kind in train_vectors[0][0]:
        known, seen = (_features(split, kind) for split in (train_vectors, dev_vectors))
        probe = classifier.train(known, learnt, classes)
        figures[kind] = metric(asked, classifier.predict(probe, seen))
    return figures


def _features(examples: list[list[dict[str, np.ndarray]]], kind: str) -> np.ndarray:
    """[n, D] of one text each, or [n, 4 D] of two."""
    vectors = np.array([[text[kind] for text in example] for example in examples])
    if vectors.shape[1] == 1:
        return vectors[:, 0]
    u, v = vectors[:, 0], vectors[:, 1]
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1)


# ------------------------------------------------------------------------------------ token tasks


class _Words(NamedTuple):
    """Words that have a vector.

    Attributes:
      vectors: of each sentence, [w, D].
      numbers: of each sentence, which of its words these are, [w].
    """

    vectors: list[np.ndarray]
    numbers: list[np.ndarray]


def tag(run, train: list[Sentence], dev: list[Sentence]) -> tuple[dict[str, float], int]:
    """{"pos_accuracy", "ner_f1", and of each the `..._majority`}, and how many sentences were cut.

    A word's vector is that of its first token (Devlin et al. 2019, section 5.3); its class is
    decided from it alone. Words without one, behind the cut or without any token, are not learnt
    from; in `dev` they count as answered by "O", or by a wrong part of speech.
    """
    words, cut = _words(run, [*train, *dev])
    known, asked = (np.concatenate(words.vectors[part]) for part in _parts(train))
    numbers, there = (words.numbers[part] for part in _parts(train))
    groups = np.repeat(np.arange(len(train)), [len(found) for found in numbers])
    figures = {}
    for name, figure, metric in (
        ("pos", "pos_accuracy", _tag_accuracy),
        ("ner", "ner_f1", entity_f1),
    ):
        tags = [np.array(getattr(each, name))[k] for each, k in zip(train, numbers, strict=True)]
        names, labels = np.unique(np.concatenate(tags), return_inverse=True)
        probe = classifier.train(known, labels, len(names), groups)
        truth = [getattr(sentence, name) for sentence in dev]
        guess = names[classifier.predict(probe, asked)]
        figures[figure] = metric(truth, _answers(truth, there, guess))
        commonest = str(names[_majority(labels, 1)[0]])
        figures[f"{figure}_majority"] = metric(truth, [[commonest] * len(tags) for tags in truth])
    return figures, cut


def _answers(truth: list, numbers: list[np.ndarray], guess: np.ndarray) -> list[list[str]]:
    """The answers to all words of each sentence: `guess` to the `numbers` of each, else "O"."""
    answers, left = [["O"] * len(tags) for tags in truth], iter(guess.tolist())
    for answer, known in zip(answers, numbers, strict=True):
        for number in known:
            answer[number] = next(left)
    return answers


def _parts(train: list) -> tuple[slice, slice]:
    return slice(None, len(train)), slice(len(train), None)


def _words(run, sentences: list[Sentence]) -> tuple[_Words, int]:
    """The words of sentences, and how many of these were cut."""
    encoded, starts = zip(*(_encode(run.vocabulary, each.words) for each in sentences), strict=True)
    flat = texts.cut(encoded, run.payload)
    numbers = [
        np.flatnonzero((np.diff(start, append=len(ids)) > 0) & (start < run.payload))
        for start, (ids, _) in zip(starts, encoded, strict=True)
    ]

    def first_tokens(objective, rows, which):
        vectors = predict.encode(objective, run.params, rows, -1)
        return [vectors[i, starts[k][numbers[k]]] for i, k in enumerate(which)]

    return _Words(texts.apply(run, flat, first_tokens, "probe words"), numbers), sum(flat.cut)


def _encode(vocabulary, words: tuple[str, ...]):
    """(ids, boundary) of a sentence, and [words] where each word's tokens begin."""
    parts = [vocabulary.encode_document(words[0])]
    parts += [vocabulary.encode_document(f" {word}", continues=True) for word in words[1:]]
    ids, boundary = (np.concatenate(each) for each in zip(*parts, strict=True))
    return (ids, boundary), np.cumsum([0, *(len(part) for part, _ in parts[:-1])])


# ---------------------------------------------------------------------------------------- figures


def accuracy(truth: np.ndarray, guess: np.ndarray) -> float:
    """Share of equal entries [n]."""
    return float(np.mean(truth == guess))


def matthews(truth: np.ndarray, guess: np.ndarray) -> float:
    """Matthews' correlation of two classes [n], 0 where either has but one (Matthews 1975)."""
    if len(set(truth.tolist())) < 2 or len(set(guess.tolist())) < 2:
        return 0.0
    return float(np.corrcoef(truth, guess)[0, 1])


def _tag_accuracy(truth: list[np.ndarray], guess: list[np.ndarray]) -> float:
    return accuracy(np.concatenate(truth), np.concatenate(guess))


def entity_f1(truth: list[Sequence[str]], guess: list[Sequence[str]]) -> float:
    """F1 of entities whose place and type are right, over sentences of IOB tags (conlleval, Tjong
    Kim Sang and De Meulder 2003); 0 where none is."""
    pairs = list(zip(map(entities, truth), map(entities, guess), strict=True))
    right = sum(len(theirs & ours) for theirs, ours in pairs)
    return 2 * right / (sum(len(a) + len(b) for a, b in pairs) or 1)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """{(first word, word behind the last, type)} of IOB1 or IOB2 tags.

    As in conlleval, a chunk begins at B-, after O, and where the type changes.
    """
    found, first, before = set(), 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        begins = tag[0] == "B" or tag[2:] != before[2:]
        if begins and before != "O":
            found.add((first, place, str(before[2:])))
        if begins:
            first = place
        before = tag
    return found


def _majority(labels: np.ndarray, count: int) -> np.ndarray:
    """[count] times the commonest label."""
    return np.full(count, np.argmax(np.bincount(labels)))
