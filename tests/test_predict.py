"""How much is computed at once."""

import collections
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from pretraining import predict

Model = collections.namedtuple("Model", "apply")


def test_never_more_answers_at_once_than_there_is_room_for(monkeypatch):
    """5 rows of 10 tokens at 4 answers a pass: positions 0-3 and 4-7 one row a pass, 8 and 9
    two rows; of 7 tokens, each hidden alone, 2 passes of 4."""
    monkeypatch.setattr(predict, "ANSWERS", 4)
    passes = []

    def log_probs(apply, params, example):
        passes.append(example[1].shape)
        asked = example[1].astype(jnp.float32)
        return jnp.broadcast_to(-asked[..., None], (*asked.shape, 7))

    objective = SimpleNamespace(
        query=lambda row, positions: (row.tokens, positions),
        log_probs=log_probs,
        model=Model(None),
        context="left",
    )
    rows = [predict.make_row(np.arange(10) % 7, np.zeros(10), 10) for _ in range(5)]
    for values in predict.log_likelihoods(objective, {}, rows, ()):
        np.testing.assert_array_equal(values, -np.arange(10))
    assert passes == [(1, 4), (2, 2)]  # the programs that were traced
    passes.clear()
    one_by_one = SimpleNamespace(**vars(objective) | {"context": "both"})
    (values,) = predict.log_likelihoods(one_by_one, {}, rows[:1], (0, 1, 2))
    np.testing.assert_array_equal(values, [0, 0, 0, -3, -4, -5, -6, 0, 0, 0])
    assert passes == [(4, 1)]
