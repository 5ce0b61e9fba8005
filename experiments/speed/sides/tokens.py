"""Random tokens for both sides: a store for the project's loader, and the same ids as an array."""

import pathlib

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from pretraining.data import cache, store, tokenizer

DOCUMENT = 500  # tokens, eos included


def write(folder: pathlib.Path, vocabulary_size: int, count: int) -> None:
    """Writes `count` ordinary ids in documents into `store/`, and as `tokens.npy` [count]."""
    vocabulary = _vocabulary(folder / "numbered.model", vocabulary_size)
    generator = np.random.default_rng(0)
    dtype = store.token_dtype(vocabulary_size)
    ids = generator.integers(len(vocabulary.special_ids), vocabulary_size, count, dtype)
    ids[DOCUMENT - 1 :: DOCUMENT] = ids[-1] = vocabulary.eos
    np.save(folder / "tokens.npy", ids)
    documents = _encoded(ids, vocabulary)
    splits = {"train": documents, "validation": documents}
    cache.publish(
        folder / "store",
        lambda work: {"source": "random", "splits": store.write(work, vocabulary, [splits])},
    )


def _encoded(ids: np.ndarray, vocabulary: tokenizer.Vocabulary) -> store.Encoded:
    ends = np.flatnonzero(ids == vocabulary.eos) + 1
    flags = vocabulary.word_start[ids].astype(np.uint8)  # 1 is the bit WORD_START
    return store.Encoded(ids, flags, np.diff(ends, prepend=0), ids.size)


def _vocabulary(path: pathlib.Path, size: int) -> tokenizer.Vocabulary:
    """[PAD] [UNK] [CLS] [SEP] [MASK] and numbers; every third one does not begin a word."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    roles = dict(pad=0, unk=1, bos=2, eos=3)
    for role, number in roles.items():
        setattr(proto.trainer_spec, f"{role}_id", number)
    for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        kind = kinds.UNKNOWN if name == "[UNK]" else kinds.CONTROL
        proto.pieces.add(piece=name, type=kind)
    for number in range(len(proto.pieces), size):
        proto.pieces.add(piece=f"{number}" if number % 3 == 0 else f"\u2581{number}", score=-1.0)
    path.write_bytes(proto.SerializeToString())
    return tokenizer.load_model(path)
