"""The parameters of a network under the names and in the shapes of `transformers`.

The map is linear and can be inverted, so it carries gradients as well as weights. Axes are written
in letters: V vocabulary, P position rows, S segment types, D width, E width of the embeddings,
F inner width of the feed-forward block, H heads, d = D / H, C = D once more, and the numbers 1 and
2; "Hd D" is a matrix of H d rows.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pretraining.errors import UserError
from pretraining.models.config import TransformerConfig


class Weight(NamedTuple):
    """One tensor.

    Attributes:
      theirs: its name in `transformers`.
      ours: the path of the parameter; several lie side by side in the last axis of theirs.
      axes: "ours -> theirs", e.g. "D H d -> Hd D".
    """

    theirs: str
    ours: tuple[str, ...]
    axes: str


def to_tensors(
    weights: Iterable[Weight], params: dict[str, np.ndarray], config: TransformerConfig
) -> dict[str, np.ndarray]:
    """{their name: tensor} of parameters {path: array}; what the network lacks is zero there.

    Only a bias and the segment types may be lacking: adding a zero changes nothing.
    """
    sizes, tensors = _sizes(config), {}
    for weight in weights:
        source, target = weight.axes.split(" -> ")
        zeros = np.zeros(_shape(source, sizes), np.float32)
        parts = [params.get(p, zeros) if may_lack(p) else params[p] for p in weight.ours]
        turned = [_turn(part, source, target, sizes) for part in parts]
        # Not only a matter of layout: safetensors writes the memory as it lies.
        tensors[weight.theirs] = np.ascontiguousarray(np.concatenate(turned, axis=-1))
    return tensors


def to_params(
    weights: Iterable[Weight],
    tensors: dict[str, np.ndarray],
    config: TransformerConfig,
    lacking: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """{path: array}: the inverse of `to_tensors`.

    Args:
      lacking: paths that the network does not have; they are left out where the tensor is zero.

    Raises:
      UserError: a tensor has another shape than the sizes say.
    """
    sizes, params, lacking, weights = _sizes(config), {}, set(lacking), list(weights)
    if wrong := misfits(weights, tensors, config):
        raise UserError("; ".join(wrong))
    for weight in weights:
        source, target = weight.axes.split(" -> ")
        parts = np.split(tensors[weight.theirs], len(weight.ours), axis=-1)
        for path, part in zip(weight.ours, parts, strict=True):
            if not (path in lacking and may_lack(path) and not part.any()):
                params[path] = _turn(part, target, source, sizes)
    return params


def misfits(
    weights: Iterable[Weight], tensors: dict[str, np.ndarray], config: TransformerConfig
) -> list[str]:
    """Of each tensor that is there in another shape than the sizes say: what it is instead of."""
    sizes, wrong = _sizes(config), []
    for weight in weights:
        *first, last = _shape(weight.axes.split(" -> ")[1], sizes)
        expected, tensor = (*first, last * len(weight.ours)), tensors.get(weight.theirs)
        if tensor is not None and tensor.shape != expected:
            wrong.append(f"the tensor {weight.theirs!r} is {tensor.shape} instead of {expected}")
    return wrong


def may_lack(path: str) -> bool:
    """May a network be without this parameter where the class has it?"""
    return path.endswith(("/bias", "/segment/embedding"))


def _sizes(config: TransformerConfig) -> dict[str, int]:
    return dict(
        V=config.vocabulary_size,
        P=config.position_rows,
        S=config.segments or 1,
        D=config.width,
        C=config.width,
        E=config.embedding_width,
        F=config.mlp_width,
        H=config.heads,
        d=config.head_width,
    ) | {"1": 1, "2": 2}


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def _turn(x: Any, source: str, target: str, sizes: dict[str, int]) -> Any:
    """`x` with the axes `source` in the order and the groups of `target`."""
    before, after = (axes.replace(" ", "").replace("1", "") for axes in (source, target))
    apart = x.reshape([sizes[letter] for letter in before])
    turned = apart.transpose([before.index(letter) for letter in after])
    return turned.reshape(_shape(target, sizes))


# --------------------------------------------------------------------------------- BERT's family


class Head(NamedTuple):
    """The names of a language-model head in BERT's family."""

    transform: str
    norm: str
    bias: str
    decoder: str


