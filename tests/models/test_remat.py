"""What each `config.model.remat` keeps for the backward pass of a layer."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax._src.ad_checkpoint import saved_residuals

from pretraining.models.attention import Attention
from pretraining.models.transformer import Block, run_blocks
from pretraining.models.two_stream import Relations, RelativeBlock, distance_encoding

B, L, K, D = 3, 8, 5, 16


def kept(block, hidden, read):
    """{shape: how many} of the residuals of a layer that are not among its arguments."""
    params = block.init(jax.random.key(0), hidden, read)

    def run(params, hidden):
        return jax.tree.leaves(run_blocks([block.bind(params)], hidden, read)[-1])

    found = saved_residuals(run, params, hidden)
    return collections.Counter(x.shape for x, source in found if "argument" not in source)


@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_outputs_of_both_sub_layers_and_nothing_else(make_config, norm_order):
    hidden = jnp.ones((B, L, D))
    count = lambda remat: kept(
        Block(make_config(norm_order=norm_order, remat=remat)), hidden, Attention(causal=True)
    )
    # What is only added to the sum that leaves the layer need not be known.
    assert count("outputs") == {(B, L, D): 2 if norm_order == "post" else 1}
    assert count("full") == {}
    assert sum(count("none").values()) > 20


def test_outputs_of_two_streams(make_config):
    streams = jnp.ones((B, L, D)), jnp.ones((B, K, D))
    positions = jnp.zeros((B, K), jnp.int32)
    encoding = jnp.asarray(distance_encoding(L, D))
    read = Relations(Attention(rank=jnp.zeros((B, L), jnp.int32)), encoding, positions=positions)
    config = make_config(position="relative", remat="outputs")
    found = kept(RelativeBlock(config), streams, read)
    assert (found[B, L, D], found[B, K, D]) == (2, 2)
