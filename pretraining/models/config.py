"""What a Transformer is made of: `config.model`, checked before anything is built."""

import dataclasses
from collections.abc import Mapping

from pretraining.errors import UserError
from pretraining.models.attention import KERNELS, check_kernel

_CHOICES = {
    "position": ("learned", "rotary", "relative", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_order": ("post", "pre"),
    "activation": ("gelu_tanh", "gelu_erf", "relu", "silu"),
    "dtype": ("float32", "bfloat16"),
    "attention": KERNELS,
    "execution": ("unrolled", "scanned"),
    "remat": ("none", "outputs", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The keys of `config.model`, whose meaning stands in configs/base.py, and two sizes.

    `create` also replaces the zeros that stand for another key's value. A second network of other
    sizes, e.g. a generator, is `dataclasses.replace(config, width=...)`.
    """

    vocabulary_size: int
    sequence_length: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    embedding_width: int
    position: str
    position_rows: int
    position_offset: int
    segments: int
    embedding_norm: bool
    norm: str
    norm_order: str
    norm_epsilon: float
    activation: str
    gated: bool
    bias: bool
    dropout: float
    attention_dropout: float
    init_std: float
    position_init_std: float
    head_transform: bool
    head_bias: bool
    tie_head: bool
    logits_chunk: int
    dtype: str
    attention: str
    execution: str
    remat: str
    document_attention: bool

    @classmethod
    def create(
        cls, model: Mapping, vocabulary_size: int, sequence_length: int
    ) -> "TransformerConfig":
        """From `config.model`, V and `config.data.sequence_length`.

        Raises:
          UserError: a value is outside its range, or two contradict each other.
        """
        values = dict(model)
        values["embedding_width"] = model["embedding_width"] or model["width"]
        values["position_rows"] = model["position_rows"] or sequence_length
        values["position_init_std"] = model["position_init_std"] or model["init_std"]
        return cls(**values, vocabulary_size=vocabulary_size, sequence_length=sequence_length)

    def __post_init__(self):
        _check_values(self)
        _check_agreement(self)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def _check_values(config):
    for key, allowed in _CHOICES.items():
        value = getattr(config, key)
        if value not in allowed:
            raise UserError(f"config.model.{key}={value!r} is not one of {', '.join(allowed)}")
    for minimum, keys in (
        (1, ("layers", "width", "heads", "mlp_width", "embedding_width", "logits_chunk")),
        (0, ("segments", "position_rows", "position_offset", "position_init_std")),
    ):
        for key in keys:
            if getattr(config, key) < minimum:
                value = getattr(config, key)
                raise UserError(f"config.model.{key}={value} must be at least {minimum}")
    for key in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, key) < 1:
            raise UserError(f"config.model.{key}={getattr(config, key)} must be in [0, 1)")
    for key in ("init_std", "norm_epsilon"):
        if not getattr(config, key) > 0:
            raise UserError(f"config.model.{key}={getattr(config, key)} must be above 0")


def _check_agreement(config):
    if config.width % config.heads:
        raise UserError(
            f"config.model.heads={config.heads} must divide config.model.width={config.width}"
        )
    if config.position == "rotary" and config.head_width % 2:
        raise UserError(
            "config.model.position='rotary' needs heads of even width, but config.model.width="
            f"{config.width} and config.model.heads={config.heads} give {config.head_width}"
        )
    rows_left = config.position_rows - config.position_offset
    if config.position == "learned" and rows_left < config.sequence_length:
        raise UserError(
            f"config.model.position_rows={config.position_rows} less config.model.position_offset="
            f"{config.position_offset} leaves fewer rows than config.data.sequence_length="
            f"{config.sequence_length}"
        )
    check_kernel(
        config.attention,
        dtype=config.dtype,
        dropout_rate=config.attention_dropout,
        by_document=config.document_attention,
        head_width=config.head_width,
        sequence_length=config.sequence_length,
        by_distance=config.position == "relative",
    )
