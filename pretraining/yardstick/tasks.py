"""The task files that a yardstick reads: BLiMP, GLUE and CoNLL-2003, plain or .gz .xz .zst.

    blimp/blimp.jsonl or blimp/*.jsonl      https://github.com/alexwarstadt/blimp
    glue/<SST-2|CoLA|MRPC|RTE>/<train|dev>.tsv    https://gluebenchmark.com/tasks
    conll2003/eng.<train|testa>             https://www.clips.uantwerpen.be/conll2003/ner/

The test of every task is its development set; its training set is divided where settings are
chosen. No test set is read.
"""

import collections
import gzip
import hashlib
import json
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

import zstandard

from pretraining.errors import UserError

_OPEN = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zst": zstandard.open}


class Sample(NamedTuple):
    """How much of a task is used, at most.

    Attributes:
      pairs: of each paradigm of BLiMP.
      examples: of a task of GLUE, for training and for testing.
      sentences: of CoNLL-2003, likewise.
    """

    pairs: int
    examples: tuple[int, int]
    sentences: tuple[int, int]


SAMPLES = {
    "quick": Sample(20, (1_000, 500), (400, 250)),
    # Of SST-2 20,000 of 67,349 examples and of CoNLL-2003 5,000 of 14,041 sentences to train with,
    # some 72,000 words; of all else everything.
    "full": Sample(1_000, (20_000, 20_000), (5_000, 20_000)),
}


class Paradigm(NamedTuple):
    """Minimal pairs of one kind: (grammatical, ungrammatical)."""

    name: str
    term: str
    pairs: list[tuple[str, str]]


class Labelled(NamedTuple):
    """An example of a classification: one text or two, and the number of its class."""

    texts: tuple[str, ...]
    label: int


class Sentence(NamedTuple):
    """Words with a part of speech and an entity tag (IOB1) each."""

    words: tuple[str, ...]
    pos: tuple[str, ...]
    ner: tuple[str, ...]


class Tasks(NamedTuple):
    """What was found.

    Attributes:
      blimp: its paradigms, [] = not there.
      glue: {task: (train, dev)}.
      conll2003: (train, dev), None = not there.
      digests: {file, as written above without its compression: the first 16 digits of its sha256}.
      left_out: what was not there.
    """

    blimp: list[Paradigm]
    glue: dict[str, tuple[list[Labelled], list[Labelled]]]
    conll2003: tuple[list[Sentence], list[Sentence]] | None
    digests: dict[str, str]
    left_out: tuple[str, ...]


class _Table(NamedTuple):
    """A task of GLUE: the columns of its .tsv files, by number where they have no header."""

    folder: str
    columns: tuple[str, ...]
    header: bool
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")


_GLUE = {
    "sst2": _Table("SST-2", ("sentence", "label"), True, ("sentence",), "label"),
    "cola": _Table("CoLA", ("source", "label", "mark", "sentence"), False, ("sentence",), "label"),
    "mrpc": _Table(
        "MRPC",
        ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        True,
        ("#1 String", "#2 String"),
        "Quality",
    ),
    "rte": _Table(
        "RTE",
        ("index", "sentence1", "sentence2", "label"),
        True,
        ("sentence1", "sentence2"),
        "label",
        ("entailment", "not_entailment"),
    ),
}
_NAMES = ("blimp", *(f"glue/{table.folder}" for table in _GLUE.values()), "conll2003")

NONE = Tasks([], {}, None, {}, _NAMES)


def read(folder: pathlib.Path, sample: Sample) -> Tasks:
    """The tasks of a folder, each cut to a sample that depends on its text alone.

    BLiMP: the first pairs of each paradigm. Others: the first examples in the order of the hash of
    their text, whatever their order in the file.

    Raises:
      UserError: no such folder, no task in it, or a file is not what it should be.
    """
    if not folder.is_dir():
        raise UserError(f"--tasks={folder}: there is no such folder")
    there = [name for name in _NAMES if (folder / name).is_dir()]
    if not there:
        raise UserError(f"--tasks={folder}: none of {', '.join(_NAMES)} is in it")
    files = _Files(folder)
    return Tasks(
        _blimp(files, sample.pairs) if "blimp" in there else [],
        {
            name: _splits(sample.examples, _labelled, files, table)
            for name, table in _GLUE.items()
            if f"glue/{table.folder}" in there
        },
        _splits(sample.sentences, _sentences, files) if "conll2003" in there else None,
        files.digests,
        tuple(name for name in _NAMES if name not in there),
    )


def _splits(counts: tuple[int, int], read: Callable[..., list], *arguments) -> tuple[list, list]:
    """The samples of both splits, in the order of the hash of each example's text."""
    train, dev = (
        _shuffled(read(*arguments, split))[:count]
        for split, count in zip(("train", "dev"), counts, strict=True)
    )
    return train, dev


