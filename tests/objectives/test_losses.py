"""The losses of the objectives, on what they corrupt, against those of `transformers`.

Their inputs, labels and masks are made here from the row and what was chosen in it; only the
weights come by the map of pretraining/hugging_face, which is linear and carries gradients back. A
row without tokens, which fills up a batch, is in ours alone.
"""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pretraining.hugging_face import architectures, weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLS, SEP, SPECIAL = 2, 3, (0, 1, 2, 3, 4)
IGNORED = -100  # the label that losses in PyTorch leave out

# (tokens of the rows, positions L, positions whose logits exist at once): all, or a few
SHAPES = [((32, 0, 17, 1), 35, 32), ((21, 9, 14), 24, 2)]
shapes = pytest.mark.parametrize("lengths, size, chunk", SHAPES)

GPT2 = {
    "model.norm_order": "pre",
    "model.embedding_norm": False,
    "model.head_transform": False,
    "model.head_bias": False,
}
SPANS = {"objective.boundary_longest": 3, "objective.boundary_width": 6}
# Many samples, so that some are what stood there.
ELECTRA = {"model.activation": "gelu_erf", "objective.mask_rate": 0.8}


@pytest.fixture
def prepare(make_config, vocabulary, make_rows, corrupt, total):
    """(name, lengths, size, chunk, knobs of the batches, overrides) -> everything of our side."""

    def run(name, lengths, size, chunk, knobs=({},), **overrides):
        shape = {"data.sequence_length": size, "model.logits_chunk": chunk}
        config = make_config(name, **shape, **overrides)
        objective = importlib.import_module(f"objectives.{name}").build(config, vocabulary)
        rows = make_rows(config, lengths)
        examples = [
            corrupt(objective, rows, knobs=objective.schedule(jnp.int32(0)) | changed)
            for changed in knobs
        ]
        examples, rows = (
            jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
            for batches in (examples, [rows] * len(knobs))
        )
        params = draw(jax.eval_shape(objective.model.init, jax.random.key(0), examples)["params"])

        def value(params):
            terms = objective.loss(objective.model.apply, params, examples, {}, None, False)
            return total(terms), terms

        (loss, terms), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
        full = np.asarray(rows.length) > 0
        return types.SimpleNamespace(
            objective=objective,
            params=params,
            rows=jax.tree.map(lambda x: np.asarray(x)[full], rows),
            examples=jax.tree.map(lambda x: np.asarray(x)[full], examples),
            loss=float(loss),
            means={
                key: float(term.sum / (term.weight + term.smooth)) for key, term in terms.items()
            },
            gradient=flat(gradient),
        )

    return run


def draw(shapes):
    """No two leaves are alike, and none is so small that its part in the loss could be missed."""
    rng = np.random.default_rng(0)
    draw_one = lambda path, leaf: (
        (path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape)
    ).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw_one, shapes)


def flat(tree):
    return {key: np.asarray(x) for key, x in traverse_util.flatten_dict(tree, sep="/").items()}


# ------------------------------------------------------------------------------------ their network


class Theirs:
    """A class of `transformers` with our weights."""

    def __init__(self, ours, vocabulary, key="", **extra):
        network = ours.objective.hugging_face[key]
        name, self.config = network.architectures[0], network.config
        self.entries = list(architectures.ARCHITECTURES[name].weights(self.config))
        params = flat(network.take(ours.params))
        self.lacking = {path for entry in self.entries for path in entry.ours} - params.keys()
        written = architectures.describe(name, self.config, vocabulary) | extra
        sizes = transformers.AutoConfig.for_model(**written)
        sizes._attn_implementation = "eager"
        self.model = getattr(transformers, name)(sizes).eval()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None  # a random token may be [PAD], which learns too
        tensors = weights.to_tensors(self.entries, params, self.config)
        given = {name: torch.from_numpy(value) for name, value in tensors.items()}
        missing, unexpected = self.model.load_state_dict(given, strict=False)
        assert not unexpected
        assert not {name for name, _ in self.model.named_parameters()} & set(missing)

    def __call__(self, tokens, length, **more):
        valid = np.arange(tokens.shape[1]) < length[:, None]
        kind = np.float32 if "perm_mask" in more else np.int64
        inputs = dict(input_ids=tokens, attention_mask=valid.astype(kind)) | more
        as_torch = lambda x: torch.from_numpy(np.int64(x) if x.dtype.kind in "iub" else x)
        return self.model(
            **{key: as_torch(x) if isinstance(x, np.ndarray) else x for key, x in inputs.items()}
        )

    def gradient(self):
        """{path: array} in our layout; segment types, which we may not have, are left out."""
        tensors = {name: x.grad for name, x in self.model.named_parameters()}
        tensors = {name: np.zeros(1) if x is None else x.numpy() for name, x in tensors.items()}
        found = weights.to_params(self.entries, tensors, self.config)
        return {path: x for path, x in found.items() if path not in self.lacking}


