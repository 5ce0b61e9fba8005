"""A SentencePiece model as a tokenizer of the package `tokenizers`, with the same ids."""

from collections.abc import Iterator

from sentencepiece import sentencepiece_model_pb2

from pretraining.data.piece_model import SPACE
from pretraining.errors import UserError
from pretraining.hugging_face import charsmap

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_Spec = sentencepiece_model_pb2.TrainerSpec
_NEVER = -1e6  # score of a piece that no text may take; far from 0, and sums keep their digits


def convert(model_proto: bytes):
    """A `tokenizers.Tokenizer` without a post-processor.

    Its special tokens are the control and unknown pieces. Unless `encode_special_tokens` is set, it
    finds them in texts, as is usual there ("Paris is [MASK]."); SentencePiece does not. A space is
    then put before what precedes the first of them alone ("un[MASK]able"), but where spaces are
    kept (the normalization "identity") before each part.

    Raises:
      UserError: neither unigram nor BPE, or a piece is marked unused.
    """
    import tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model_proto)
    models = {_Spec.UNIGRAM: _unigram, _Spec.BPE: _bpe}
    kind = proto.trainer_spec.model_type
    if kind not in models:
        raise UserError(f"a SentencePiece model of type {_Spec.ModelType.Name(kind)} has no form in"
                        " Hugging Face's tokenizers; unigram and BPE have")  # fmt: skip
    if any(piece.type == _Piece.UNUSED for piece in proto.pieces):
        raise UserError("a SentencePiece model with unused pieces cannot be exported")
    tokenizer = tokenizers.Tokenizer(models[kind](proto))
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.pre_tokenizer = _pre_tokenizer(proto)
    tokenizer.decoder = _decoder(prefix)
    tokenizer.add_special_tokens(list(_special_tokens(proto)))
    return tokenizer


def _unigram(proto):
    """The first of the pieces that end at the same place wins a tie in both libraries.

    Control, unknown and byte pieces are not found in texts by their names, but have to stand in the
    list, which gives the ids.
    """
    from tokenizers import models

    normal = [piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL]

    def score(piece) -> float:
        if piece.type == _Piece.NORMAL:
            return piece.score
        if piece.type == _Piece.USER_DEFINED:
            return -0.1  # what SentencePiece takes, so that it is found wherever it stands
        return min(normal) + _NEVER

    return models.Unigram(
        [(piece.piece, score(piece)) for piece in proto.pieces],
        unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _bpe(proto):
    from tokenizers import models

    return models.BPE(
        {piece.piece: i for i, piece in enumerate(proto.pieces)},
        list(_merges(proto)),
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _merges(proto) -> Iterator[tuple[str, str]]:
    """SentencePiece joins any two neighbours that make a piece, the best piece first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    for piece in sorted(scores, key=scores.get, reverse=True):
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]


def _normalizer(spec):
    """Spaces that lead are one in the end, which serves as the one that is put before a text."""
    from tokenizers import Regex, normalizers

    steps = [normalizers.Replace(SPACE, " ")]
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(" "))
    if spec.precompiled_charsmap:
        steps += charsmap.normalizers(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r" \z"), "")]
        if not spec.add_dummy_prefix:
            steps.append(normalizers.Replace(Regex(r"\A "), ""))
    return normalizers.Sequence(steps)


def _pre_tokenizer(proto):
    from tokenizers import pre_tokenizers

    spec, pieces = proto.normalizer_spec, {piece.piece for piece in proto.pieces}
    prefix = spec.add_dummy_prefix and spec.remove_extra_whitespaces
    return pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix else "never",
        split=SPACE in pieces and not any(SPACE in piece[1:] for piece in pieces),
    )


def _decoder(prefix: bool):
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)


def _special_tokens(proto):
    from tokenizers import AddedToken

    for piece in proto.pieces:
        if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN):
            yield AddedToken(piece.piece, special=True, normalized=False)
