"""Keys come from (seed, name, step) alone."""

import jax
import numpy as np
import pytest

from pretraining import random


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_seed_that_a_program_is_given_is_the_seed_that_is_written_in_it(seed):
    """A run goes on with the masks that it had when seeds were constants of its program."""
    stream = lambda seed: jax.random.key_data(random.stream(seed, "dropout", 3))
    written, given = jax.jit(lambda: stream(seed))(), jax.jit(stream)(np.uint32(seed))
    np.testing.assert_array_equal(written, given)
    assert not np.array_equal(given, jax.jit(stream)(np.uint32(seed ^ 1)))
