"""An objective that goes wrong where it is told to, around any other one.

Written into a folder on the Python path: `objectives/faulty.py` and `configs/faulty.py`.
"""

import os
import pathlib
import tempfile

from tests.faults.bench import Bench

OBJECTIVE = '''"""Another objective; loss or gradient is multiplied at one update, or for a row."""

import importlib

import jax
import jax.numpy as jnp

FACTORS = {"nan": float("nan"), "spike": 50.0, "gradient": float("nan")}


@jax.custom_vjp
def with_gradient(x, factor):
    """x, whose gradient is multiplied."""
    return x


with_gradient.defvjp(
    lambda x, factor: (x, factor),
    lambda factor, gradient: (gradient * factor, jnp.zeros_like(factor)),
)


def build(config, vocabulary):
    chosen = config.objective
    inner = importlib.import_module(f"objectives.{chosen.wraps}").build(config, vocabulary)
    factor = FACTORS[chosen.fault]
    multiply = with_gradient if chosen.fault == "gradient" else jnp.multiply
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
        return {name: term._replace(sum=multiply(term.sum, by)) for name, term in terms.items()}

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
    config.objective.fault = "spike"  # nan | spike | gradient: NaN, beside a finite loss
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
        _write_once(place / name / "faulty.py", text)
    recipe = f"{place}/configs/faulty.py:{bench.objective}"
    return bench._replace(recipe=recipe, python_path=str(place))


def _write_once(path: pathlib.Path, text: str) -> None:
    """Whole at any moment: runs of other faults of this objective read it meanwhile."""
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)


def during(first: int, last: int | None = None) -> dict[str, int]:
    """Overrides: it happens at these updates."""
    return {"objective.first": first, "objective.last": first if last is None else last}
