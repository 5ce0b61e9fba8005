"""Our networks against the classes of `transformers`, with random weights carried both ways.

What they compute is either stored (tests/models/parity, written by make.py) or, where torch and
transformers are installed (the extra "parity"), computed now. The map of the weights is linear and
carries the gradients as well.
"""

import functools
import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import base
from objectives.electra import DetectionHead
from pretraining.hugging_face import architectures, weights
from pretraining.models.attention import Attention
from pretraining.models.config import TransformerConfig
from pretraining.models.heads import LanguageModelHead
from pretraining.models.transformer import Transformer
from pretraining.models.two_stream import TwoStream

FOLDER = pathlib.Path(__file__).parent / "parity"
MAKE = runpy.run_path(str(FOLDER / "make.py"))
CASES, L = MAKE["CASES"], MAKE["L"]


# What ours compute, from the same inputs: {name: array} and the loss.


def run_language_model(config, causal, params, inputs):
    hidden = encode(config, causal, params, inputs)
    table = params["encoder"]["embeddings"]["token"]["embedding"]
    head = LanguageModelHead(config)
    logits = head.apply({"params": params.get("head", {})}, hidden[-1], table)
    return hidden, logits, label_losses(logits, inputs["labels"])


def run_discriminator(config, params, inputs):
    hidden = encode(config, False, params, inputs)
    logits = DetectionHead(config).apply({"params": params["head"]}, hidden[-1])
    sign = 1 - 2 * inputs["labels"].astype(jnp.float32)
    return hidden, logits, jax.nn.softplus(sign * logits)


def run_two_streams(config, params, inputs):
    """Without an order it is the content stream alone."""
    encoder, variables = TwoStream(config), {"params": params["encoder"]}
    table = params["encoder"]["embeddings"]["token"]["embedding"]
    attention = Attention(length=inputs["length"], rank=inputs.get("rank"))
    segments, outputs = inputs.get("segments"), {}
    layers = encoder.apply(variables, inputs["tokens"], attention, segments, all_layers=True)
    last = layers[-1]
    if "rank" in inputs:
        _, last = encoder.apply(
            variables,
            table[inputs["tokens"]],
            attention,
            inputs["positions"],
            segments,
            method="two_streams",
        )
        outputs["query_hidden"] = last
    logits = LanguageModelHead(config).apply({"params": params["head"]}, last, table)
    return layers, logits, label_losses(logits, inputs["labels"]), outputs


def encode(config, causal, params, inputs):
    return Transformer(config).apply(
        {"params": params["encoder"]},
        inputs["tokens"],
        Attention(causal, inputs["length"]),
        inputs.get("segments"),
        all_layers=True,
    )


def label_losses(logits, labels):
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


@functools.lru_cache
def program(case, config):
    """(params, inputs) -> (gradient, outputs as of `make.reference`), jitted."""
    name = CASES[case][0]

    def run(params, inputs):
        if name == "XLNetLMHeadModel":
            return run_two_streams(config, params, inputs)
        if name == "ElectraForPreTraining":
            return run_discriminator(config, params, inputs)
        causal = name in ("BertLMHeadModel", "GPT2LMHeadModel")
        return run_language_model(config, causal, params, inputs)

    def loss(params, inputs):
        hidden, logits, losses, *more = run(params, inputs)
        valid = jnp.arange(inputs["tokens"].shape[1])[None] < inputs["length"][:, None]
        total = jnp.mean(losses, where=None if "rank" in inputs else valid)
        outputs = {f"hidden{index}": layer for index, layer in enumerate(hidden)}
        return total, outputs | {"logits": logits, "loss": total} | (more[0] if more else {})

    return jax.jit(jax.grad(loss, has_aux=True))


# The comparison.


def part(reference, prefix):
    prefix += "/"
    return {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}