BERT_HEAD = Head(
    transform="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    bias="cls.predictions.bias",
    decoder="cls.predictions.decoder",
)
ROBERTA_HEAD = Head(
    transform="lm_head.dense",
    norm="lm_head.layer_norm",
    bias="lm_head.bias",
    decoder="lm_head.decoder",
)
GENERATOR_HEAD = Head(
    transform="generator_predictions.dense",
    norm="generator_predictions.LayerNorm",
    bias="generator_lm_head.bias",
    decoder="generator_lm_head",
)


def bert(prefix: str, head: Head, config: TransformerConfig) -> Iterator[Weight]:
    """Encoder and language-model head of BERT, RoBERTa and ELECTRA's generator."""
    yield from _bert_encoder(prefix, config)
    yield from _linear(head.transform, "head/transform", "D", "E")
    yield from _norm(head.norm, "head/norm", "E")
    yield Weight(head.bias, ("head/bias",), "V -> V")
    if not config.tie_head:
        yield _table(head.decoder, "head/output", "V E")
        if head.bias != f"{head.decoder}.bias":  # the same bias once more
            yield Weight(f"{head.decoder}.bias", ("head/bias",), "V -> V")


def bert_pretraining(config: TransformerConfig) -> Iterator[Weight]:
    """BERT with its pooler and next-sentence head, kernels [D, D] and [D, 2]."""
    yield from bert("bert", BERT_HEAD, config)
    yield from _linear("bert.pooler.dense", "pooler", "D", "C")
    yield from _linear("cls.seq_relationship", "next_sentence", "D", "2")


def discriminator(config: TransformerConfig) -> Iterator[Weight]:
    """ELECTRA's discriminator."""
    yield from _bert_encoder("electra", config)
    yield from _linear("discriminator_predictions.dense", "head/dense", "D", "C")
    yield from _linear("discriminator_predictions.dense_prediction", "head/output", "D", "1")


def _bert_encoder(prefix: str, config: TransformerConfig) -> Iterator[Weight]:
    theirs, ours = f"{prefix}.embeddings", "encoder/embeddings"
    yield _table(f"{theirs}.word_embeddings", f"{ours}/token", "V E")
    yield _table(f"{theirs}.position_embeddings", f"{ours}/position", "P E")
    yield _table(f"{theirs}.token_type_embeddings", f"{ours}/segment", "S E")
    yield from _norm(f"{theirs}.LayerNorm", f"{ours}/norm", "E")
    if config.embedding_width != config.width:
        yield from _linear(f"{prefix}.embeddings_project", "encoder/embeddings_project", "E", "D")
    for index in range(config.layers):
        theirs, ours = f"{prefix}.encoder.layer.{index}", f"encoder/layer_{index}"
        for name in ("query", "key", "value"):
            yield from _linear(
                f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}", "D", "H d"
            )
        yield from _linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out", "H d", "D")
        yield from _norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm", "D")
        yield from _linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up", "D", "F")
        yield from _linear(f"{theirs}.output.dense", f"{ours}/mlp/down", "F", "D")
        yield from _norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp_norm", "D")


# ----------------------------------------------------------------------------------------- GPT-2


def gpt2(config: TransformerConfig) -> Iterator[Weight]:
    """GPT-2, whose matrices are stored as [in, out], and query, key and value as one."""
    yield _table("transformer.wte", "encoder/embeddings/token", "V E")
    yield _table("transformer.wpe", "encoder/embeddings/position", "P E")
    for index in range(config.layers):
        theirs, ours = f"transformer.h.{index}", f"encoder/layer_{index}"
        attention = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
        yield from _norm(f"{theirs}.ln_1", f"{ours}/attention_norm", "D")
        yield from _convolution(f"{theirs}.attn.c_attn", attention, "D", "H d")
        yield from _convolution(f"{theirs}.attn.c_proj", [f"{ours}/attention/out"], "H d", "D")
        yield from _norm(f"{theirs}.ln_2", f"{ours}/mlp_norm", "D")
        yield from _convolution(f"{theirs}.mlp.c_fc", [f"{ours}/mlp/up"], "D", "F")
        yield from _convolution(f"{theirs}.mlp.c_proj", [f"{ours}/mlp/down"], "F", "D")
    yield from _norm("transformer.ln_f", "encoder/final_norm", "D")
    if not config.tie_head:
        yield _table("lm_head", "head/output", "V E")


