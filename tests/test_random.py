"""Keys come from (seed, name, step) alone."""

import jax
import numpy as np
import pytest

from pretraining import config as config_lib
from pretraining import program, random, state
from pretraining.data import tokenizer

SMALL = {"model.layers": 1, "model.width": 16, "model.heads": 2, "tokenizer.size": 300}
SEEDS = {"init": 1, "corruption": 2, "dropout": 3, "evaluation": 4}


def load(**seeds):
    seeds = {f"seed.{name}": value for name, value in seeds.items()}
    return config_lib.without_epochs(config_lib.load("configs/masked_lm.py:tiny", SMALL | seeds))


def test_the_seeds_are_those_of_the_config():
    found = random.seeds(load(data=5, **SEEDS))._asdict()
    assert found == SEEDS
    assert {type(value) for value in found.values()} == {np.uint32}


def test_a_compiled_initialization_reads_the_seed_that_it_is_given():
    config, other = load(**SEEDS), load(init=6)
    built = program.build(other, tokenizer.stand_in(300), jax.devices()[:1])
    create = state.jit_init(built.objective, built.optimizer, other, built.mesh)
    found = create(random.seeds(config).init).params
    expected = jax.jit(lambda: state.init_params(built.objective, config))()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    table = lambda params: params["encoder"]["embeddings"]["token"]["embedding"]
    assert not np.array_equal(table(create(np.uint32(6)).params), table(expected))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_seed_that_a_program_is_given_is_the_seed_that_is_written_in_it(seed):
    """A run goes on with the masks that it had when seeds were constants of its program."""
    stream = lambda seed: jax.random.key_data(random.stream(seed, "dropout", 3))
    written, given = jax.jit(lambda: stream(seed))(), jax.jit(stream)(np.uint32(seed))
    np.testing.assert_array_equal(written, given)
    assert not np.array_equal(given, jax.jit(stream)(np.uint32(seed ^ 1)))
