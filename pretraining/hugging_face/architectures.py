"""Which networks the classes of `transformers` can hold, and their config.json, both ways."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pretraining.errors import UserError
from pretraining.hugging_face import weights
from pretraining.hugging_face.weights import Weight
from pretraining.models.config import TransformerConfig


class Architecture(NamedTuple):
    """One class of `transformers`.

    Attributes:
      model_type: as in config.json.
      prefix: of the names of its encoder's tensors.
      keys: {key of TransformerConfig: (their key, its value where a config.json lacks it)}.
      needs: (values of TransformerConfig, pad id) -> the only values of further keys that the class
        can hold.
      extra: TransformerConfig -> what config.json says beyond `keys`.
      usual: settings that no network here has another value of.
      weights: TransformerConfig -> the map of the weights.
      is_decoder: whether it sees the left alone, where the classes read that in config.json; None =
        in other families.
    """

    model_type: str
    prefix: str
    keys: dict[str, tuple[str, Any]]
    needs: Callable[[dict[str, Any], int | None], dict[str, Any]]
    extra: Callable[[TransformerConfig], dict[str, Any]]
    usual: dict[str, Any]
    weights: Callable[[TransformerConfig], Iterable[Weight]]
    is_decoder: bool | None = None


def choose(names: Iterable[str], config: TransformerConfig, pad: int | None, paths) -> str:
    """The first class of `names` that can hold a network.

    Args:
      pad: id of the padding, None = the vocabulary has none.
      paths: of its parameters, "encoder/embeddings/token/embedding" and so on.

    Raises:
      UserError: none can, with the reasons of each.
    """
    refusals = []
    for name in names:
        reasons = _reasons(ARCHITECTURES[name], config, pad, set(paths))
        if not reasons:
            return name
        refusals.append(f"{name}: {', '.join(reasons)}")
    raise UserError(f"no class of transformers holds this model ({'; '.join(refusals)})")


def _reasons(architecture, config, pad, paths) -> list[str]:
    values = dataclasses.asdict(config)
    reasons = [
        f"config.model.{key}={values[key]!r}, not {needed!r}"
        for key, needed in architecture.needs(values, pad).items()
        if values[key] != needed
    ]
    if reasons:
        return reasons
    mapped = {path for weight in architecture.weights(config) for path in weight.ours}
    wanted = {path for path in mapped if not weights.may_lack(path)}
    reasons += [f"it has no place for {path}" for path in sorted(paths - mapped)]
    return reasons + [f"it wants {path}" for path in sorted(wanted - paths)]


def describe(name: str, config: TransformerConfig, vocabulary) -> dict[str, Any]:
    """The config.json of a network that the class can hold."""
    architecture, values = ARCHITECTURES[name], dataclasses.asdict(config)
    values["activation"] = _TO_THEIRS[config.activation]
    values["segments"] = config.segments or 1  # a table of zeros changes nothing
    return {
        "architectures": [name],
        "model_type": architecture.model_type,
        "dtype": "float32",
        **{theirs: values[ours] for ours, (theirs, _) in architecture.keys.items()},
        **architecture.extra(config),
        **({"is_decoder": True} if architecture.is_decoder else {}),
        "initializer_range": config.init_std,
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
    }


def settings(name: str, written: dict[str, Any]) -> dict[str, Any]:
    """The values of TransformerConfig that a config.json means; the inverse of `describe`.

    Raises:
      UserError: it says something that no network here can be.
    """
    architecture = ARCHITECTURES[name]
    for key, value in architecture.usual.items():
        if written.get(key, value) != value:
            raise UserError(f"its config.json says {key}={written[key]!r}; here it is {value!r}")
    _check_decoder(name, written)
    values = {
        ours: _value(written, theirs, default)
        for ours, (theirs, default) in architecture.keys.items()
    }
    if values["activation"] not in _TO_OURS:
        raise UserError(
            f"its config.json says {architecture.keys['activation'][0]}={values['activation']!r}; "
            f"here are {', '.join(_TO_OURS)}"
        )
    values["activation"] = _TO_OURS[values["activation"]]
    values["mlp_width"] = values["mlp_width"] or 4 * values["width"]  # GPT-2 writes null
    pad = _value(written, "pad_token_id", _PAD[architecture.model_type], (int, type(None)))
    needed = architecture.needs(values, pad)
    for key, value in needed.items():
        if values.setdefault(key, value) != value:
            raise UserError(f"its config.json means {key}={values[key]!r}; its head is {value!r}")
    return values


def _check_decoder(name: str, written: dict[str, Any]) -> None:
    """The tensors of a network that sees both sides and of one that does not have equal names."""
    wanted, said = ARCHITECTURES[name].is_decoder, bool(written.get("is_decoder"))
    if wanted not in (None, said):
        sees = {True: "the left alone", False: "both sides"}
        raise UserError(
            f"its config.json says is_decoder={said}: it sees {sees[said]}, and this objective's "
            f"{name} {sees[wanted]}"
        )


def _value(written: dict[str, Any], key: str, default: Any, types: tuple | None = None) -> Any:
    """What is written, which must be of the type of the default (None = an int or None)."""
    value = written.get(key, default)
    types = types or {float: (float, int), type(None): (int, type(None))}.get(type(default))
    if not isinstance(value, types or type(default)):
        raise UserError(f"its config.json says {key}={value!r}: the usual value is {default!r}")
    return value


_TO_OURS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_TO_THEIRS = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu": "relu", "silu": "silu"}

# Where a config.json lacks pad_token_id.
_PAD = {"bert": 0, "roberta": 1, "electra": 0, "gpt2": None, "xlnet": 5}

# ------------------------------------------------------------------------------------ the classes


_BERT_KEYS = {
    "vocabulary_size": ("vocab_size", 30522),
    "layers": ("num_hidden_layers", 12),
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "activation": ("hidden_act", "gelu"),
    "norm_epsilon": ("layer_norm_eps", 1e-12),
    "position_rows": ("max_position_embeddings", 512),
    "segments": ("type_vocab_size", 2),
}
_ROBERTA_KEYS = _BERT_KEYS | {"vocabulary_size": ("vocab_size", 50265)}
_ELECTRA_KEYS = _BERT_KEYS | {
    "embedding_width": ("embedding_size", 128),
    "width": ("hidden_size", 256),
    "heads": ("num_attention_heads", 4),
    "mlp_width": ("intermediate_size", 1024),
}
_GPT2_KEYS = {
    "vocabulary_size": ("vocab_size", 50257),
    "layers": ("n_layer", 12),
    "width": ("n_embd", 768),
    "heads": ("n_head", 12),
    "mlp_width": ("n_inner", None),
    "activation": ("activation_function", "gelu_new"),
    "norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "position_rows": ("n_positions", 1024),
}
_XLNET_KEYS = {
    "vocabulary_size": ("vocab_size", 32000),
    "layers": ("n_layer", 24),
    "width": ("d_model", 1024),
    "heads": ("n_head", 16),
    "mlp_width": ("d_inner", 4096),
    "activation": ("ff_activation", "gelu"),
    "norm_epsilon": ("layer_norm_eps", 1e-12),
}
_TIED = {"tie_head": ("tie_word_embeddings", True)}


def _needs_electra(values, pad):
    return dict(
        norm="layernorm",
        norm_order="post",
        position="learned",
        position_offset=0,
        embedding_norm=True,
        gated=False,
    )


def _needs_generator(values, pad):
    # The activation of the head is fixed.
    return _needs_electra(values, pad) | dict(head_transform=True, activation="gelu_erf")


def _needs_bert(values, pad):
    return _needs_electra(values, pad) | dict(head_transform=True, embedding_width=values["width"])


def _needs_roberta(values, pad):
    """A token's position is counted from pad + 1."""
    offset = "pad_token_id + 1" if pad is None else pad + 1
    return _needs_bert(values, pad) | dict(position_offset=offset, activation="gelu_erf")


