"""Preparation against `datasets.map`, and the rate of the loader without any training.

    python -m experiments.speed.preparation [--corpus=...] [--model=...] [--size=8192] [--rounds=2]
        [--output=FILE]

Rounds A B C A B C, each in a process of its own with an empty cache, on one plain .jsonl file:

  A  `prepare`: text -> token store
  B  `datasets.load_dataset("json")`, then `.map(tokenize, batched=True, num_proc=2)` -> Arrow, with
     a `PreTrainedTokenizerFast` of the same vocabulary, as `pretraining.export` writes it
  C  the same with the normalizer of transformers' converter (`SpmConverter`), which is what most
     people have. It need not make our ids, so it is no competitor and has no ratio; it stands here
     to show how much of B's time is its normalizer

The file is written and the vocabulary trained beforehand; importing is not timed. A and B must give
as many ids for the corpus, and the same ids for its first documents. CPU seconds, of all processes
together, hardly depend on what else the machine does. Memory is the largest sum of
proportional set sizes (PSS: a page that n processes share counts 1/n in each) of the processes of a
round, looked at ten times a second.

What A does in its time and B does not: it holds documents out by the hash of their text, finds
where words and sentences start and stores that with the tokens, counts the ids, hashes texts and
files, and waits until they are on the disk. What B does and A does not: it makes an Arrow table of
the text before it maps; the column "of that map" leaves it out. No attention mask is made.

Needs the packages `datasets` and `transformers`, which the project does not depend on.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "experiments.speed.preparation",
        __doc__,
        with_config=False,
        corpus="a source as in config.data.corpus (default python-docs)",
        model="an existing tokenizer as in config.tokenizer.model (default: one is trained)",
        size="pieces of a trained one (default 8192)",
        rounds="times each side runs (default 2)",
        output="file that is written (default: experiments/speed/measured/preparation.md)",
    )

import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import psutil

from configs import base
from experiments.speed import page
from pretraining.data import corpus as corpus_lib
from pretraining.data import loader, prepare, store
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.data.store import Store
from pretraining.errors import UserError

PROCESSES = 2
SAMPLE = 300  # documents whose ids are compared
LOADED = ((32, 128), (256, 128), (256, 512), (64, 1024))  # B, L
LOADER_SECONDS = 3.0
A, B = "A prepare", "B datasets.map"
_PACKAGES = ("sentencepiece", "datasets", "transformers", "tokenizers", "pyarrow", "tensorstore")


class Round(NamedTuple):
    """What one side made of the text.

    Attributes:
      seconds: from the file to the last byte written.
      map_seconds: without the table of the text, which only `datasets` makes.
      cpu_seconds: of this process and of those that it started, in `seconds`.
      ids: how many, eos not counted.
      sample: the ids of the first documents.
      written: bytes on the disk.
      memory: bytes, see the top of this file.
    """

    seconds: float
    map_seconds: float
    cpu_seconds: float
    ids: int
    sample: list[list[int]]
    written: int
    memory: int = 0


Side = Callable[[pathlib.Path], Round]  # of an empty folder


def main(
    corpus: str | None,
    model: str | None,
    size: str | None,
    rounds: str | None,
    output: str | None,
) -> int:
    """The command."""
    _check_packages()
    pieces, count = cli.number("size", size, 8192), cli.number("rounds", rounds, 2, at_least=1)
    path, source = page.place("preparation", output), corpus or "python-docs"
    options = {"corpus": source, "model": model, "size": size, "rounds": count}
    origin = page.origin("preparation", options, _PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        config = _config(source, model or "", pieces, work)
        prepared = prepare.prepare(config)
        opened = prepared.train[0][0]
        _write_tokenizers(prepared.vocabulary, work)
        results = _alternate(_sides(work), count, work)
        _check_ids(results)
        tables = _preparation(results, opened), _loading(prepared.train, config)
    page.write(path, "# Preparation and input", origin, _text(opened), *tables)
    return 0


def _check_packages():
    for name in ("datasets", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the package {name} is missing: pip install datasets transformers")


# ------------------------------------------------------------------------------------------ inputs


def _config(source: str, model: str, size: int, work: pathlib.Path):
    """Of the text file, which is written here: the documents of the source, one on each line."""
    config = base.get_config()
    with (work / "text.jsonl").open("w") as file:
        for text in corpus_lib.documents(source, config.data):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    config.data.corpus, config.data.cache = str(work / "text.jsonl"), str(work / "cache")
    config.tokenizer.model, config.tokenizer.size = model, size
    return config


def _write_tokenizers(vocabulary, work: pathlib.Path):
    from pretraining.hugging_face import tokenizers as exported

    vocabulary.save(work / "vocabulary")
    exported.write(work, vocabulary, [], [])
    description = json.loads((work / "tokenizer.json").read_text())
    steps = description["normalizer"]["normalizers"]
    description["normalizer"]["normalizers"] = [
        *(step for step in steps if step["type"] == "Precompiled"),
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]
    (work / "converted.json").write_text(json.dumps(description))


# ------------------------------------------------------------------------------------------- sides


def _sides(work: pathlib.Path) -> dict[str, Side]:
    theirs = functools.partial(_datasets, work / "text.jsonl")
    return {
        A: functools.partial(_ours, work / "text.jsonl", work / "vocabulary"),
        B: functools.partial(theirs, work / "tokenizer.json"),
        "C datasets.map, usual normalizer": functools.partial(theirs, work / "converted.json"),
    }


def _ours(text: pathlib.Path, vocabulary: pathlib.Path, folder: pathlib.Path) -> Round:
    config = base.get_config()
    config.data.corpus, config.data.cache = str(text), str(folder)
    config.tokenizer.model = str(vocabulary)
    start = _clock()
    ((opened, _),) = prepare.prepare(config, processes=PROCESSES).train
    seconds, cpu_seconds = _clock() - start
    splits = opened.manifest["splits"].values()
    ids = sum(split["tokens"] - split["documents"] for split in splits)
    texts = itertools.islice(corpus_lib.documents(str(text), config.data), SAMPLE)
    sample = list(_stored_ids(opened, texts, config.data.validation))
    return Round(seconds, seconds, cpu_seconds, ids, sample, _size(opened.folder))


def _stored_ids(opened: Store, texts, share: float) -> Iterator[list[int]]:
    """The ids of documents from the first on, each from the split that it was put into."""
    next_of = {name: itertools.count() for name in store.SPLITS}
    for text in texts:
        name = "validation" if corpus_lib.is_validation(text, share) else "train"
        split, number = getattr(opened, name), next(next_of[name])
        start, end = split.offsets[number : number + 2]
        yield split.tokens[start : end - 1].read().result().tolist()


def _datasets(text: pathlib.Path, tokenizer: pathlib.Path, folder: pathlib.Path) -> Round:
    os.environ |= {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets
    import transformers

    datasets.disable_progress_bars()
    start = _clock()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    table = datasets.load_dataset("json", data_files=str(text), split="train")
    middle = _clock()
    tokenize = functools.partial(_tokenize, fast)
    table = table.map(tokenize, batched=True, num_proc=PROCESSES, remove_columns=["text"])
    end = _clock()
    (seconds, cpu_seconds), (map_seconds, _) = end - start, end - middle
    ids = sum(len(chunk.values) for chunk in table.data.column("input_ids").chunks)
    sample = [table[i]["input_ids"] for i in range(min(SAMPLE, len(table)))]
    written = sum(_size(pathlib.Path(file["filename"])) for file in table.cache_files)
    return Round(seconds, map_seconds, cpu_seconds, ids, sample, written)


def _tokenize(fast, batch: dict) -> dict:
    options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": fast(batch["text"], **options)["input_ids"]}


def _clock() -> np.ndarray:
    """[2] seconds: of the wall clock; of CPU, of this process and its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return np.array([time.perf_counter(), cpu])


