"""The two-stream network: one query at a time in numpy, executions, parameters, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from configs import base
from pretraining.errors import UserError
from pretraining.models.attention import Attention, attend
from pretraining.models.transformer import Transformer, TransformerConfig
from pretraining.models.two_stream import (
    Relations,
    RelativeAttention,
    TwoStream,
    distance_encoding,
    shift,
)

XLNET = dict(position="relative", embedding_norm=False, head_transform=False)
RANK = [[-1, 3, -1, 0, 5, -1, 1, -1], [-1, 1, 0, -1, 6, 4, 4, 5]]
LENGTH = [8, 6]
DOCUMENT = [[0, 0, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2, 2]]
SEGMENTS = [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0]]
BACKWARD = [False, True]
POSITIONS = [[4, 1, 6], [2, 4, 1]]


@pytest.fixture
def make(make_config):
    return lambda **changes: make_config(**(XLNET | changes))


# -------------------------------------------------------------------------------------- attention


def naive(params, streams, sees, rows, backward, segments):
    """One query at a time in float64: scores from the distance itself, no table, no shift."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    content, stream = (np.asarray(x, np.float64) for x in streams)
    width = stream.shape[-1]
    frequency = 10_000.0 ** (-2 * np.arange(width // 2) / width)
    out = np.zeros(stream.shape)
    for b, r in np.ndindex(stream.shape[:2]):
        i = rows[b][r]
        keys = [j for j in range(content.shape[1]) if sees(b, i, j)]
        for h in range(p["content_bias"].shape[0]) if keys else ():
            q = stream[b, r] @ p["query"]["kernel"][:, h]
            scores = []
            for j in keys:
                angle = (j - i if backward[b] else i - j) * frequency
                where = np.concatenate([np.sin(angle), np.cos(angle)])
                kind = int(segments[b][i] != segments[b][j])
                score = (q + p["content_bias"][h]) @ (content[b, j] @ p["key"]["kernel"][:, h])
                score += (q + p["position_bias"][h]) @ (where @ p["position"]["kernel"][:, h])
                score += (q + p["segment_bias"][h]) @ p["segment_embedding"][kind, h]
                scores.append(score / math.sqrt(q.shape[0]))
            weights = np.exp(np.array(scores) - max(scores))
            values = content[b, keys] @ p["value"]["kernel"][:, h]
            out[b, r] += weights / weights.sum() @ values @ p["out"]["kernel"][h]
    return out


def sees_content(b, i, j):
    return RANK[b][j] <= RANK[b][i] and visible_at_all(b, i, j)


def sees_query(b, i, j):
    return RANK[b][j] < RANK[b][i] and visible_at_all(b, i, j)


def visible_at_all(b, i, j):
    return max(i, j) < LENGTH[b] and DOCUMENT[b][i] == DOCUMENT[b][j]


def random_streams():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(2, n, 16)), jnp.float32) for n in (8, 3)]


def relations(**changes):
    parts = dict(
        attention=Attention(False, *map(jnp.asarray, (LENGTH, DOCUMENT, RANK))),
        encoding=jnp.asarray(distance_encoding(8, 16)),
        segments=jnp.asarray(SEGMENTS),
        backward=jnp.asarray(BACKWARD),
        positions=jnp.asarray(POSITIONS),
    )
    return Relations(**(parts | changes))


