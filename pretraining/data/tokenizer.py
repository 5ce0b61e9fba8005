"""Text to ids and back, and what the rest of the project asks about the ids.

A vocabulary is trained here by SentencePiece, or is an imported one: a SentencePiece model, or a
tokenizer of Hugging Face (see `hugging_face_pieces`), each with its own ids. Of those trained here:

Normalisation (`config.tokenizer.normalization`) comes first and is the only loss: the ids of a text
decode to `Vocabulary.normalize(text)`. Under every rule a space is put before the text, so that its
first word has the same pieces as elsewhere (decoding takes it away), and U+2581, by which
SentencePiece writes a space, reads as a space.

  identity               nothing else: spaces, tabs, controls and newlines all stay.
  nfkc, nfkc_cf          Unicode's NFKC (and case folding); runs of spaces become one, those at the
                         ends go. Newlines and tabs stay.
  nmt_nfkc, nmt_nfkc_cf  the same, and newlines, tabs, other white space and U+FFFD become spaces,
                         controls go. Paragraphs are then visible in the sentence starts alone.

Where newlines stay, each is one token and no piece reaches across it.

Where words and sentences start: see `boundaries`.
"""

import dataclasses
import functools
import hashlib
import heapq
import io
import json
import pathlib
import re
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import sentencepiece
from etils import epath

from pretraining.data import (
    boundaries,
    hugging_face_files,
    hugging_face_pieces,
    piece_model,
    sentencepiece_pieces,
)
from pretraining.data.piece_model import ROLES
from pretraining.data.row import SENTENCE_START, WORD_START
from pretraining.errors import UserError

_FILES = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}  # by kind
_LOADERS = {"sentencepiece": sentencepiece_pieces.load, "tokenizers": hugging_face_pieces.load}


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """V token ids; no id is a literal anywhere else.

    Attributes:
      kind: the library that runs it, "sentencepiece" or "tokenizers"; see `piece_model`.
      model: the model's file, .model or tokenizer.json.
      size: V.
      pad, unk, bos, eos, cls, sep, mask: special ids; two roles may share one, None = the model has
        none.
      special_ids: every id that stands for no text (control, unknown and unused pieces, and the
        roles above), sorted; never corrupted, never drawn.
      word_start: [V] bool, the piece starts a word wherever it stands.
      bytes_per_id: [V] int32, UTF-8 bytes of normalised text that an id stands for: a space counts
        1, a byte piece 1, an id without text 0. Over the ids of a document they sum to the bytes of
        `normalize(text)` and 1 for the space put before it (which is what parts two documents),
        unless characters are unknown (byte_fallback=False). Imported tokenizers that put no space
        before a text count none.
      unigram_counts: [V] int64, how often an id occurs in the training split; 0 until counted.
    """

    kind: str
    model: bytes
    size: int
    pad: int | None
    unk: int | None
    bos: int | None
    eos: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    special_ids: tuple[int, ...]
    word_start: np.ndarray
    bytes_per_id: np.ndarray
    unigram_counts: np.ndarray

    def encode(self, text: str) -> list[int]:
        """Ids, none of them special but unk: "[MASK]" in a text is text."""
        return self._piece_model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids; special ids are silent but unk, which is shown."""
        return self._piece_model.decode([int(i) for i in ids])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """How the model writes each id; a space that leads is U+2581."""
        written = self._piece_model.pieces
        return [written[int(i)] for i in ids]

    def normalize(self, text: str) -> str:
        """The text that survives; see the top of this file."""
        return self._piece_model.normalize(text)

    def encode_document(self, text: str, continues: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """A document as the store keeps it.

        Takes about 100 bytes of memory for each character.

        Args:
          continues: the text goes on where a token ends: no space but its own leads, WordPiece
            writes "##", and the first token starts no sentence and no word by its place alone.

        Returns:
          ids: [n] int32, without eos.
          boundary: [n] uint8, the bits of `Row.boundary`.
        """
        ids, normalized, starts, origins = self._piece_model.segment(text, continues)
        if not ids.size:
            return ids, np.zeros(0, np.uint8)
        words = boundaries.word_starts(normalized)
        sentences = boundaries.sentence_starts(piece_model.as_text(text))
        sentences = [bisect_left(origins, place) for place in sentences]
        word, sentence = self.word_start[ids], np.zeros(ids.size, bool)
        word[_tokens_at(words, normalized, starts)] = True
        sentence[_tokens_at(sentences, normalized, starts)] = True
        word[0] |= not continues
        sentence[0] = not continues
        return ids, (word * WORD_START + sentence * SENTENCE_START).astype(np.uint8)

    def with_counts(self, counts: np.ndarray) -> "Vocabulary":
        """The same vocabulary with `unigram_counts` [V]."""
        counts = np.asarray(counts, np.int64)
        if counts.shape != (self.size,):
            raise ValueError(f"counts have shape {counts.shape}, expected ({self.size},)")
        return dataclasses.replace(self, unigram_counts=counts)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the model and the special ids: of what ids mean, not of the counts."""
        return _sha256(self.model + json.dumps(self._special()).encode())

    def save(self, folder) -> None:
        """Writes the model's file, `unigram_counts.npy` and, last, `vocabulary.json`."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        counts = io.BytesIO()
        np.save(counts, self.unigram_counts, allow_pickle=False)
        contents = {_FILES[self.kind]: self.model, "unigram_counts.npy": counts.getvalue()}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        description = {
            "kind": self.kind,
            "size": self.size,
            **self._special(),
            "fingerprint": self.fingerprint,
            "sha256": {name: _sha256(content) for name, content in contents.items()},
        }
        (folder / "vocabulary.json").write_text(json.dumps(description, indent=2) + "\n")

    @staticmethod
    def load(folder) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
          UserError: a file is missing, or is not what was written.
        """
        folder = epath.Path(folder)
        damaged = UserError(f"{folder / 'vocabulary.json'} is damaged")
        try:
            description = json.loads(_read(folder / "vocabulary.json"))
            expected, special = description["sha256"], description["special_ids"]
            kind = description["kind"]
            known = description["size"], description["fingerprint"]
            roles = {role: description[role] for role in ROLES}
            content = {name: _read(folder / name, expected[name]) for name in sorted(expected)}
            vocabulary = _vocabulary(kind, content[_FILES[kind]])
            counts = np.load(io.BytesIO(content["unigram_counts.npy"]), allow_pickle=False)
            vocabulary = vocabulary.with_counts(counts)
        except (ValueError, KeyError, TypeError):
            raise damaged from None
        vocabulary = dataclasses.replace(vocabulary, **roles, special_ids=tuple(special))
        if known != (vocabulary.size, vocabulary.fingerprint):
            raise damaged
        return vocabulary

    @property
    def _piece_model(self) -> piece_model.PieceModel:
        return _load(self.kind, self.model)

    def _special(self) -> dict:
        return {role: getattr(self, role) for role in ROLES} | {"special_ids": self.special_ids}


