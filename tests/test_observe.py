"""What is taken from a network, of a stub that keeps known probabilities."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretraining import observe, predict
from pretraining.errors import UserError
from pretraining.models.transformer import WATCHED

Model = collections.namedtuple("Model", "apply")
Objective = collections.namedtuple("Objective", "query encode model")
Example = collections.namedtuple("Example", "tokens length")
L = 64


def objective(query):
    def apply(variables, mutable):
        kept = jnp.arange(2 * L * L, dtype=jnp.float32).reshape(1, 2, L, L)
        layers = {f"layer_{n}": {"attention": {"probabilities": (kept + n,)}} for n in range(3)}
        return None, {WATCHED: {"encoder": layers}}

    encode = lambda apply, params, example: apply({"params": params})
    return Objective(query, encode, Model(apply))


def test_a_short_text_takes_no_matrix_of_a_whole_row(monkeypatch):
    """5 tokens of 64: layers of 16 x 16 are fetched, of which 5 x 5 are the text's."""
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    row = predict.make_row([7, 8, 9, 8, 7], np.zeros(5), L)
    made = objective(lambda row, positions: Example(row.tokens, row.length))
    tokens, probabilities = observe.attention(made, {}, row)
    assert tokens.tolist() == [7, 8, 9, 8, 7]
    assert [leaf.shape for leaf in jax.tree.leaves(fetched)] == [(2, 16, 16)] * 3
    assert probabilities.shape == (3, 2, 5, 5)
    assert probabilities[2, 1, 4, 3] == L * L + 4 * L + 3 + 2


def test_examples_without_tokens_are_refused():
    row = predict.make_row([7], np.zeros(1), L)
    with pytest.raises(UserError, match="examples have no tokens or no length"):
        observe.attention(objective(lambda row, positions: (row.tokens,)), {}, row)
