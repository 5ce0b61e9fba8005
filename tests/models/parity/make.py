"""What the models of `transformers` compute, on PyTorch and the CPU, as arrays.

    python tests/models/parity/make.py

writes `<case>.npz` beside this file, so that tests/models/test_parity.py can hold ours against them
where neither is installed. Nothing is downloaded: the weights are drawn here.
"""

import json
import pathlib
import types

import numpy as np

from configs import base
from pretraining.hugging_face import architectures
from pretraining.models.config import TransformerConfig

V, L, PAD = 61, 16, 1
SHAPES = {(2, 16): [16, 11], (3, 9): [9, 1, 5]}  # (B, L): lengths
SIZES = dict(layers=2, width=16, heads=4, mlp_width=24, position_rows=20)
GPT2 = dict(norm_order="pre", embedding_norm=False, head_transform=False, head_bias=False)
ERF = dict(activation="gelu_erf")
XLNET = dict(position="relative", embedding_norm=False, head_transform=False)

# case: (class, what its config.model changes beside SIZES)
CASES = {
    "bert": ("BertForMaskedLM", dict(segments=2)),
    "bert_erf_untied": ("BertForMaskedLM", dict(segments=2, tie_head=False, **ERF)),
    "bert_bare": ("BertForMaskedLM", dict(segments=0, head_bias=False, bias=False)),
    "bert_causal": ("BertLMHeadModel", dict(segments=1)),
    "roberta": ("RobertaForMaskedLM", dict(segments=1, position_offset=PAD + 1, **ERF)),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "electra_generator": ("ElectraForMaskedLM", dict(segments=2, embedding_width=12, **ERF)),
    "electra_discriminator": ("ElectraForPreTraining", dict(segments=2, embedding_width=12, **ERF)),
    "xlnet": ("XLNetLMHeadModel", XLNET),
    "xlnet_two_streams": ("XLNetLMHeadModel", XLNET | ERF),
}


def reference(case: str, weights: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Weights, inputs, outputs and gradients of one class of `transformers`.

    Args:
      weights: {name: tensor}; None = drawn here.

    Returns:
      "config" (config.json), "weights/<name>" and, for the i-th of SHAPES, "<i>/inputs/<name>",
      "<i>/outputs/<name>" and "<i>/gradients/<name>"; outputs are the hidden states, the logits and
      the loss, the mean over all valid positions.
    """
    model, written = _model(case)
    _set(model, weights)
    found = {"config": np.array(json.dumps(written))}
    found |= {f"weights/{name}": value for name, value in _arrays(model.named_parameters())}
    for index, shape in enumerate(SHAPES):
        inputs = draw_inputs(case, shape)
        outputs, gradients = _run(case, model, inputs)
        for kind, arrays in (("inputs", inputs), ("outputs", outputs), ("gradients", gradients)):
            found |= {f"{index}/{kind}/{name}": value for name, value in arrays.items()}
    return found


def config(case: str) -> TransformerConfig:
    """The network of a case."""
    return TransformerConfig.create(base.model() | SIZES | CASES[case][1], V, L)


def draw_inputs(case: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Tokens, lengths, labels and more; the padding is PAD, which occurs nowhere else.

    For two streams: `positions` [B, K], where the query stream runs, and the order `rank` [B, L],
    -1 = known to all.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(PAD + 1, V, shape).astype(np.int32)
    length = np.array(SHAPES[shape], np.int32)
    inputs = dict(tokens=tokens, length=length)
    if case == "xlnet_two_streams":
        inputs["length"] = length = np.maximum(length, 5)
        inputs["segments"] = rng.integers(0, 3, shape).astype(np.int32)
        inputs |= _draw_order(rng, length, shape)
    elif segments := config(case).segments:
        inputs["segments"] = rng.integers(0, segments, shape).astype(np.int32)
    tokens[np.arange(shape[1]) >= length[:, None]] = PAD
    labels = 2 if CASES[case][0] == "ElectraForPreTraining" else V
    where = inputs.get("positions", tokens)
    inputs["labels"] = rng.integers(0, labels, where.shape).astype(np.int32)
    return inputs


def _draw_order(rng, length, shape):
    """Three hidden tokens of every row in an order; the query stream runs at two of them."""
    rank, positions = np.full(shape, -1, np.int32), np.zeros((shape[0], 2), np.int32)
    for row, size in enumerate(length):
        hidden = rng.permutation(size)[:3]
        rank[row, hidden] = rng.permutation(3)
        positions[row] = hidden[:2]
    return dict(rank=rank, positions=positions)


def _model(case):
    import transformers

    name, _ = CASES[case]
    vocabulary = types.SimpleNamespace(pad=PAD, bos=2, eos=3)
    written = architectures.describe(name, config(case), vocabulary)
    sizes = transformers.AutoConfig.for_model(**written)
    sizes._attn_implementation = "eager"
    return getattr(transformers, name)(sizes).eval(), written


def _set(model, weights):
    """Loads the weights; only those that are another one's under a second name may be missing."""
    import torch

    if weights is not None:
        tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected
        own = {name for name, _ in model.named_parameters()}
        assert not own & set(missing)
        return
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)


def _arrays(parameters):
    return [(name, parameter.detach().numpy().copy()) for name, parameter in parameters]


def _run(case, model, inputs):
    """(outputs, gradients), each {name: array}."""
    import torch

    given = {name: torch.from_numpy(value).long() for name, value in inputs.items()}
    valid = torch.arange(given["tokens"].shape[1])[None] < given["length"][:, None]
    more = {"token_type_ids": given["segments"]} if "segments" in given else {}
    counted = valid
    if "rank" in given:
        more |= _masks(given["rank"], given["positions"])
        counted = torch.ones_like(given["labels"], dtype=bool)
    mask = valid.float() if "XLNet" in CASES[case][0] else valid.long()
    out = model(given["tokens"], attention_mask=mask, output_hidden_states=True, **more)
    functional = torch.nn.functional
    logits, labels = out.logits[counted], given["labels"][counted]
    if logits.ndim == 1:
        loss = functional.binary_cross_entropy_with_logits(logits, labels.float())
    else:
        loss = functional.cross_entropy(logits, labels)
    model.zero_grad()
    loss.backward()
    gradients = {  # an untied head has two biases in BERT, and uses one
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    outputs = _name_layers(out.hidden_states, "rank" in given)
    outputs |= {"logits": out.logits, "loss": loss}
    return dict(_arrays(outputs.items())), dict(_arrays(gradients.items()))


def _masks(rank, positions):
    """Who must not see whom by the order, and where the query stream runs."""
    import torch

    seen, own = rank[:, None], rank[:, :, None]
    mapping = torch.nn.functional.one_hot(positions, rank.shape[1])
    return {
        "perm_mask": ((seen >= 0) & (seen >= own)).float(),
        "target_mapping": mapping.float(),
    }


def _name_layers(layers, two_streams):
    """Where there are two streams, content and query alternate."""
    content = layers[::2] if two_streams else layers
    named = {f"hidden{index}": layer for index, layer in enumerate(content)}
    return named | ({"query_hidden": layers[-1]} if two_streams else {})


if __name__ == "__main__":
    for case in CASES:
        file = pathlib.Path(__file__).parent / f"{case}.npz"
        np.savez_compressed(file, **reference(case))
        print(file.name, file.stat().st_size)
