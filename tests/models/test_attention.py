"""Attention: hand-made examples, numpy references, kernels against each other, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from pretraining.errors import UserError
from pretraining.models import attention as attention_module
from pretraining.models.attention import Attention, attend, check_kernel, rotary

LN3 = np.log(3.0)


def column(*values, width=1):
    """[1, L, 1, width]: the values in the first feature, zeros in the others."""
    out = np.zeros((1, len(values), 1, width), np.float32)
    out[0, :, 0, 0] = values
    return jnp.asarray(out)


def random_inputs(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]


def naive(query, key, value, sees):
    """One query at a time in float64; sees(b, i) lists the keys that query i of row b sees."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b, i, h in np.ndindex(query.shape[:3]):
        keys = sees(b, i)
        if keys:
            scores = np.array([query[b, i, h] @ key[b, j, h] for j in keys])
            weights = np.exp(scores / np.sqrt(query.shape[-1]))
            out[b, i, h] = weights @ value[b, keys, h] / weights.sum()
    return out


def test_hand_computed_attention():
    # Width 4 halves the products, so query 1 weighs the keys exp(0) : exp(ln 3) = 1 : 3.
    query, key = column(0, 2 * LN3, width=4), column(0, 1, width=4)
    value = column(1, 5, width=4)
    both = attend(query, key, value, Attention(), kernel="xla")[0, :, 0, 0]
    np.testing.assert_allclose(both, [3, 4], rtol=1e-6)
    causal = attend(query, key, value, Attention(causal=True), kernel="xla")[0, :, 0, 0]
    np.testing.assert_allclose(causal, [1, 4], rtol=1e-6)
    first = attend(query, key, value, Attention(length=jnp.array([1])), kernel="xla")[0, :, 0, 0]
    np.testing.assert_allclose(first, [1, 0], rtol=1e-6)
    alone = Attention(document=jnp.array([[0, 1]]))
    apart = attend(query, key, value, alone, kernel="xla")[0, :, 0, 0]
    np.testing.assert_allclose(apart, [1, 5], rtol=1e-6)


DOCUMENT = [[0, 0, 0, 0, 1, 1, 2, 2], [4, 4, 7, 7, 7, 7, 7, 7], [0, 0, 0, 0, 0, 0, 0, 0]]
LENGTH = [8, 5, 0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", ["", "length", "document", "length document"])
def test_xla_against_a_double_loop(causal, parts):
    document = jnp.array(DOCUMENT) if "document" in parts else None
    length = jnp.array(LENGTH) if "length" in parts else None

    def sees(b, i):
        end = LENGTH[b] if "length" in parts else 8
        keys = range(i + 1) if causal else range(8)
        same = [j for j in keys if "document" not in parts or DOCUMENT[b][i] == DOCUMENT[b][j]]
        return [j for j in same if i < end and j < end]

    inputs = random_inputs((3, 8, 2, 4))
    out = attend(*inputs, Attention(causal, length, document), kernel="xla")
    np.testing.assert_allclose(out, naive(*inputs, sees), rtol=2e-5, atol=2e-6)


def test_a_row_without_tokens_is_zero_and_its_gradient_finite():
    inputs = random_inputs((2, 4, 1, 4))
    attention = Attention(causal=True, length=jnp.array([0, 2]), document=jnp.zeros((2, 4), int))

    def total(*inputs):
        return jnp.sum(attend(*inputs, attention, kernel="xla") ** 2)

    out = attend(*inputs, attention, kernel="xla")
    np.testing.assert_array_equal(out[0], 0)
    assert np.abs(out[1, :2]).min() > 0
    for gradient in jax.jit(jax.grad(total, (0, 1, 2)))(*inputs):
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.isfinite(gradient).all()


def test_the_softmax_is_float32_in_16_bit_compute():
    inputs = [jax.ShapeDtypeStruct((1, 4, 1, 4), jnp.bfloat16)] * 3
    jaxpr = jax.make_jaxpr(lambda *x: attend(*x, Attention(causal=True), kernel="xla"))(*inputs)
    equations = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name in ("exp", "div")]
    assert {"exp", "div"} == {e.primitive.name for e in equations}
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in equations)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_16_bit_attention_is_close_to_the_exact_one():
    inputs = random_inputs((2, 64, 2, 16), jnp.bfloat16)
    out = attend(*inputs, Attention(), kernel="xla")
    exact = naive(*inputs, lambda b, i: list(range(64)))
    # bfloat16 keeps 8 bits: a probability, a value and the result are each rounded by up to 2^-9.
    assert np.abs(np.asarray(out, np.float64) - exact).max() < 3 * 2**-9 * np.abs(exact).max()


