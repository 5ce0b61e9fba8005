"""Tiny task files of the formats that are published, and small trained runs."""

import json
import pathlib

import pytest

import pretraining
from pretraining.config import objective_names

WORDS = ["the", "value", "of", "object", "document", "number", "and", "is", "in"]


@pytest.fixture(scope="session", params=objective_names())
def run(request, trained):
    return pretraining.load(trained[request.param])


@pytest.fixture(scope="session")
def causal(trained):
    return pretraining.load(trained["causal_lm"])


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """All tasks, a few lines each."""
    write(tmp_path)
    return tmp_path


def write(folder: pathlib.Path) -> None:
    sentence = lambda i: f"{WORDS[i % 9]} {WORDS[i // 2 % 9]} {WORDS[i // 3 % 9]} {i}"
    pairs = [
        {
            "UID": uid,
            "linguistics_term": term,
            "sentence_good": f"{sentence(i)} {uid}",
            "sentence_bad": f"{uid} {sentence(i + 1)}",
        }
        for uid, term in (("b", "agreement"), ("a", "agreement"), ("c", "binding"))
        for i in range(3)
    ]
    put(folder / "blimp/blimp.jsonl", [json.dumps(pair) for pair in pairs])
    for split, count in (("train", 8), ("dev", 4)):
        some = range(count)
        rows = [f"{sentence(i)}\t{i % 2}" for i in some]
        put(folder / f"glue/SST-2/{split}.tsv", ["sentence\tlabel", *rows])
        rows = [f"gj04\t{i % 2}\t\t{sentence(i)}" for i in some]
        put(folder / f"glue/CoLA/{split}.tsv", rows)
        header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        rows = [f'{i % 2}\t1\t2\tsaid " {sentence(i)}\t{sentence(i + 1)}' for i in some]
        put(folder / f"glue/MRPC/{split}.tsv", [header, *rows])
        label = ("entailment", "not_entailment")
        rows = [f"{i}\t{sentence(i)}\t{sentence(i + 2)}\t{label[i % 2]}" for i in some]
        put(folder / f"glue/RTE/{split}.tsv", ["index\tsentence1\tsentence2\tlabel", *rows])
    for name in ("train", "testa"):
        lines = ["-DOCSTART- -X- O O", "", "the DT I-NP O", "object NN I-NP I-ORG", ""]
        put(folder / f"conll2003/eng.{name}", [*lines, "document NN I-NP I-PER", "7 CD I-NP O"])


def put(path: pathlib.Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