def _tokens_at(places: list[int], normalized: str, starts: np.ndarray) -> np.ndarray:
    """The tokens, of those that start at `starts` [n], that hold the characters at `places`.

    A space before the character belongs to it. Of the bytes of a character the first one counts.
    """
    inside = [place for place in places if place < len(normalized)]
    before = [p - (p > 0 and normalized[p - 1] == piece_model.SPACE) for p in inside]
    token = np.searchsorted(starts, np.array(before, np.int64), side="right") - 1
    return np.searchsorted(starts, starts[token])


def train(texts: Iterable[str], tokenizer_config) -> Vocabulary:
    """A SentencePiece vocabulary with pad 0, unk 1, bos = cls 2, eos = sep 3 and mask 4.

    The same texts, settings and version of SentencePiece give the same vocabulary on any machine.

    Args:
      texts: what it learns from, all of it; see `sample`.
      tokenizer_config: `config.tokenizer`.

    Raises:
      UserError: no text, an unknown kind or normalization, a character coverage outside
        [0.98, 1], a size that the texts do not fill or that does not hold their characters.
    """
    config = tokenizer_config
    check(config)
    texts = [piece_model.as_text(text) for text in texts if not text.isspace() and text]
    if not texts:
        raise UserError("the tokenizer has no text: see config.data.corpus, tokenizer.sample_bytes")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.size,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            normalization_rule_name=config.normalization,
            remove_extra_whitespaces=config.normalization != "identity",
            user_defined_symbols=[] if config.normalization.startswith("nmt_") else ["\n"],
            **_SPECIAL,
            max_sentence_length=1 << 30,
            num_threads=16,  # sums are rounded by thread: a fixed number, never that of the cores
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_reason(str(error), config)) from None
    return _vocabulary("sentencepiece", sentencepiece_pieces.with_exact_sums(model.getvalue()))


# A control symbol, unlike a user-defined one, is never found in a text.
_SPECIAL = dict(
    pad_id=0,
    unk_id=1,
    bos_id=2,
    eos_id=3,
    pad_piece="[PAD]",
    unk_piece="[UNK]",
    bos_piece="[CLS]",
    eos_piece="[SEP]",
    control_symbols=["[MASK]"],
)


def check(config) -> None:
    """Refuses a value of `config.tokenizer` that is out of range; UserError names it."""
    allowed = {
        "kind": ("unigram", "bpe"),
        "normalization": ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"),
    }
    for key, values in allowed.items():
        if config[key] not in values:
            names = ", ".join(values)
            raise UserError(f"config.tokenizer.{key}={config[key]!r}: allowed are {names}")
    if not 0.98 <= config.character_coverage <= 1:
        coverage = config.character_coverage
        raise UserError(f"config.tokenizer.character_coverage={coverage}: allowed are 0.98 to 1")
    least = 6 + 256 * config.byte_fallback
    if config.size < least:
        raise UserError(
            f"config.tokenizer.size={config.size}: special and byte pieces need {least}"
        )