# Rotary positions.


def test_rotary_turns_the_first_pair_by_the_position_in_radians():
    x = jnp.zeros((1, 3, 1, 4)).at[..., 0].set(1.0)
    expected = [[np.cos(p), 0, np.sin(p), 0] for p in range(3)]
    np.testing.assert_allclose(rotary(x)[0, :, 0], expected, atol=1e-6)


def test_rotary_against_complex_numbers():
    (x, _, _) = random_inputs((2, 7, 3, 8))
    pairs = np.asarray(x, np.float64)[..., :4] + 1j * np.asarray(x, np.float64)[..., 4:]
    angle = np.arange(7)[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = pairs * np.exp(1j * angle)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotary(x), expected, atol=2e-6)


def test_rotary_scores_depend_on_the_distance_only():
    query, key, _ = random_inputs((1, 1, 1, 8))
    query, key = (rotary(jnp.tile(x, (1, 6, 1, 1)))[0, :, 0] for x in (query, key))
    scores = np.asarray(query @ key.T)
    for distance in range(-5, 6):
        np.testing.assert_allclose(np.diag(scores, distance), np.diag(scores, distance)[0], 1e-4)
    assert np.ptp(scores[0]) > 0.1


def test_attention_dropout_acts_on_probabilities():
    length = 64
    zeros = jnp.zeros((8, length, 4, length))
    identity = jnp.broadcast_to(jnp.eye(length)[None, :, None], zeros.shape)
    run = functools.partial(attend, zeros, zeros, identity, Attention(), kernel="xla")
    probabilities = np.asarray(run(dropout_rate=0.1, dropout_key=jax.random.key(0)))
    met = 0.1
    low, high = stats.binom.ppf([0.5e-9, 1 - 0.5e-9], probabilities.size, met)
    assert low <= (probabilities == 0).sum() <= high
    kept = probabilities[probabilities != 0]
    np.testing.assert_allclose(kept, 1 / length / (1 - met), rtol=1e-5)
    np.testing.assert_allclose(run(dropout_rate=0.1), 1 / length, rtol=1e-6)


# Kernels.


def test_cudnn_is_given_the_same_description(monkeypatch):
    """JAX's own attention in its XLA form stands in for the GPU's."""
    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, implementation, **k: original(*a, implementation="xla", **k),
    )
    inputs = random_inputs((3, 8, 2, 8), jnp.bfloat16)
    for causal in (False, True):
        for length in (None, jnp.array(LENGTH)):
            attention = Attention(causal, length)
            with jax.numpy_dtype_promotion("standard"):  # JAX's own function needs it
                out = attend(*inputs, attention, kernel="cudnn").astype(jnp.float32)
            expected = attend(*inputs, attention, kernel="xla").astype(jnp.float32)
            np.testing.assert_allclose(out, expected, atol=0.02)


@pytest.fixture
def interpreted_splash(monkeypatch):
    make = splash_attention.make_splash_mha_single_device
    monkeypatch.setattr(
        splash_attention, "make_splash_mha_single_device", functools.partial(make, interpret=True)
    )


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("causal", [False, True])
def test_splash_computes_what_xla_does(causal):
    inputs = random_inputs((2, 128, 2, 16))
    document = jnp.repeat(jnp.array([[3, 1, 2, 0], [5, 5, 5, 9]]), 32, axis=1)
    for attention in (
        Attention(causal),
        Attention(causal, length=jnp.array([100, 0])),
        Attention(causal, length=jnp.array([128, 77]), document=document),
    ):
        out = attend(*inputs, attention, kernel="splash")
        expected = attend(*inputs, attention, kernel="xla")
        np.testing.assert_allclose(out, expected, atol=1e-5)