def agree(name, ours, theirs, gradient):
    """{term, or "" for the loss: theirs}; the loss to 1e-5, the gradient to 1e-4 of its norm."""
    errors = {}
    for term, value in theirs.items():
        mean = ours.means[term] if term else ours.loss
        errors[term or "loss"] = abs(mean - value.item()) / value.item()
    assert gradient.keys() == ours.gradient.keys()
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in gradient.values()))
    difference = np.sqrt(
        sum(np.sum(np.square(ours.gradient[key] - x)) for key, x in gradient.items())
    )
    shown = ", ".join(f"{term} {error:.1e}" for term, error in errors.items())
    print(f"{name}: {shown}, gradient {difference / norm:.1e} of {norm:.1f}")
    assert max(errors.values()) < 1e-5
    assert difference < 1e-4 * norm


# ------------------------------------------------------------------------------- what the row says


def framed(ours):
    """[CLS] payload [SEP], [B, L], and the lengths [B]."""
    tokens = np.zeros_like(ours.examples.tokens)
    for row, (payload, length) in enumerate(zip(ours.rows.tokens, ours.rows.length, strict=True)):
        tokens[row, : length + 2] = [CLS, *payload[:length], SEP]
    return tokens, ours.rows.length + 2


def cloze_labels(ours):
    """The original tokens where the row was corrupted."""
    chosen = ours.examples.corrupted
    assert chosen.any()
    return np.where(chosen, framed(ours)[0], IGNORED)


# ---------------------------------------------------------------------------------- the objectives


@shapes
def test_causal_lm(lengths, size, chunk, prepare, vocabulary):
    """GPT2LMHeadModel shifts its labels itself."""
    ours = prepare("causal_lm", lengths, size, chunk, **GPT2)
    tokens, length = np.zeros_like(ours.examples.tokens), ours.rows.length + 1
    for row, (payload, valid) in enumerate(zip(ours.rows.tokens, length, strict=True)):
        tokens[row, :valid] = [vocabulary.bos, *payload[: valid - 1]]
    labels = np.where(np.arange(size) < length[:, None], tokens, IGNORED)
    theirs = Theirs(ours, vocabulary)
    loss = theirs(tokens, length, labels=labels).loss
    loss.backward()
    agree("causal_lm", ours, {"": loss, "causal_lm": loss}, theirs.gradient())


@shapes
def test_masked_lm(lengths, size, chunk, prepare, vocabulary):
    ours = prepare("masked_lm", lengths, size, chunk, **{"model.segments": 2})
    theirs = Theirs(ours, vocabulary)
    tokens = ours.examples.tokens
    loss = theirs(tokens, framed(ours)[1], labels=cloze_labels(ours)).loss
    loss.backward()
    agree("masked_lm", ours, {"": loss, "masked_lm": loss}, theirs.gradient())


@shapes
def test_span_boundary(lengths, size, chunk, prepare, vocabulary):
    """BertForMaskedLM, and SpanBERT's second head as section 3.2 of the paper has it."""
    ours = prepare("span_boundary", lengths, size, chunk, **SPANS)
    theirs = Theirs(ours, vocabulary)
    out = theirs(
        ours.examples.tokens,
        framed(ours)[1],
        labels=cloze_labels(ours),
        output_hidden_states=True,
    )
    head = {
        path: torch.tensor(x, requires_grad=True)
        for path, x in flat(ours.params).items()
        if path.startswith("boundary_head/")
    }
    table = theirs.model.bert.embeddings.word_embeddings.weight
    boundary = boundary_loss(head, table, out.hidden_states[-1], ours)
    loss = out.loss + boundary
    loss.backward()
    gradient = theirs.gradient() | {path: x.grad.numpy() for path, x in head.items()}
    terms = {"": loss, "masked_lm": out.loss, "span_boundary": boundary}
    agree("span_boundary", ours, terms, gradient)


def boundary_loss(head, table, hidden, ours):
    """The sum over the pairs / (their number + 1)."""
    example, get = ours.examples, lambda name: head[f"boundary_head/{name}"]
    functional = torch.nn.functional

    def layer(x, dense, norm):
        x = functional.gelu(x @ get(f"{dense}/kernel") + get(f"{dense}/bias"), approximate="tanh")
        scale, bias = get(f"{norm}/scale"), get(f"{norm}/bias")
        return functional.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-12)

    row, slot = np.nonzero(example.boundary_weights)
    assert len(row) > 2
    left, right, offset = (x[row, slot] for x in (example.left, example.right, example.offset))
    assert len(set(offset)) > 1
    place = get("position/embedding")[offset]
    x = torch.cat([hidden[row, left], hidden[row, right], place], dim=-1)
    x = layer(layer(x, "combine_dense", "combine_norm"), "transform", "norm")
    labels = framed(ours)[0][row, example.positions[row, slot]]
    logits = x @ table.T + get("bias")
    summed = functional.cross_entropy(logits, torch.from_numpy(np.int64(labels)), reduction="sum")
    return summed / (len(row) + 1)