# ----------------------------------------------------------------------------------------- XLNet


def xlnet(config: TransformerConfig) -> Iterator[Weight]:
    """XLNet with both streams, which share all weights."""
    yield _table("transformer.word_embedding", "encoder/embeddings/token", "V E")
    yield Weight("transformer.mask_emb", ("encoder/mask_embedding",), "D -> 1 1 D")
    for index in range(config.layers):
        theirs, ours = f"transformer.layer.{index}", f"encoder/layer_{index}"
        yield from _xlnet_attention(f"{theirs}.rel_attn", f"{ours}/attention")
        yield from _norm(f"{theirs}.rel_attn.layer_norm", f"{ours}/attention_norm", "D")
        yield from _linear(f"{theirs}.ff.layer_1", f"{ours}/mlp/up", "D", "F")
        yield from _linear(f"{theirs}.ff.layer_2", f"{ours}/mlp/down", "F", "D")
        yield from _norm(f"{theirs}.ff.layer_norm", f"{ours}/mlp_norm", "D")
    if not config.tie_head:
        yield _table("lm_loss", "head/output", "V E")
    yield Weight("lm_loss.bias", ("head/bias",), "V -> V")


def _xlnet_attention(theirs: str, ours: str) -> Iterator[Weight]:
    for short, name in zip("qkvr", ("query", "key", "value", "position"), strict=True):
        yield Weight(f"{theirs}.{short}", (f"{ours}/{name}/kernel",), "D H d -> D H d")
    yield Weight(f"{theirs}.o", (f"{ours}/out/kernel",), "H d D -> D H d")
    for short, name in zip("wrs", ("content", "position", "segment"), strict=True):
        yield Weight(f"{theirs}.r_{short}_bias", (f"{ours}/{name}_bias",), "H d -> H d")
    yield Weight(f"{theirs}.seg_embed", (f"{ours}/segment_embedding",), "2 H d -> 2 H d")


# ---------------------------------------------------------------------------------------- modules


def _table(theirs: str, ours: str, axes: str) -> Weight:
    return Weight(f"{theirs}.weight", (f"{ours}/embedding",), f"{axes} -> {axes}")


def _norm(theirs: str, ours: str, width: str) -> Iterator[Weight]:
    yield Weight(f"{theirs}.weight", (f"{ours}/scale",), f"{width} -> {width}")
    yield Weight(f"{theirs}.bias", (f"{ours}/bias",), f"{width} -> {width}")


def _linear(theirs: str, ours: str, inputs: str, outputs: str) -> Iterator[Weight]:
    """torch.nn.Linear stores [out, in]."""
    rows, columns = outputs.replace(" ", ""), inputs.replace(" ", "")
    yield Weight(f"{theirs}.weight", (f"{ours}/kernel",), f"{inputs} {outputs} -> {rows} {columns}")
    yield Weight(f"{theirs}.bias", (f"{ours}/bias",), f"{outputs} -> {rows}")


def _convolution(theirs: str, ours: list[str], inputs: str, outputs: str) -> Iterator[Weight]:
    rows, columns = inputs.replace(" ", ""), outputs.replace(" ", "")
    kernels, biases = (tuple(f"{path}/{leaf}" for path in ours) for leaf in ("kernel", "bias"))
    yield Weight(f"{theirs}.weight", kernels, f"{inputs} {outputs} -> {rows} {columns}")
    yield Weight(f"{theirs}.bias", biases, f"{outputs} -> {columns}")
