"""Leakage: who influences whom, by gradient to the input embeddings.

A position influences another one exactly where the gradient of the second one's output to the first
one's embedding is not zero. The lists below say by hand who may influence whom, without the mask
that the model uses; the residual connection lets every position influence itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretraining.models import attention as attention_module
from pretraining.models import two_stream as two_stream_module
from pretraining.models.attention import Attention
from pretraining.models.transformer import Transformer
from pretraining.models.two_stream import TwoStream

DOCUMENT = [[0, 0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3, 5, 5]]
LENGTH = [8, 5]
# First come the positions that everybody sees, then the others one by one; the second row has two
# permutations, of which the first sees nothing of the second.
ORDER = [[(0, 2, 5, 7), (3,), (6,), (1,), (4,)], [(0, 3), (2,), (1,), (5, 6), (4,), (7,)]]
RANK = [[-1, 2, -1, 0, 3, -1, 1, -1], [-1, 1, 0, -1, 5, 4, 4, 6]]


def not_after(b, i, j):
    """Does j come before i in ORDER, or at the same time?"""
    first = next(group for group in ORDER[b] if i in group or j in group)
    return j in first


LEAKAGE = {
    "causal": (dict(causal=True), lambda b, i, j: j <= i),
    "bidirectional": (dict(), lambda b, i, j: True),
    "padded": (dict(length=LENGTH), lambda b, i, j: max(i, j) < LENGTH[b]),
    "per document": (dict(document=DOCUMENT), lambda b, i, j: DOCUMENT[b][i] == DOCUMENT[b][j]),
    "causal and padded": (
        dict(causal=True, length=LENGTH),
        lambda b, i, j: j <= i and i < LENGTH[b],
    ),
    "causal per document, padded": (
        dict(causal=True, length=LENGTH, document=DOCUMENT),
        lambda b, i, j: j <= i and i < LENGTH[b] and DOCUMENT[b][i] == DOCUMENT[b][j],
    ),
    "permutation": (dict(rank=RANK), not_after),
    "permutation per document, padded": (
        dict(rank=RANK, length=LENGTH, document=DOCUMENT),
        lambda b, i, j: (
            not_after(b, i, j) and max(i, j) < LENGTH[b] and DOCUMENT[b][i] == DOCUMENT[b][j]
        ),
    ),
}


@pytest.fixture
def influence(create):
    """influence(model, parts) -> [B, L, L] float: how (b, i) depends on the embedding at (b, j)."""
    return lambda model, parts: _influence(*create(model), parts)


def _influence(apply, params, parts):
    parts = {name: part if name == "causal" else jnp.array(part) for name, part in parts.items()}
    embedded = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 16)), jnp.float32)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(16,)), jnp.float32)

    def output(embedded):
        return apply(params, embedded, Attention(**parts), method="encode") @ direction

    jacobian = jax.jit(jax.jacrev(output))(embedded)  # [b, i, row, j, D]
    assert not jacobian[0, :, 1].any()  # rows are independent
    assert not jacobian[1, :, 0].any()
    return np.stack([np.linalg.norm(jacobian[b, :, b], axis=-1) for b in range(2)])


def check_influence(strength, allowed):
    for b, i, j in np.ndindex(2, 8, 8):
        expected = i == j or allowed(b, i, j)
        assert (strength[b, i, j] != 0) == expected, f"row {b}: {i} on {j}: {strength[b, i, j]}"


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
@pytest.mark.parametrize("case", LEAKAGE)
def test_leakage(influence, make_config, case, execution):
    parts, allowed = LEAKAGE[case]
    check_influence(influence(Transformer(make_config(execution=execution)), parts), allowed)


def test_leakage_of_a_modern_model(influence, make_config, modern):
    parts, allowed = LEAKAGE["causal per document, padded"]
    check_influence(influence(Transformer(make_config(**modern)), parts), allowed)


SABOTAGES = {
    "everything is visible": lambda mask: jnp.ones_like(mask),
    "one key further right": lambda mask: mask | jnp.roll(mask, 1, axis=-1).at[..., 0].set(False),
    "the first key is hidden": lambda mask: mask.at[..., 0].set(False),
    "directions are swapped": lambda mask: mask.swapaxes(-1, -2),
}
CAUGHT = [(case, sabotage) for case in LEAKAGE for sabotage in list(SABOTAGES)[:3]]
CAUGHT.remove(("bidirectional", "everything is visible"))  # as it should be
CAUGHT.remove(("bidirectional", "one key further right"))
CAUGHT += [("causal", "directions are swapped"), ("permutation", "directions are swapped")]


@pytest.mark.parametrize("case, sabotage", CAUGHT)
def test_leakage_goes_red_under_a_sabotaged_mask(
    influence, make_config, monkeypatch, case, sabotage
):
    parts, allowed = LEAKAGE[case]
    sabotage_mask(monkeypatch, sabotage)
    strength = influence(Transformer(make_config()), parts)
    with pytest.raises(AssertionError, match="row"):
        check_influence(strength, allowed)


# Two streams; where there is padding, the last position of row 1 is a part of it.
RELATIVE = dict(position="relative", embedding_norm=False)
POSITIONS = [[4, 1, 6], [2, 4, 7]]
PERMUTED = ["permutation", "permutation per document, padded"]


def strictly_before(b, i, j):
    return not_after(b, i, j) and not not_after(b, j, i)


@pytest.fixture
def query_influence(create):
    """query_influence(model, parts) -> [B, K, L]: how the query stream depends on the content."""

    def measure(model, parts):
        apply, params = create(model)
        parts = {name: jnp.array(part) for name, part in parts.items()}
        embedded = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 16)), jnp.float32)
        direction = jnp.asarray(np.random.default_rng(2).normal(size=(16,)), jnp.float32)

        def output(embedded):
            attention, positions = Attention(**parts), jnp.asarray(POSITIONS)
            query = apply(params, embedded, attention, positions, method="two_streams")[1]
            return query @ direction

        jacobian = jax.jit(jax.jacrev(output))(embedded)  # [b, k, row, j, D]
        return np.stack([np.linalg.norm(jacobian[b, :, b], axis=-1) for b in range(2)])

    return measure


def check_queries(strength, allowed):
    for b, k, j in np.ndindex(2, 3, 8):
        i = POSITIONS[b][k]
        expected = strictly_before(b, i, j) and allowed(b, i, j)
        assert (strength[b, k, j] != 0) == expected, f"row {b}: {i} on {j}: {strength[b, k, j]}"


@pytest.mark.parametrize("execution", ["unrolled", "scanned"])
@pytest.mark.parametrize("case", PERMUTED)
def test_leakage_of_two_streams(influence, query_influence, make_config, case, execution):
    parts, allowed = LEAKAGE[case]
    model = TwoStream(make_config(**RELATIVE, execution=execution))
    check_influence(influence(model, parts), allowed)
    check_queries(query_influence(model, parts), allowed)


STREAM_SABOTAGES = {
    "a query sees itself": lambda mask, rank, own: mask | (rank == own),
    "the order is turned round": lambda mask, rank, own: rank > own,
    "the context is hidden": lambda mask, rank, own: mask & (rank >= 0),
    "everything is visible": lambda mask, rank, own: jnp.ones_like(mask),
}


@pytest.mark.parametrize("sabotage", STREAM_SABOTAGES)
def test_leakage_of_the_query_stream_goes_red(query_influence, make_config, monkeypatch, sabotage):
    visible = two_stream_module.visible

    def sabotaged(attention, length, positions=None):
        mask = visible(attention, length, positions)
        if positions is None:
            return mask
        own = jnp.take_along_axis(attention.rank, positions, axis=1)[:, None, :, None]
        return STREAM_SABOTAGES[sabotage](mask, attention.rank[:, None, None], own)

    monkeypatch.setattr(two_stream_module, "visible", sabotaged)
    parts, allowed = LEAKAGE["permutation"]
    strength = query_influence(TwoStream(make_config(**RELATIVE)), parts)
    with pytest.raises(AssertionError, match="row"):
        check_queries(strength, allowed)


def sabotage_mask(monkeypatch, name):
    visible = attention_module.visible

    def sabotaged(attention, length):
        mask = visible(attention, length)
        mask = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
        return SABOTAGES[name](jnp.broadcast_to(mask, (*mask.shape[:2], length, length)))

    monkeypatch.setattr(attention_module, "visible", sabotaged)