def check(case, reference, config, params):
    """Outputs to 1e-5, the gradient to 1e-4 of its norm, on what `make.reference` has given."""
    entries = list(architectures.ARCHITECTURES[CASES[case][0]].weights(config))
    tree = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params, sep="/"))
    for index, shape in enumerate(MAKE["SHAPES"]):
        inputs, expected = part(reference, f"{index}/inputs"), part(reference, f"{index}/outputs")
        gradient, outputs = program(case, config)(tree, jax.tree.map(jnp.asarray, inputs))
        valid = np.arange(shape[1]) < inputs["length"][:, None]
        errors = {key: error(outputs[key], expected[key], valid) for key in expected}
        theirs = weights.to_params(entries, part(reference, f"{index}/gradients"), config)
        gradient = traverse_util.flatten_dict(gradient, sep="/")
        theirs, own = (np.concatenate([np.ravel(x[p]) for p in params]) for x in (theirs, gradient))
        difference = np.linalg.norm(own - theirs) / np.linalg.norm(theirs)
        print(
            f"{case} {shape}: hidden {max(v for k, v in errors.items() if 'hidden' in k):.1e}, "
            f"logits {errors['logits']:.1e}, loss {errors['loss']:.1e}, gradient {difference:.1e}"
        )
        assert outputs.keys() == expected.keys()
        assert max(errors.values()) < 1e-5, errors
        assert difference < 1e-4


def check_theirs(case, reference):
    """Their weights in the network that their config.json describes."""
    name = CASES[case][0]
    changes = architectures.settings(name, json.loads(str(reference["config"])))
    vocabulary_size = changes.pop("vocabulary_size")
    config = TransformerConfig.create(base.model() | changes, vocabulary_size, L)
    entries = architectures.ARCHITECTURES[name].weights(config)
    params = weights.to_params(entries, part(reference, "weights"), config)
    check(case, reference, config, params)


def error(ours, theirs, valid):
    """The largest difference, relative to the largest entry of the array, at valid positions."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    if ours.shape[:2] == valid.shape:
        ours, theirs = ours[valid], theirs[valid]
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_their_stored_results(case):
    with np.load(FOLDER / f"{case}.npz") as file:
        check_theirs(case, dict(file))


@pytest.mark.parametrize("case", CASES)
def test_their_weights_in_our_network(case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    check_theirs(case, MAKE["reference"](case))


@pytest.mark.parametrize("case", CASES)
def test_our_weights_in_their_network(case):
    """Every tensor of theirs is given, and all come back bit for bit."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = MAKE["config"](case)
    entries = list(architectures.ARCHITECTURES[CASES[case][0]].weights(config))
    params = random_params(case, config)
    reference = MAKE["reference"](case, weights.to_tensors(entries, params, config))
    lacking = {path for entry in entries for path in entry.ours} - params.keys()
    back = weights.to_params(entries, part(reference, "weights"), config, lacking)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value)
    check(case, reference, config, params)


def random_params(case, config):
    """{path: array}, of the shapes that the modules themselves make."""
    key, hidden = jax.random.key(0), jnp.zeros((1, 2, config.width))
    table = jnp.zeros((config.vocabulary_size, config.embedding_width))
    tokens = jnp.zeros((1, 2), jnp.int32)
    if CASES[case][0] == "ElectraForPreTraining":
        head = jax.eval_shape(DetectionHead(config).init, key, hidden)
    else:
        head = jax.eval_shape(LanguageModelHead(config).init, key, hidden, table)
    network = TwoStream if config.position == "relative" else Transformer
    encoder = jax.eval_shape(network(config).init, key, tokens, Attention())
    tree = {"encoder": encoder["params"], "head": head.get("params", {})}
    shapes = traverse_util.flatten_dict(tree, sep="/")
    rng = np.random.default_rng(0)
    draw = lambda path, shape: (
        1 + 0.1 * rng.normal(size=shape) if path.endswith("scale") else 0.2 * rng.normal(size=shape)
    )
    return {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


def test_the_next_sentence_head():
    """No objective here has one yet: its logits are computed by hand from the first position."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, name = MAKE["config"]("bert"), "BertForPreTraining"
    vocabulary = types.SimpleNamespace(pad=MAKE["PAD"], bos=2, eos=3)
    sizes = transformers.BertConfig(**architectures.describe(name, config, vocabulary))
    model = transformers.BertForPreTraining(sizes).eval()
    tensors = {key: x.detach().numpy() for key, x in model.named_parameters()}
    entries = list(architectures.ARCHITECTURES[name].weights(config))
    assert {entry.theirs for entry in entries} == tensors.keys()
    params = weights.to_params(entries, tensors, config)
    with torch.no_grad():
        tokens = torch.tensor([[2, 5, 3]])
        first = model.bert(tokens).last_hidden_state[0, 0].numpy()
        theirs = model(tokens).seq_relationship_logits[0].numpy()
    pooled = np.tanh(first @ params["pooler/kernel"] + params["pooler/bias"])
    ours = pooled @ params["next_sentence/kernel"] + params["next_sentence/bias"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