def _shuffled(examples: list) -> list:
    return sorted(examples, key=lambda x: hashlib.sha256(json.dumps(x[0]).encode()).digest())


# ----------------------------------------------------------------------------------------- formats


def _blimp(files: "_Files", count: int) -> list[Paradigm]:
    """The first pairs of each paradigm, in the order of their names."""
    terms: dict[str, str] = {}
    pairs = collections.defaultdict(list)
    for name in files.names("blimp", ".jsonl"):
        for number, line in enumerate(files.lines(name), start=1):
            record = _record(line, f"{files.folder / name} line {number}")
            paradigm = record["UID"]
            terms[paradigm] = record["linguistics_term"]
            if len(pairs[paradigm]) < count:
                pairs[paradigm].append((record["sentence_good"], record["sentence_bad"]))
    return [Paradigm(name, terms[name], pairs[name]) for name in sorted(pairs)]


def _record(line: str, where: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    for key in ("UID", "linguistics_term", "sentence_good", "sentence_bad"):
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where} is not an object with a text at {key!r}")
    return record


def _labelled(files: "_Files", table: _Table, split: str) -> list[Labelled]:
    """Rows of a .tsv, in which a quote is a character like any other."""
    name = f"glue/{table.folder}/{split}.tsv"
    where, found = files.folder / name, files.lines(name)
    if table.header and tuple(found[0].split("\t")) != table.columns:
        raise UserError(f"{where}: its columns are {found[0]!r}, not {', '.join(table.columns)}")
    examples = []
    for number, line in list(enumerate(found, start=1))[table.header :]:
        fields = line.split("\t")
        if len(fields) != len(table.columns):
            raise UserError(
                f"{where} line {number} has {len(fields)} columns, not {len(table.columns)}"
            )
        row = dict(zip(table.columns, fields, strict=True))
        if row[table.label] not in table.labels:
            allowed = ", ".join(table.labels)
            raise UserError(
                f"{where} line {number}: the label {row[table.label]!r} is none of {allowed}"
            )
        texts = tuple(row[column] for column in table.texts)
        if not all(text.strip() for text in texts):
            raise UserError(f"{where} line {number} has no text")
        examples.append(Labelled(texts, table.labels.index(row[table.label])))
    return _some(examples, where)


def _sentences(files: "_Files", split: str) -> list[Sentence]:
    """Lines `word POS chunk NER`; an empty one ends a sentence, -DOCSTART- a document."""
    name = {"train": "conll2003/eng.train", "dev": "conll2003/eng.testa"}[split]
    sentences, words = [], []
    for number, line in enumerate([*files.lines(name, blank=True), ""], start=1):
        fields = line.split()
        if fields and len(fields) != 4:
            raise UserError(f"{files.folder / name} line {number} has {len(fields)} columns, not 4")
        if fields and not re.fullmatch("O|[IB]-.+", fields[3]):
            raise UserError(f"{files.folder / name} line {number}: {fields[3]!r} is no IOB tag")
        if fields and fields[0] != "-DOCSTART-":
            words.append(fields)
        elif words:
            text, pos, _, ner = zip(*words, strict=True)
            sentences.append(Sentence(text, pos, ner))
            words = []
    return _some(sentences, files.folder / name)


def _some(examples: list, where: pathlib.Path) -> list:
    if not examples:
        raise UserError(f"{where} has no examples")
    return examples


# ------------------------------------------------------------------------------------------- files


class _Files:
    """The files of a folder, compressed or not, and the digests of those that were read."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.digests: dict[str, str] = {}

    def names(self, folder: str, extension: str) -> list[str]:
        """The files of a folder inside, without the extension of a compression."""
        found = [_plain(path) for path in (self.folder / folder).iterdir()]
        names = sorted({f"{folder}/{name}" for name in found if name.endswith(extension)})
        if not names:
            raise UserError(f"{self.folder / folder}: there is no file *{extension} in it")
        return names

    def lines(self, name: str, blank: bool = False) -> list[str]:
        """The lines of a file, with or without the blank ones.

        Raises:
          UserError: there is no such file, compressed or not, or it is damaged, or empty.
        """
        paths = [self.folder / (name + suffix) for suffix in _OPEN]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"{self.folder / name}: there is no such file (nor .gz, .xz, .zst)")
        content = _content(path)
        self.digests[name] = hashlib.sha256(content).hexdigest()[:16]
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8") from None
        # Not splitlines, which also ends lines at characters that texts contain.
        lines = [line.rstrip("\r") for line in text.split("\n")]
        lines = lines if blank else [line for line in lines if line.strip()]
        return _some(lines, path)


def _plain(path: pathlib.Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix in _OPEN else path.name


def _content(path: pathlib.Path) -> bytes:
    suffix = path.suffix if path.suffix in _OPEN else ""
    try:
        with _OPEN[suffix](path, "rb") as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
