"""A small vocabulary, rows, configs and exact binomial bounds for the tests of objectives."""

import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pretraining.data.row import SENTENCE_START, SPECIAL_POSITIONS, WORD_START, Row

V = 64
FIRST_TEXT_ID = 5


@pytest.fixture(scope="session")
def vocabulary():
    """64 ids, of which 5 are special: pad, unk, bos = cls, eos = sep, mask."""
    counts = np.arange(V) ** 2
    counts[[0, 2, 4]] = 0
    return SimpleNamespace(
        size=V,
        pad=0,
        unk=1,
        bos=2,
        eos=3,
        cls=2,
        sep=3,
        mask=4,
        special_ids=(0, 1, 2, 3, 4),
        word_start=np.arange(V) % 3 != 0,
        bytes_per_id=np.where(np.arange(V) < FIRST_TEXT_ID, 0, np.arange(V) % 5 + 1),
        unigram_counts=counts,
    )


@pytest.fixture(scope="session")
def make_config():
    """(name, **{"section.key": value}) -> the recipe `tiny` of that name, made tinier."""

    def make(name, **overrides):
        config = importlib.import_module(f"configs.{name}").get_config("tiny")
        smallest = {
            "model.layers": 1,
            "model.width": 16,
            "model.heads": 2,
            "model.mlp_width": 32,
            "data.sequence_length": 35,
            "train.steps": 100,
        }
        config.update_from_flattened_dict(smallest | overrides)
        return config

    return make


@pytest.fixture(scope="session")
def make_rows():
    """(config, lengths, seed, index) -> a batch of rows of random text.

    About 1 token in 12 is a separator; what stands beyond the length looks like text.
    """

    def make(config, lengths, seed=0, separators=True):
        rng = np.random.default_rng(seed)
        shape = len(lengths), config.data.sequence_length - SPECIAL_POSITIONS
        tokens = rng.integers(FIRST_TEXT_ID, V, shape)
        if separators:
            tokens = np.where(rng.random(shape) < 1 / 12, 3, tokens)
        ends = np.pad(tokens == 3, ((0, 0), (1, 0)))[:, :-1]
        boundary = np.where(rng.random(shape) < 0.7, WORD_START, 0) | ends * SENTENCE_START
        return Row(
            tokens=jnp.asarray(tokens, jnp.int32),
            length=jnp.asarray(lengths, jnp.int32),
            document=jnp.asarray(np.cumsum(ends, axis=1), jnp.int32),
            boundary=jnp.asarray(boundary, jnp.uint8),
            index=jnp.arange(len(lengths), dtype=jnp.int32),
            copy=jnp.zeros(len(lengths), jnp.int32),
        )

    return make


@pytest.fixture(scope="session")
def corrupt():
    """(objective, rows, seed, knobs) -> the examples of a batch, jitted; None = knobs of step 0."""

    def apply(objective, rows, seed=0, knobs=None):
        knobs = objective.schedule(jnp.zeros((), jnp.int32)) if knobs is None else knobs
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows.index)
        return compiled(objective.corrupt)(keys, rows, knobs)

    @functools.cache
    def compiled(corrupt):
        return jax.jit(jax.vmap(corrupt, (0, 0, None)))

    return apply


@pytest.fixture(scope="session")
def init():
    """(objective, examples, seed) -> parameters."""
    compiled = functools.cache(lambda model: jax.jit(model.init))
    return lambda objective, examples, seed=0: compiled(objective.model)(
        jax.random.key(seed), examples
    )["params"]


@pytest.fixture(scope="session")
def terms():
    """(objective, params, examples, knobs, key, train) -> the terms of the loss, jitted."""

    @functools.cache
    def compiled(loss, model, train):
        return jax.jit(
            lambda params, examples, knobs, key: loss(
                model.apply, params, examples, knobs, key, train
            )
        )

    def apply(objective, params, examples, knobs=None, key=None, train=False):
        run = compiled(objective.loss, objective.model, train)
        return run(params, examples, {} if knobs is None else knobs, key)

    return apply


@pytest.fixture(scope="session")
def total():
    """{name: Term} -> the loss, as the contract defines it, of one batch."""

    def loss(terms):
        value = jnp.zeros(())
        for term in terms.values():
            denominator = term.weight + term.smooth
            mean = term.sum / jnp.where(denominator == 0, 1.0, denominator)
            value += term.scale * jnp.where(denominator == 0, 0.0, mean)
        return value

    return loss


@pytest.fixture(scope="session")
def assert_binomial():
    """Fails if `successes` of `trials` is outside what probability p gives but once in 10^9."""

    def check(successes, trials, p, alarm=1e-9):
        low = scipy.stats.binom.ppf(alarm / 2, trials, p)
        high = scipy.stats.binom.isf(alarm / 2, trials, p)
        successes = int(successes)
        assert low <= successes <= high, f"{successes} of {trials} not in [{low}, {high}] ({p=})"

    return check