def splash_gradient(query, key, value, length, document):
    attention = Attention(True, length, document)
    total = lambda *x: jnp.sum(attend(*x, attention, kernel="splash").astype(jnp.float32))
    return jax.grad(total, (0, 1, 2))(query, key, value)


def test_splash_lowers_for_a_tpu_forward_and_backward():
    arrays = [jax.ShapeDtypeStruct((2, 384, 2, 64), jnp.bfloat16)] * 3
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 384))]
    exported = jax.export.export(jax.jit(splash_gradient), platforms=["tpu"])(*arrays, *integers)
    assert exported.mlir_module().count("tpu_custom_call") == 3  # forward, dq, dkv


def test_splash_lowers_for_a_mesh_of_tpus():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    array = jax.ShapeDtypeStruct((4, 128, 2, 64), jnp.bfloat16, sharding=split)
    length = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=rows)
    document = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(splash_gradient), platforms=["tpu"])(
            array, array, array, length, document
        )
    assert exported.nr_devices == 8
    # Each device runs the kernel on its own row and head.
    assert "tensor<1x1x128x64xbf16>" in exported.mlir_module()


REFUSED = {
    "unknown kernel": (dict(kernel="flash"), "is not one of xla, cudnn, splash"),
    "cudnn dropout": (dict(kernel="cudnn", dropout_rate=0.1), "config.model.attention_dropout=0.1"),
    "cudnn float32": (dict(kernel="cudnn", dtype="float32"), "config.model.dtype='float32'"),
    "cudnn documents": (dict(kernel="cudnn", by_document=True), "config.model.document_attention"),
    "cudnn width": (dict(kernel="cudnn", head_width=12), "config.model.heads = 12"),
    "cudnn wide": (dict(kernel="cudnn", head_width=512), "config.model.heads = 512"),
    "cudnn platform": (dict(kernel="cudnn", platform="tpu"), "platform 'tpu'"),
    "splash dropout": (
        dict(kernel="splash", dropout_rate=0.1),
        "config.model.attention_dropout=0.1",
    ),
    "splash length": (dict(kernel="splash", sequence_length=192), "sequence length is 192"),
    "splash platform": (dict(kernel="splash", platform="cpu"), "platform 'cpu'"),
}
SERVED = dict(
    dtype="bfloat16", dropout_rate=0.0, by_document=False, head_width=64, sequence_length=128
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_kernel_cannot_serve_is_refused(case):
    change, reason = REFUSED[case]
    arguments = SERVED | change
    with pytest.raises(UserError) as error:
        check_kernel(**arguments)
    message = str(error.value)
    assert f"config.model.attention='{arguments['kernel']}'" in message
    assert reason in message
    assert "\n" not in message


def test_what_a_kernel_can_serve_is_not_refused():
    check_kernel("cudnn", **SERVED, platform="gpu")
    check_kernel("splash", **SERVED, platform="tpu")
    check_kernel("splash", **(SERVED | dict(dtype="float32", by_document=True)))
    worst = dict(dtype="float32", dropout_rate=0.1, by_document=True, head_width=5)
    check_kernel("xla", **worst, sequence_length=7, platform="cpu")


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_attend_refuses_dropout_and_documents(kernel, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    inputs = random_inputs((1, 128, 1, 8), jnp.bfloat16)
    key = jax.random.key(0)
    with pytest.raises(UserError, match="attention_dropout"):
        attend(*inputs, Attention(), kernel=kernel, dropout_rate=0.1, dropout_key=key)
    by_document = Attention(document=jnp.zeros((1, 128), jnp.int32))
    if kernel == "cudnn":
        with pytest.raises(UserError, match="document_attention"):
            attend(*inputs, by_document, kernel=kernel)


def test_cudnn_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="platform 'cpu'"):
        attend(*random_inputs((1, 8, 1, 8), jnp.bfloat16), Attention(), kernel="cudnn")


def test_the_description_travels_through_jit_with_its_static_part():
    attention = Attention(causal=True, length=jnp.array([2]))
    assert len(jax.tree.leaves(attention)) == 1
    assert jax.jit(lambda a: jnp.asarray(a.causal))(attention)
    assert attention_module.Attention().length is None