@shapes
def test_permutation_lm(lengths, size, chunk, prepare, vocabulary):
    """XLNetLMHeadModel; with one permutation for the row, or two and half of the rows reversed."""
    backward = size == 24
    size_of_one = 12 if backward else 0
    overrides = {
        "objective.permutation_size": size_of_one,
        "objective.backward_fraction": 0.5 * backward,
    }
    halves = [{"backward_fraction": jnp.float32(x)} for x in ((0, 1) if backward else (0,))]
    ours = prepare("permutation_lm", lengths, size, chunk, halves, **overrides)
    theirs = Theirs(ours, vocabulary, bi_data=backward)
    tokens, length, segments = read(ours, backward)
    target, mapping, labels = targets(ours, tokens)
    loss = theirs(
        tokens,
        length,
        token_type_ids=segments,
        perm_mask=permutation_mask(ours, tokens, length, target, size_of_one or size),
        target_mapping=mapping,
        labels=labels,
    ).loss
    loss.backward()
    agree("permutation_lm", ours, {"": loss, "permutation_lm": loss}, theirs.gradient())


def read(ours, backward):
    """Payload [SEP] [CLS], [B, L], the lengths, and the segments; [CLS] is one of its own."""
    tokens, length = np.zeros_like(ours.examples.tokens), ours.rows.length + 2
    for row, (payload, valid) in enumerate(zip(ours.rows.tokens, ours.rows.length, strict=True)):
        turned = backward and row >= len(tokens) // 2
        payload = payload[:valid][:: -1 if turned else 1]
        tokens[row, : valid + 2] = [*payload, SEP, CLS]
    return tokens, length, np.where(np.arange(tokens.shape[1]) == length[:, None] - 1, 2, 0)


def targets(ours, tokens):
    """Is it a target [B, L], where the query stream runs [B, K, L], the tokens there [B, K]."""
    positions, used = ours.examples.positions, ours.examples.weights > 0
    assert used.any()
    assert not used.all()
    mapping = np.eye(tokens.shape[1], dtype=np.float32)[positions] * used[..., None]
    labels = np.where(used, np.take_along_axis(tokens, positions, axis=1), IGNORED)
    return mapping.any(axis=1), mapping.astype(np.float32), labels


def permutation_mask(ours, tokens, length, target, size):
    """[B, L, L], 1 = must not see; by xlnet/data_utils.py, _local_perm, one pair after the other.

    Of the ranks only their order in a permutation of `size` positions is read.
    """
    mask = np.zeros((*tokens.shape, tokens.shape[1]), np.float32)
    for b, valid in enumerate(length):
        hidden = target[b] | np.isin(tokens[b], SPECIAL)
        rank = np.where(hidden, ours.examples.rank[b], -1)
        drawn = rank[:valid][hidden[:valid]]
        assert len(set(drawn) - {-1}) == len(drawn)
        for i, j in np.ndindex(valid, valid):
            own = rank[i] if target[b, i] else rank[i] + 1
            same = i // size == j // size
            mask[b, i, j] = own <= rank[j] and hidden[j] if same else j > i
    return mask


@shapes
def test_replaced_token_detection(lengths, size, chunk, prepare, vocabulary):
    """ElectraForMaskedLM and ElectraForPreTraining, which own the embeddings together."""
    ours = prepare("replaced_token_detection", lengths, size, chunk, **ELECTRA)
    small = Theirs(ours, vocabulary, "generator")
    large = Theirs(ours, vocabulary, "discriminator")
    small.model.electra.embeddings = large.model.electra.embeddings
    small.model.generator_lm_head.weight = large.model.electra.embeddings.word_embeddings.weight
    original, length = framed(ours)
    generator = small(ours.examples.tokens, length, labels=cloze_labels(ours)).loss
    seen = sampled(ours)
    replaced = (seen != original) & (np.arange(size) < length[:, None])
    assert replaced.any()
    assert (ours.examples.corrupted & ~replaced).any()
    discriminator = large(seen, length, labels=replaced).loss
    loss = generator + 50 * discriminator
    loss.backward()
    own = {path.replace("head/", "generator_head/"): x for path, x in small.gradient().items()}
    own = {path.replace("encoder/", "generator/"): x for path, x in own.items()}
    own = {path: x for path, x in own.items() if "/embeddings/" not in path}
    terms = {"": loss, "generator": generator, "discriminator": discriminator}
    agree("replaced_token_detection", ours, terms, own | large.gradient())


def sampled(ours):
    """What the discriminator sees, [B, L], with padding as in the row."""
    describe = jax.vmap(
        lambda row, example: ours.objective.describe(
            ours.objective.model.apply, ours.params, row, example
        )
    )
    seen = np.asarray(jax.jit(describe)(ours.rows, ours.examples).tokens["discriminator sees"])
    return np.where(seen < 0, 0, seen)
