"""An objective that goes wrong where it is told to, around any other one.

Written into a folder on the Python path: `objectives/faulty.py` and `configs/faulty.py`.
"""

from tests.faults.bench import Bench

OBJECTIVE = '''"""Another objective, whose loss is multiplied at one update, or for one row."""

import importlib

import jax.numpy as jnp

FACTORS = {"nan": float("nan"), "spike": 50.0}


def build(config, vocabulary):
    chosen = config.objective
    inner = importlib.import_module(f"objectives.{chosen.wraps}").build(config, vocabulary)
    factor = FACTORS[chosen.fault]
    culprit = jnp.asarray(chosen.culprit, jnp.int32)

    def schedule(step):
        update = jnp.asarray(step) + 1
        hit = (update >= chosen.first) & (update <= chosen.last)
        return inner.schedule(step) | {"factor": jnp.where(hit, factor, 1.0)}

    def corrupt(key, row, knobs):
        example = inner.corrupt(key, row, knobs)
        if not chosen.culprit:
            return example
        guilty = jnp.all(row.tokens[: culprit.size] == culprit)
        return example._replace(weights=example.weights * jnp.where(guilty, 3.0, 1.0))

    def loss(apply, params, example, knobs, key, train):
        guilty = jnp.any(example.weights > 2.0)
        example = example._replace(weights=jnp.minimum(example.weights, 1.0))
        terms = inner.loss(apply, params, example, knobs, key, train)
        by = jnp.where(guilty, factor, knobs["factor"])
        return {name: term._replace(sum=term.sum * by) for name, term in terms.items()}

    return inner._replace(
        schedule=schedule,
        evaluation_knobs=inner.evaluation_knobs | {"factor": jnp.ones(())},
        corrupt=corrupt,
        loss=loss,
    )
'''

RECIPE = '''"""The tiny recipe of another objective, and what goes wrong."""

import importlib


def get_config(wraps):
    config = importlib.import_module(f"configs.{wraps}").get_config("tiny")
    config.objective.name = "faulty"
    config.objective.wraps = wraps
    config.objective.fault = "spike"  # nan | spike
    config.objective.first = 0  # of the updates that it happens at, 0 = none
    config.objective.last = 0
    config.objective.culprit = ()  # tokens of a row at which it happens
    return config
'''


def install(bench: Bench) -> Bench:
    """The bench of the faulty variant of an objective."""
    place = bench.folder / "elsewhere"
    for name, text in (("objectives", OBJECTIVE), ("configs", RECIPE)):
        (place / name).mkdir(parents=True, exist_ok=True)
        (place / name / "faulty.py").write_text(text)
    recipe = f"{place}/configs/faulty.py:{bench.objective}"
    return bench._replace(recipe=recipe, python_path=str(place))


def during(first: int, last: int | None = None) -> dict[str, int]:
    """Overrides: it happens at these updates."""
    return {"objective.first": first, "objective.last": first if last is None else last}