def _needs_gpt2(values, pad):
    return dict(
        norm="layernorm",
        norm_order="pre",
        position="learned",
        position_offset=0,
        embedding_norm=False,
        gated=False,
        segments=0,
        head_transform=False,
        head_bias=False,
        embedding_width=values["width"],
    )


def _needs_xlnet(values, pad):
    return dict(
        norm="layernorm",
        norm_order="post",
        position="relative",
        embedding_norm=False,
        gated=False,
        segments=0,
        head_transform=False,
        embedding_width=values["width"],
    )


def _bert_extra(config):
    return {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _gpt2_extra(config):
    return {
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


_ABSOLUTE = {"position_embedding_type": "absolute"}

_BERT = Architecture(
    model_type="bert",
    prefix="bert",
    keys=_BERT_KEYS | _TIED,
    needs=_needs_bert,
    extra=_bert_extra,
    usual=_ABSOLUTE,
    weights=functools.partial(weights.bert, "bert", weights.BERT_HEAD),
    is_decoder=False,
)

ARCHITECTURES = {
    "BertForMaskedLM": _BERT,
    "BertForPreTraining": _BERT._replace(
        weights=weights.bert_pretraining,
    ),
    "BertLMHeadModel": _BERT._replace(is_decoder=True),
    "RobertaForMaskedLM": _BERT._replace(
        model_type="roberta",
        prefix="roberta",
        keys=_ROBERTA_KEYS | _TIED,
        needs=_needs_roberta,
        weights=functools.partial(weights.bert, "roberta", weights.ROBERTA_HEAD),
    ),
    "ElectraForMaskedLM": _BERT._replace(
        model_type="electra",
        prefix="electra",
        keys=_ELECTRA_KEYS | _TIED,
        needs=_needs_generator,
        weights=functools.partial(weights.bert, "electra", weights.GENERATOR_HEAD),
    ),
    "ElectraForPreTraining": _BERT._replace(
        model_type="electra",
        prefix="electra",
        keys=_ELECTRA_KEYS,
        needs=_needs_electra,
        weights=weights.discriminator,
    ),
    "GPT2LMHeadModel": Architecture(
        model_type="gpt2",
        prefix="transformer",
        keys=_GPT2_KEYS | _TIED,
        needs=_needs_gpt2,
        extra=_gpt2_extra,
        usual={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        weights=weights.gpt2,
    ),
    "XLNetLMHeadModel": Architecture(
        model_type="xlnet",
        prefix="transformer",
        keys=_XLNET_KEYS | _TIED,
        needs=_needs_xlnet,
        extra=lambda config: {"d_head": config.head_width, "dropout": config.dropout},
        usual={"attn_type": "bi", "clamp_len": -1, "same_length": False},
        weights=weights.xlnet,
    ),
}