def _size(path: pathlib.Path) -> int:
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


# ------------------------------------------------------------------------------------------ rounds


def _alternate(sides: dict[str, Side], rounds: int, work: pathlib.Path) -> dict[str, list[Round]]:
    results = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory(dir=work) as folder:
                results[name].append(_elsewhere(functools.partial(side, pathlib.Path(folder))))
            seconds = results[name][-1].seconds
            print(f"round {number + 1} of {rounds}: {name}: {seconds:.1f} s", file=sys.stderr)
    return results


def _elsewhere(side: Callable[[], Round]) -> Round:
    """Runs in a fresh process, and looks at what it and its children take."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(side, there))
    process.start()
    there.close()
    memory = 0
    while not here.poll(0.1):
        memory = max(memory, _proportional_set_size(process.pid))
    try:
        result = here.recv()
    except EOFError:
        raise UserError("a round ended before it had a result; see above") from None
    process.join()
    return result._replace(memory=memory)


def _send(side: Callable[[], Round], connection):
    connection.send(side())


def _proportional_set_size(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # one that ends meanwhile
        pass
    return total


def _check_ids(results: dict[str, list[Round]]):
    ours, theirs = results[A][0], results[B][0]
    if (ours.ids, ours.sample) != (theirs.ids, theirs.sample):
        raise UserError(f"the ids of A and B differ: {ours.ids:,} and {theirs.ids:,} of them")


# ------------------------------------------------------------------------------------------ tables


def _text(opened: Store) -> str:
    """What was prepared."""
    splits = opened.manifest["splits"].values()
    documents, text_bytes = (
        sum(split[key] for split in splits) for key in ("documents", "text_bytes")
    )
    return (
        f"{text_bytes / 1e6:.1f} MB of text in {documents:,} documents;"
        f" {opened.vocabulary.size:,} pieces; {PROCESSES} processes. Ratios are B over A; C, which"
        " need not make the same ids, is no competitor and has none."
    )


def _preparation(results: dict[str, list[Round]], opened: Store) -> str:
    text_bytes = sum(split["text_bytes"] for split in opened.manifest["splits"].values())
    header = (
        "side", "seconds of each round", "CPU s", "MB/s", "of that map", "memory", "written", "ids",
        "A is faster", "than that map", "in CPU s",
    )  # fmt: skip
    rows = [_row(name, rounds, text_bytes) + ["-"] * 3 for name, rounds in results.items()]
    rows[list(results).index(B)][-3:] = _ratios(results[A], results[B])
    return page.markdown(header, rows)


def _row(name: str, rounds: list[Round], text_bytes: int) -> list[str]:
    return [
        name,
        ", ".join(f"{each.seconds:.1f}" for each in rounds),
        f"{_median(rounds, 'cpu_seconds'):.1f}",
        f"{text_bytes / _median(rounds, 'seconds') / 1e6:.1f}",
        f"{text_bytes / _median(rounds, 'map_seconds') / 1e6:.1f}",
        f"{max(each.memory for each in rounds) / 1e6:,.0f} MB",
        f"{rounds[0].written / 1e6:.1f} MB",
        f"{rounds[0].ids:,}",
    ]


def _ratios(ours: list[Round], theirs: list[Round]) -> list[str]:
    """How many times less A takes: seconds, seconds without B's table, CPU seconds."""
    return [
        f"{_median(theirs, field) / _median(ours, field):.2f} x"
        for field in ("seconds", "map_seconds", "cpu_seconds")
    ]


def _median(rounds: list[Round], field: str) -> float:
    return statistics.median(getattr(each, field) for each in rounds)


def _loading(stores, config) -> str:
    rows = []
    for batch_size, length in LOADED:
        config.train.batch_size, config.data.sequence_length = batch_size, length
        rate = _tokens_per_second(stores, config)
        rows.append((f"{batch_size} x {length}", f"{rate:,.0f}"))
    return page.markdown(("loader: batch x positions", "tokens/s"), rows)


def _tokens_per_second(stores, config) -> float:
    """Of rows that nobody waits to use; those read ahead before the clock starts do not count."""
    payload = config.train.batch_size * (config.data.sequence_length - SPECIAL_POSITIONS)
    with contextlib.closing(loader.train_batches(stores, config, 0)) as batches:
        for _ in range(2 * config.data.prefetch):
            next(batches)
        start = time.perf_counter()
        for count in itertools.count(1):
            next(batches)
            if (seconds := time.perf_counter() - start) > LOADER_SECONDS:
                return count * payload / seconds