def draw(module, *arguments):
    """Parameters of which none is without effect."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)


@pytest.mark.parametrize("backward", [BACKWARD, [False, False]])
@pytest.mark.parametrize("segments", [SEGMENTS, None])
def test_both_streams_against_a_double_loop(make, backward, segments):
    module, streams = RelativeAttention(make()), random_streams()
    described = relations(
        backward=jnp.asarray(backward) if any(backward) else None,
        segments=None if segments is None else jnp.asarray(segments),
    )
    params = draw(module, streams, described)
    content, query = jax.jit(module.apply)({"params": params}, streams, described)
    same = segments or [[0] * 8] * 2
    everywhere = [range(8)] * 2
    expected = naive(params, [streams[0]] * 2, sees_content, everywhere, backward, same)
    np.testing.assert_allclose(content, expected, rtol=2e-4, atol=2e-5)
    expected = naive(params, streams, sees_query, POSITIONS, backward, same)
    np.testing.assert_allclose(query, expected, rtol=2e-4, atol=2e-5)


def test_a_reversed_row_is_the_row_read_from_its_end(make, drawn, tokens):
    """Distances are negated, so that reversing everything changes nothing."""
    apply = jax.jit(TwoStream(make()).apply)
    run = lambda tokens, backward: apply(
        {"params": drawn}, tokens, Attention(), backward=jnp.asarray([backward] * 2)
    )
    forward = run(tokens, False)
    np.testing.assert_allclose(run(tokens[:, ::-1], True)[:, ::-1], forward, atol=1e-5)
    assert np.abs(run(tokens[:, ::-1], False)[:, ::-1] - forward).max() > 0.1


def test_a_query_that_sees_nothing_gets_nothing(make):
    """Every token is a target: what is first in the order is guessed from nothing."""
    module, streams = RelativeAttention(make()), random_streams()
    rank = jnp.asarray([[3, 1, 0, 2, 7, 6, 5, 4]] * 2)
    described = relations(attention=Attention(rank=rank), positions=jnp.asarray([[2, 1, 4]] * 2))
    params = draw(module, streams, described)

    @jax.jit
    def query(content):
        return module.apply({"params": params}, (content, streams[1]), described)[1]

    np.testing.assert_array_equal(query(streams[0])[:, 0], 0)
    gradient = jax.grad(lambda content: query(content)[:, 0].sum())(streams[0])
    np.testing.assert_array_equal(gradient, 0)
    assert (np.abs(query(streams[0])[:, 1:]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("parts", ["", "length", "length document"])
def test_attend_serves_the_rank_of_the_content_stream(parts):
    inputs = [jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(3, 2, 8, 1, 4))]
    inputs = [x.astype(jnp.float32) for x in inputs]
    length = jnp.asarray(LENGTH) if "length" in parts else None
    document = jnp.asarray(DOCUMENT) if "document" in parts else None
    attention = Attention(False, length, document, jnp.asarray(RANK))
    out = attend(*inputs, attention, kernel="xla")
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in inputs)
    for b, i in np.ndindex(2, 8):
        end = LENGTH[b] if "length" in parts else 8
        keys = [j for j in range(end) if RANK[b][j] <= RANK[b][i]]
        keys = [j for j in keys if "document" not in parts or DOCUMENT[b][i] == DOCUMENT[b][j]]
        weights = np.exp(k[b, keys] @ q[b, i] / 2)
        expected = weights @ v[b, keys] / weights.sum() if i < end else np.zeros(4)
        np.testing.assert_allclose(out[b, i, 0], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- network


@pytest.fixture
def drawn(make, create):
    return create(TwoStream(make()))[1]


@pytest.fixture
def both(tokens):
    """(module, params, key) -> the two streams."""

    @functools.cache
    def compiled(module):
        return jax.jit(lambda params, key: _both(module, params, tokens, key))

    return lambda module, params, key=None: compiled(module)(params, key)


def _both(module, params, tokens, key):
    described = relations()
    embedded = params["embeddings"]["token"]["embedding"][tokens].astype(module.config.dtype)
    return module.apply(
        {"params": params},
        embedded,
        described.attention,
        described.positions,
        described.segments,
        key,
        described.backward,
        method="two_streams",
    )


def test_every_execution_gives_the_same(make, drawn, tokens):
    """With the same dropout."""

    def run(**changes):
        module = TwoStream(make(dropout=0.2, attention_dropout=0.2, **changes))

        def total(params):
            streams = _both(module, params, tokens, jax.random.key(0))
            return sum(jnp.sum(jnp.sin(x)) for x in streams), streams

        (_, streams), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(drawn)
        return streams, ravel_pytree(gradient)[0]

    reference, expected = run()
    for changes in (dict(execution="scanned", remat="outputs"), dict(remat="full")):
        streams, gradient = run(**changes)
        for a, b in zip(streams, reference, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
def test_all_layers_end_with_the_output(make, drawn, tokens, execution):
    module = TwoStream(make(execution=execution))
    run = lambda **k: jax.jit(lambda p: module.apply({"params": p}, tokens, Attention(), **k))(
        drawn
    )
    layers = run(all_layers=True)
    assert [layer.shape for layer in layers] == [(2, 8, 16)] * 3
    np.testing.assert_array_equal(layers[0], drawn["embeddings"]["token"]["embedding"][tokens])
    np.testing.assert_allclose(layers[-1], run(), atol=1e-6)
    one = jax.jit(TwoStream(make(layers=1)).apply)({"params": drawn}, tokens, Attention())
    np.testing.assert_allclose(layers[1], one, atol=1e-5)


def test_the_query_stream_begins_with_the_mask_embedding(make, drawn, both):
    module = TwoStream(make())
    streams = both(module, drawn)
    others = both(module, drawn | {"mask_embedding": -drawn["mask_embedding"]})
    np.testing.assert_array_equal(streams[0], others[0])
    assert (np.abs(streams[1] - others[1]).max(axis=-1) > 0.1).all()


@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_dropout_follows_the_key(make, drawn, both, where):
    rates = dict(dropout=0.0, attention_dropout=0.0) | {where: 0.3}
    module = TwoStream(make(**rates))
    keys = [None, jax.random.key(0), jax.random.key(1), jax.random.key(0)]
    without, first, second, again = (both(module, drawn, key) for key in keys)
    for stream in range(2):
        assert (first[stream] != second[stream]).any()
        assert (first[stream] != without[stream]).any()
        np.testing.assert_array_equal(first[stream], again[stream])


def test_16_bit_compute_is_close(make, drawn, both):
    exact = both(TwoStream(make()), drawn)
    streams = both(TwoStream(make(dtype="bfloat16")), drawn)
    for stream, reference in zip(streams, exact, strict=True):
        assert stream.dtype == jnp.bfloat16
        # LayerNorm's outputs are about 1, of 8 bits, after 4 rounded sub-layers.
        assert np.abs(np.asarray(stream, np.float32) - reference).mean() < 0.02


# ------------------------------------------------------------------------------------- parameters


SIZES = {
    "base": (dict(layers=12, width=768, heads=12, mlp_width=3072), 116_718_336),
    "large": (dict(layers=24, width=1024, heads=16, mlp_width=4096), 360_268_800),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_equal_the_published_ones(size):
    changes, expected = SIZES[size]
    config = TransformerConfig.create(base.model() | XLNET | changes, 32_000, 512)
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(TwoStream(config).init, jax.random.key(0), tokens, Attention())
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
def test_names_and_shapes_of_parameters(make, execution):
    tokens = jnp.zeros((1, 8), jnp.int32)
    init = TwoStream(make(execution=execution)).init
    leaves = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(init, jax.random.key(0), tokens, Attention())["params"]
    )
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}
    attention = {
        **{f"{name}/kernel": (16, 2, 8) for name in ("query", "key", "value", "position")},
        "out/kernel": (2, 8, 16),
        **{f"{name}_bias": (2, 8) for name in ("content", "position", "segment")},
        "segment_embedding": (2, 2, 8),
    }
    layer = {f"attention/{name}": shape for name, shape in attention.items()} | {
        "attention_norm/scale": (16,),
        "attention_norm/bias": (16,),
        "mlp/up/kernel": (16, 32),
        "mlp/up/bias": (32,),
        "mlp/down/kernel": (32, 16),
        "mlp/down/bias": (16,),
        "mlp_norm/scale": (16,),
        "mlp_norm/bias": (16,),
    }
    assert shapes == {
        "embeddings/token/embedding": (50, 16),
        "mask_embedding": (16,),
        **{f"layer_{n}/{name}": shape for n in range(2) for name, shape in layer.items()},
    }


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(position="learned"), "config.model.position='learned': .* must be 'relative'"),
        (dict(norm_order="pre"), "config.model.norm_order='pre': .* must be 'post'"),
        (dict(segments=2), "config.model.segments=2: .* must be 0"),
        (dict(embedding_width=8), "config.model.embedding_width=8: .* config.model.width=16"),
        (dict(width=15, heads=3), "config.model.width=15: .* must be even"),
    ],
)
def test_what_has_no_place_is_refused(make, changes, message):
    with pytest.raises(UserError, match=message):
        TwoStream(make(**changes)).init(
            jax.random.key(0), jnp.zeros((1, 8), jnp.int32), Attention()
        )


def test_what_has_a_place_is_served(make, create, tokens):
    config = make(gated=True, norm="rmsnorm", bias=False, embedding_norm=True, activation="silu")
    apply, params = create(TwoStream(config))
    assert {"gate", "up", "down"} == set(params["layer_0"]["mlp"])
    assert np.isfinite(jax.jit(apply)(params, tokens, Attention())).all()


def test_a_transformer_refuses_relative_positions(make):
    with pytest.raises(UserError, match="config.model.position='relative'"):
        Transformer(make()).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), Attention())


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_fused_kernels_are_refused(make, kernel):
    rates = dict(dtype="bfloat16", attention_dropout=0.0, sequence_length=128)
    with pytest.raises(UserError, match=f"attention='{kernel}' has no relative positions"):
        make(attention=kernel, **rates)
    inputs = [jnp.zeros((2, 128, 1, 8), jnp.bfloat16)] * 3
    attention = Attention(rank=jnp.zeros((2, 128), jnp.int32))
    with pytest.raises(UserError, match=f"attention='{kernel}' has no order of prediction"):
        attend(*inputs, attention, kernel=kernel)


def test_shift_and_its_gradient_against_loops():
    """Row i of L = 5 wants entry L - 1 - i + m for key m, and sends its gradient back there."""
    length = 5
    scores = np.random.default_rng(0).normal(size=(2, 3, length, 2 * length - 1))
    weights = np.random.default_rng(1).normal(size=(2, 3, length, length))
    wanted, gradient = np.zeros_like(weights), np.zeros_like(scores)
    for i in range(length):
        for m in range(length):
            wanted[..., i, m] = scores[..., i, length - 1 - i + m]
            gradient[..., i, length - 1 - i + m] = weights[..., i, m]
    found, back = jax.vjp(shift, jnp.asarray(scores, jnp.float32))
    np.testing.assert_array_equal(found, np.float32(wanted))
    np.testing.assert_array_equal(back(jnp.asarray(weights, jnp.float32))[0], np.float32(gradient))
