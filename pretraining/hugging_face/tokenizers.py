"""Tokenizers in the layout of Hugging Face; data/hugging_face_files.py reads them."""

import json
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from pretraining.data import hugging_face_pieces
from pretraining.data.hugging_face_files import SENTENCEPIECE
from pretraining.data.piece_model import ROLES, as_text
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError

SAMPLES = (
    "",
    " ",
    'The quick brown fox jumps over the lazy dog. It\'s 12,345.67 km -- and 98% of it "uphill"!',
    "Ça va, Straße, żółć, İstanbul, Ǆ, naïve; cafe\u0301, Z\u0323\u0302, a\u0328\u0301, \u0301",
    "Ελληνικά με τόνους: Άγιος, ᾠδή. Кириллица: ёжик, й, и\u0306. Հայերեն. ქართული.",
    "العربية: ﷺ ﻻ مَرْحَبًا ٣٤٥؟ עברית: שָׁלוֹם, בְּרֵאשִׁית.",
    "हिन्दी: क़लम, क्षत्रिय। বাংলা: কো। தமிழ்: கொ. ไทย: สวัสดีชาวโลก น้ำ. ລາວ. မြန်မာ. ខ្មែរ.",
    "中文没有空格，真的吗？～ 日本語：ﾊﾝｶｸｶﾞ、か\u3099き゚！ 한국어 \u1112\u1161\u11ab 각\u11a8. ﾡ",
    "👩\u200d👩\u200d👧‍👦 🇫🇷🇩 👍🏽 ☃\ufe0f ☃☃ ✂",
    "\tone\n\ntwo\r\nthree  four   \u00a0five\u3000six\u2028seven\x0beight ",
    "  leading, trailing  \n",
    "ﬁne ﬂow ½ ² ℌ ｆｕｌｌ ① Ⅷ ㎏ ſ ´ ¨",
    "\x00\x01a\x07b\x7f\x85\u00ad\u200b\u200e\u200f\ufeffc\ufffd\ufffe",
    "\ue000\uf8ff\U000f0000\U0010fffd",
    "## \u2585 ⁇ ▁ a▁b",
)
"""Texts on which an exported tokenizer is compared with the vocabulary."""


def write(
    folder,
    vocabulary: Vocabulary,
    before: Sequence[int],
    after: Sequence[int],
    *,
    max_length: int | None = None,
    segments: bool = False,
    texts: Iterable[str] = (),
) -> None:
    """Writes a tokenizer that `transformers.AutoTokenizer` opens and that gives our ids.

    Writes `tokenizer.json` and `tokenizer_config.json`, and for a SentencePiece vocabulary its
    model, from which `read` gets the same vocabulary again. One that came from a tokenizer.json is
    written as it was, but for the frame around a text. Nothing is written unless the tokenizer
    gives the ids of `vocabulary.encode` for `SAMPLES`, for every piece by itself and for `texts`.

    What differs from `vocabulary.encode`: by custom of that layout special tokens are found in
    texts ("Paris is [MASK]."), unless `split_special_tokens=True`. Even then, and for bytes
    ("<0x41>"), a unigram model finds the name of such a piece if it does not know all characters of
    the name. Unigram models that were not trained here may cut a run of equal characters elsewhere,
    because of roundings (see `sentencepiece_pieces.with_exact_sums`).

    Args:
      folder: where to; made if it is not there.
      before, after: the special ids that frame a text as the model sees it. Between two texts
        stands sep where `after` has it.
      max_length: the most positions that the model takes; None = not said.
      segments: the model tells two texts apart: `token_type_ids` are given.
      texts: more texts to compare the ids of.

    Raises:
      UserError: the package `tokenizers` is not installed, or the ids of a text differ.
    """
    tokenizer = _fast_tokenizer(vocabulary)
    tokenizer.encode_special_tokens = True
    _check_ids(tokenizer, vocabulary, texts)
    tokenizer.encode_special_tokens = False
    tokenizer.post_processor = _frame(vocabulary, before, after)
    config = _tokenizer_config(vocabulary, max_length, segments)
    contents = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
    }
    if vocabulary.kind == "sentencepiece":
        contents[SENTENCEPIECE] = vocabulary.model
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _fast_tokenizer(vocabulary: Vocabulary):
    if vocabulary.kind == "tokenizers":
        tokenizer = hugging_face_pieces.library().Tokenizer.from_str(vocabulary.model.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    hugging_face_pieces.library()
    from pretraining.hugging_face import fast_tokenizer

    return fast_tokenizer.convert(vocabulary.model)


def _check_ids(tokenizer, vocabulary: Vocabulary, texts: Iterable[str]) -> None:
    for text in [*SAMPLES, *_texts_of_pieces(vocabulary), *texts]:
        ours = vocabulary.encode(text)
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise UserError(
                f"the tokenizer cannot be exported: {_shortened(text)} would have other ids,"
                f" {_shortened(theirs)} for {_shortened(ours)}"
            )


def _texts_of_pieces(vocabulary: Vocabulary) -> Iterator[str]:
    """Of all but the special ones and single bytes."""
    written = map(as_text, vocabulary.pieces(range(vocabulary.size)))
    for text, length in zip(written, vocabulary.bytes_per_id, strict=True):
        if len(text.encode()) == length:
            yield text


def _shortened(value) -> str:
    written = ascii(value)
    return written if len(written) <= 80 else written[:77] + "..."


def _frame(vocabulary: Vocabulary, before: Sequence[int], after: Sequence[int]):
    """One text: before A after. Two: before A sep B after."""
    from tokenizers import processors

    name = lambda i: vocabulary.pieces([i])[0]
    opening, closing = [name(i) for i in before], [name(i) for i in after]
    between = [name(vocabulary.sep)] if vocabulary.sep in after else []
    second = [f"{each}:1" for each in ("$B", *closing)]
    return processors.TemplateProcessing(
        single=[*opening, "$A", *closing],
        pair=[*opening, "$A", *between, *second],
        special_tokens=[(name(i), i) for i in {*before, *after}],
    )


def _tokenizer_config(vocabulary: Vocabulary, max_length: int | None, segments: bool) -> dict:
    ids = {role: getattr(vocabulary, role) for role in ROLES}
    names = {f"{role}_token": vocabulary.pieces([i])[0] for role, i in ids.items() if i is not None}
    inputs = ["input_ids", *["token_type_ids"] * segments, "attention_mask"]
    length = {} if max_length is None else {"model_max_length": max_length}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        **length,
        "model_input_names": inputs,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
