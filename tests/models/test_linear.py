"""Gradients of parameters are summed in float32, whatever the dtype of compute."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretraining.models.attention import Attention
from pretraining.models.heads import LanguageModelHead
from pretraining.models.linear import Dense, joint
from pretraining.models.transformer import Transformer
from pretraining.models.two_stream import TwoStream

ROWS = 4096


@pytest.fixture
def dense():
    return Dense((2, 3), dtype="bfloat16")


def test_small_addends_of_a_long_sum_are_not_lost(dense):
    """Row 0 adds 256 to every gradient, each other row 1/2: in 16 bits, where 256 + 1/2 is 256,
    the sum of the rows would depend on their order."""
    x = jnp.full((ROWS, 5), 0.5, jnp.bfloat16).at[0].set(256)
    params = {"kernel": jnp.ones((5, 2, 3)), "bias": jnp.zeros((2, 3))}
    gradient = jax.grad(lambda p: dense.apply({"params": p}, x).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(gradient["kernel"], 256 + (ROWS - 1) / 2)  # 13 bits
    np.testing.assert_array_equal(gradient["bias"], ROWS)
    assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype("float32")}


def test_a_head_is_the_same_to_its_table(make_config):
    config = make_config(
        vocabulary_size=3, width=5, heads=1, head_transform=False, dtype="bfloat16"
    )
    x = jnp.full((ROWS, 5), 0.5, jnp.bfloat16).at[0].set(256)
    params = {"params": {"bias": jnp.zeros(3)}}
    head = lambda table: LanguageModelHead(config).apply(params, x, table).sum()
    gradient = jax.grad(head)(jnp.ones((3, 5)))
    np.testing.assert_array_equal(gradient, np.full((3, 5), 256 + (ROWS - 1) / 2))


@pytest.mark.usefixtures("branch")
def test_in_32_bits_it_is_the_product_of_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(-8, 8, (7, 2, 3)), rng.integers(-8, 8, (7, 4))  # exact in float32
    kernel, module = rng.integers(-8, 8, (2, 3, 4)), Dense(4, axis=(-2, -1), dtype="float32")
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.ones(4)}
    out, transpose = jax.vjp(
        lambda p, x: module.apply({"params": p}, x), params, jnp.asarray(x, jnp.float32)
    )
    np.testing.assert_array_equal(out, np.einsum("bhd,hdf->bf", x, kernel) + 1)
    of_params, of_x = transpose(jnp.asarray(y, jnp.float32))
    np.testing.assert_array_equal(of_params["kernel"], np.einsum("bhd,bf->hdf", x, y))
    np.testing.assert_array_equal(of_params["bias"], y.sum(0))
    np.testing.assert_array_equal(of_x, np.einsum("bf,hdf->bhd", y, kernel))


class Three(nn.Module):
    """Three layers of one input, each by itself or in one product."""

    together: bool
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x):
        layers = [
            Dense((2, 3), use_bias=self.use_bias, dtype=self.dtype, name=name) for name in "abc"
        ]
        return joint(layers, x) if self.together else [layer(x) for layer in layers]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joint_layers_are_the_layers(use_bias, dtype):
    rng = np.random.default_rng(0)
    joined, single = (Three(together, use_bias, dtype) for together in (True, False))
    x = jnp.asarray(rng.integers(-8, 8, (4, 5, 7)), jnp.float32)  # exact in both dtypes
    params = single.init(jax.random.key(0), x)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), params, joined.init(jax.random.key(0), x)
    )
    assert all(jax.tree.leaves(same))
    params = jax.tree.map(lambda p: jnp.asarray(rng.integers(-3, 3, p.shape), jnp.float32), params)
    weights = jnp.asarray(rng.integers(-2, 3, (3, 4, 5, 2, 3)), dtype)
    loss = lambda module: lambda p, x: jnp.sum(jnp.stack(module.apply(p, x)) * weights)
    for a, b in zip(joined.apply(params, x), single.apply(params, x), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    gradients = [jax.grad(loss(module), (0, 1))(params, x) for module in (joined, single)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


B = 7  # no other size, nor a part of one


def sums_over_rows(jaxpr):
    """(name, dtype of the result) of what sums over rows, in inner programs too: over an axis of B,
    or of B x L where all rows are one line."""
    for equation in jaxpr.eqns:
        shape = equation.invars[0].aval.shape if equation.invars else ()
        if equation.primitive.name == "dot_general":
            axes = equation.params["dimension_numbers"][0][0]
        else:
            axes = equation.params.get("axes", ()) if "reduce" in equation.primitive.name else ()
        if any(shape[axis] % B == 0 for axis in axes):
            yield equation.primitive.name, equation.outvars[0].aval.dtype.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sums_over_rows(inner)


@pytest.mark.parametrize("network", [Transformer, TwoStream])
def test_no_gradient_is_summed_over_rows_in_16_bits(make_config, network):
    two = network is TwoStream
    config = make_config(dtype="bfloat16", **(dict(position="relative") if two else {}))
    module, tokens = network(config), jnp.zeros((B, 8), jnp.int32)
    more = dict(segments=tokens, backward=jnp.arange(B) < 2) if two else {}

    def loss(params):
        hidden = module.apply(params, tokens, Attention(), key=jax.random.key(0), **more)
        return jnp.sum(hidden.astype(jnp.float32))

    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, Attention(), **more))
    found = list(sums_over_rows(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    products, norms = 4 * 2, 2 * 2  # written twice, once for CPUs; scale and bias
    biases = 2 + 3 if two else 4  # of the feed-forward block, and of three scores or two products
    distances_and_segments = 2 + 1 if two else 0  # the distances of rows either way
    layer = products + norms + biases + distances_and_segments
    others = 1 + 2 + (not two)  # the loss, the norm of the embeddings, learned positions
    assert len(found) == 2 * layer + others
    assert {dtype for _, dtype in found} == {"float32"}
