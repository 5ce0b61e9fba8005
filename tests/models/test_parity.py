"""Our Transformer against the models of `transformers`, with their random weights carried over.

Nothing is downloaded: the weights are drawn here. The map from their names to ours is linear, so it
carries gradients as well. Skipped without torch and transformers (the extra "parity").
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from configs import base
from pretraining.models.attention import Attention
from pretraining.models.heads import LanguageModelHead
from pretraining.models.transformer import Transformer, TransformerConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, L, D, E, F, H, N = 99, 16, 32, 24, 80, 4, 3
SHAPES = {(2, 16): [16, 11], (3, 9): [9, 1, 5]}  # (B, L): lengths
THEIRS = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=N,
    num_attention_heads=H,
    intermediate_size=F,
    attn_implementation="eager",
)
OURS = dict(layers=N, width=D, heads=H, mlp_width=F)
PAD = 1


def bert(activation="gelu_pytorch_tanh"):
    config = transformers.BertConfig(
        **THEIRS, max_position_embeddings=20, hidden_act=activation, pad_token_id=PAD
    )
    ours = dict(OURS, segments=2, position_rows=20)
    ours["activation"] = "gelu_tanh" if "tanh" in activation else "gelu_erf"
    return transformers.BertForMaskedLM(config), ours, bert_parameters


def roberta():
    config = transformers.RobertaConfig(
        **THEIRS, max_position_embeddings=20, type_vocab_size=1, layer_norm_eps=1e-5
    )
    ours = dict(OURS, segments=1, position_rows=20, position_offset=2)
    ours |= dict(activation="gelu_erf", norm_epsilon=1e-5)
    return transformers.RobertaForMaskedLM(config), ours, roberta_parameters


def electra():
    config = transformers.ElectraConfig(
        **THEIRS, max_position_embeddings=20, embedding_size=E, pad_token_id=PAD
    )
    ours = dict(OURS, segments=2, position_rows=20, embedding_width=E, activation="gelu_erf")
    return transformers.ElectraForMaskedLM(config), ours, electra_parameters


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=D,
        n_layer=N,
        n_head=H,
        n_inner=F,
        n_positions=20,
        attn_implementation="eager",
    )
    ours = dict(OURS, norm_order="pre", embedding_norm=False, norm_epsilon=1e-5, position_rows=20)
    ours |= dict(head_transform=False, head_bias=False)
    return transformers.GPT2LMHeadModel(config), ours, gpt2_parameters


MODELS = {
    "bert": bert,
    "bert-erf": lambda: bert("gelu"),
    "roberta": roberta,
    "electra": electra,
    "gpt2": gpt2,
}


# Their names to ours. `theirs` is a dict of numpy arrays: parameters or their gradients.


def bert_parameters(theirs):
    return {
        "encoder": bert_encoder(theirs, "bert"),
        "head": {
            "transform": dense(theirs, "cls.predictions.transform.dense"),
            "norm": scaled(theirs, "cls.predictions.transform.LayerNorm"),
            "bias": theirs["cls.predictions.bias"],
        },
    }


def roberta_parameters(theirs):
    return {
        "encoder": bert_encoder(theirs, "roberta"),
        "head": {
            "transform": dense(theirs, "lm_head.dense"),
            "norm": scaled(theirs, "lm_head.layer_norm"),
            "bias": theirs["lm_head.bias"],
        },
    }


def electra_parameters(theirs):
    encoder = bert_encoder(theirs, "electra")
    encoder["embeddings_project"] = dense(theirs, "electra.embeddings_project")
    return {
        "encoder": encoder,
        "head": {
            "transform": dense(theirs, "generator_predictions.dense"),
            "norm": scaled(theirs, "generator_predictions.LayerNorm"),
            "bias": theirs["generator_lm_head.bias"],
        },
    }


def bert_encoder(theirs, name):
    embeddings = f"{name}.embeddings"
    out = {
        f"layer_{index}": bert_layer(theirs, f"{name}.encoder.layer.{index}") for index in range(N)
    }
    out["embeddings"] = {
        "token": {"embedding": theirs[f"{embeddings}.word_embeddings.weight"]},
        "position": {"embedding": theirs[f"{embeddings}.position_embeddings.weight"]},
        "segment": {"embedding": theirs[f"{embeddings}.token_type_embeddings.weight"]},
        "norm": scaled(theirs, f"{embeddings}.LayerNorm"),
    }
    return out


def bert_layer(theirs, name):
    attention = {
        part: to_heads(dense(theirs, f"{name}.attention.self.{part}"))
        for part in ("query", "key", "value")
    }
    attention["out"] = from_heads(dense(theirs, f"{name}.attention.output.dense"))
    return {
        "attention": attention,
        "attention_norm": scaled(theirs, f"{name}.attention.output.LayerNorm"),
        "mlp": {
            "up": dense(theirs, f"{name}.intermediate.dense"),
            "down": dense(theirs, f"{name}.output.dense"),
        },
        "mlp_norm": scaled(theirs, f"{name}.output.LayerNorm"),
    }


def gpt2_parameters(theirs):
    encoder = {f"layer_{i}": gpt2_layer(theirs, f"transformer.h.{i}") for i in range(N)}
    encoder["embeddings"] = {
        "token": {"embedding": theirs["transformer.wte.weight"]},
        "position": {"embedding": theirs["transformer.wpe.weight"]},
    }
    encoder["final_norm"] = scaled(theirs, "transformer.ln_f")
    return {"encoder": encoder, "head": {}}


def gpt2_layer(theirs, name):
    def convolution(part):  # stored as [in, out]
        return {"kernel": theirs[f"{name}.{part}.weight"], "bias": theirs[f"{name}.{part}.bias"]}

    joint = convolution("attn.c_attn")
    parts = zip(np.split(joint["kernel"], 3, 1), np.split(joint["bias"], 3), strict=True)
    query, key, value = (to_heads({"kernel": kernel, "bias": bias}) for kernel, bias in parts)
    out = from_heads(convolution("attn.c_proj"))
    return {
        "attention": {"query": query, "key": key, "value": value, "out": out},
        "attention_norm": scaled(theirs, f"{name}.ln_1"),
        "mlp": {"up": convolution("mlp.c_fc"), "down": convolution("mlp.c_proj")},
        "mlp_norm": scaled(theirs, f"{name}.ln_2"),
    }


def dense(theirs, name):
    return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}


def scaled(theirs, name):
    return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}


def to_heads(layer):
    return {"kernel": layer["kernel"].reshape(D, H, D // H), "bias": layer["bias"].reshape(H, -1)}


def from_heads(layer):
    return {"kernel": layer["kernel"].reshape(H, D // H, D), "bias": layer["bias"]}


# The comparison.


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """(name, their model with random weights, our config, the map of names)."""
    theirs, changes, mapping = MODELS[request.param]()
    theirs.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)
    config = TransformerConfig.create(base.model() | changes, V, L)
    return request.param, theirs, config, mapping


def batch(shape):
    """(tokens, lengths, labels), numpy; the padding is PAD, which occurs nowhere else."""
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(PAD + 1, V, (2, *shape)).astype(np.int32)
    lengths = np.array(SHAPES[shape], np.int32)
    tokens[np.arange(shape[1]) >= lengths[:, None]] = PAD
    return tokens, lengths, labels


def run_theirs(model, tokens, lengths, labels):
    """(hidden states, logits, gradients by name) as numpy."""
    valid = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])
    out = model(
        torch.from_numpy(tokens).long(), attention_mask=valid.long(), output_hidden_states=True
    )
    labels = torch.from_numpy(labels).long()
    model.zero_grad()
    torch.nn.functional.cross_entropy(out.logits[valid], labels[valid]).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    hidden = [layer.detach().numpy() for layer in out.hidden_states]
    return hidden, out.logits.detach().numpy(), gradients


def run_ours(config, params, causal, tokens, lengths, labels):
    """The same of ours."""
    valid = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    encoder, head = Transformer(config), LanguageModelHead(config)

    def loss(params):
        hidden = encoder.apply(
            {"params": params["encoder"]}, tokens, Attention(causal, lengths), all_layers=True
        )
        table = params["encoder"]["embeddings"]["token"]["embedding"]
        logits = head.apply({"params": params["head"]}, hidden[-1], table)
        log_probabilities = jnp.take_along_axis(
            jax.nn.log_softmax(logits), labels[..., None], axis=-1
        )[..., 0]
        return -jnp.mean(log_probabilities, where=valid), (hidden, logits)

    gradient, (hidden, logits) = jax.jit(jax.grad(loss, has_aux=True))(params)
    return hidden, logits, gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_parity(pair, shape):
    name, theirs, config, mapping = pair
    data = batch(shape)
    parameters = {key: value.detach().numpy() for key, value in theirs.named_parameters()}
    params = jax.tree.map(jnp.asarray, mapping(parameters))
    hidden, logits, gradients = run_theirs(theirs, *data)
    ours, our_logits, our_gradients = run_ours(
        config, params, name == "gpt2", *map(jnp.asarray, data)
    )
    valid = np.arange(shape[1]) < data[1][:, None]
    errors = [
        np.abs(a - b)[valid].max() / np.abs(b[valid]).max()
        for a, b in zip([*ours, our_logits], [*hidden, logits], strict=True)
    ]
    flat, their_flat = ravel_pytree(our_gradients)[0], ravel_pytree(mapping(gradients))[0]
    gradient_error = np.linalg.norm(flat - their_flat) / np.linalg.norm(their_flat)
    print(f"{name} {shape}: outputs {max(errors):.1e}, gradient {gradient_error:.1e}")
    assert len(ours) == N + 1
    assert max(errors) < 1e-5  # largest difference relative to the largest entry of the array
    assert gradient_error < 1e-4