def _reason(message: str, config) -> str:
    size = f"config.tokenizer.size={config.size}"
    if largest := re.search(r"Please set it to a value <= (\d+)", message):
        return f"{size} is more than the corpus supports: at most {largest[1]}"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{size} does not hold the characters of the corpus: at least {least[1]}, or lower"
            f" config.tokenizer.character_coverage={config.character_coverage}"
        )
    return f"SentencePiece cannot train: {message}"


def load_model(path: str | pathlib.Path) -> Vocabulary:
    """The vocabulary of an existing tokenizer, with its own ids.

    A SentencePiece .model: cls, sep and mask are its pieces [CLS] or <cls>, [SEP] or <sep>, [MASK]
    or <mask>. Where one of cls and bos, or of sep and eos, is missing, the other serves as both.
    What the model declares a user-defined symbol, be it <mask>, it also finds in texts; a control
    symbol it does not.

    A folder in Hugging Face's layout, or a tokenizer.json: see `hugging_face_files.read`. The
    folder of a run's vocabulary, or its tokenizer.json: what `Vocabulary.save` wrote, not counted.

    Raises:
      UserError: no such file, no tokenizer, or one that cannot serve.
    """
    path = epath.Path(path).expanduser()
    if path.is_dir() or path.suffix == ".json":
        folder = path if path.is_dir() else path.parent
        if (folder / "vocabulary.json").exists():  # which knows roles that the model does not
            saved = Vocabulary.load(folder)
            return saved.with_counts(np.zeros(saved.size))
        return _vocabulary(*hugging_face_files.read(path))
    content = _read(path)
    try:
        return _vocabulary("sentencepiece", content)
    except ValueError:
        raise UserError(f"config.tokenizer.model={str(path)!r} is no SentencePiece model") from None


def _vocabulary(kind: str, model: bytes, named: dict[str, int] | None = None) -> Vocabulary:
    """The vocabulary of a model, with the roles that it declares but for those of `named`."""
    pieces = _load(kind, model)
    roles = piece_model.complete_roles(pieces.roles | (named or {}))
    special = {*pieces.silent, *roles.values()} - {None}
    return Vocabulary(
        kind=kind,
        model=model,
        size=len(pieces.pieces),
        **roles,
        special_ids=tuple(sorted(special)),
        word_start=pieces.word_start,
        bytes_per_id=pieces.lengths,
        unigram_counts=np.zeros(len(pieces.pieces), np.int64),
    )


@functools.lru_cache(maxsize=4)
def _load(kind: str, model: bytes) -> piece_model.PieceModel:
    """Raises ValueError for bytes that are no model, UserError for a model that cannot serve."""
    return _LOADERS[kind](model)


def _read(path, sha256: str | None = None) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if sha256 is not None and _sha256(content) != sha256:
        raise UserError(f"{path} is damaged: it is not what was written")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def stand_in(size: int) -> Vocabulary:
    """A vocabulary without a tokenizer, for checks and benchmarks that need no text.

    Its first five ids are special, every third of the others begins a word, all occur alike.
    """
    ids = np.arange(size)
    roles = dict(pad=0, unk=1, bos=2, eos=3, cls=2, sep=3, mask=4)
    return Vocabulary(
        kind="",
        model=b"",
        size=size,
        **roles,
        special_ids=tuple(range(5)),
        word_start=ids % 3 == 0,
        bytes_per_id=np.where(ids < 5, 0, 4).astype(np.int32),
        unigram_counts=(ids >= 5).astype(np.int64),
    )


def sample(documents: Iterable[str], max_bytes: int) -> list[str]:
    """A sample of at most `max_bytes` bytes of UTF-8, the same in whatever order documents come.

    Documents are cut at white space into parts of at most 4000 characters. Equal parts count once,
    the others are put in the order of their hashes, and the first of them are taken until one does
    not fit: a uniform sample of the text. Memory holds the sample and one document.
    """
    kept: dict[int, str] = {}  # by hash
    largest: list[int] = []  # a heap of negated hashes
    size, bound = 0, 1 << 64  # hashes from the bound on are out
    for part in (part for document in documents for part in _PART.findall(document)):
        content = part.encode()
        key = int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"sample").digest())
        if key < bound and key not in kept:
            kept[key] = part
            heapq.heappush(largest, -key)
            size += len(content)
        while size > max_bytes:
            bound = -heapq.heappop(largest)
            size -= len(kept.pop(bound).encode())
    return [kept[key] for key in sorted(kept)]


_PART = re.compile(r"(?s)\S.{0,3999}(?=\s|\Z)|\S.{0,3999}")
