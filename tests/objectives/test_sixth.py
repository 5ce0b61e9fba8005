"""A further objective is one file and one recipe, wherever they lie on the Python path."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pretraining import metrics

ROOT = pathlib.Path(__file__).parent.parent.parent

OBJECTIVE = '''"""Every third token is hidden and predicted; nothing is drawn by lot."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from objectives import base
from pretraining.models.heads import gather_positions
from pretraining.models.transformer import TransformerConfig


class Example(NamedTuple):
    tokens: Any
    length: Any
    document: Any
    corrupted: Any
    positions: Any
    labels: Any
    weights: Any


def build(config, vocabulary):
    size = config.data.sequence_length
    transformer = TransformerConfig.create(config.model, vocabulary.size, size)
    unigram_nll = base.unigram_nll(vocabulary)
    special = jnp.asarray(vocabulary.special_ids)

    def corrupt(key, row, knobs):
        place = jnp.arange(0, row.tokens.shape[0], config.objective.every)
        labels = row.tokens[place]
        counts = (place < row.length) & ~jnp.isin(labels, special)
        hidden = row.tokens.at[place].set(jnp.where(counts, vocabulary.mask, labels))
        return Example(
            base.frame(hidden, row.length, size, vocabulary.cls, vocabulary.sep, vocabulary.pad),
            row.length + 2,
            None,
            jnp.zeros(size, bool).at[place + 1].set(counts),
            place + 1,
            labels,
            counts.astype(jnp.float32),
        )

    def loss(apply, params, example, knobs, key, train):
        variables = {"params": params}
        hidden = apply(variables, example, key if train else None, method="encode")
        sums = base.cross_entropy(
            lambda chunk: apply(variables, chunk, method="project"),
            gather_positions(hidden, example.positions),
            example.labels,
            example.weights,
            transformer.logits_chunk,
        )
        return base.prediction_terms("thirds", sums, example.labels, example.weights, unigram_nll)

    return base.Objective(
        model=base.LanguageModel(transformer, causal=False),
        schedule=lambda step: {},
        evaluation_knobs={},
        corrupt=corrupt,
        loss=loss,
        context="both",
        encode=base.encode,
        token_term="thirds",
    )
'''

RECIPE = '''"""The recipe of it."""

from configs import base, masked_lm


def get_config(size="tiny"):
    return base.at_size(masked_lm.SIZES, size, objective())


def objective():
    return dict(
        name="thirds",
        every=3,  # every so many tokens one is hidden
    )
'''


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with an objective and its recipe, and the environment in which it is found."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name, text in (("objectives", OBJECTIVE), ("configs", RECIPE)):
        (folder / name).mkdir()
        (folder / name / "thirds.py").write_text(text)
    return folder, os.environ | {"PYTHONPATH": str(folder)}


def run(words, environment):
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_it_trains(elsewhere, small_overrides, tmp_path):
    folder, environment = elsewhere
    overrides = small_overrides | {"train.steps": 2, "log.every": 1, "evaluate.batch_size": 16}
    words = [f"--config.{key}={value}" for key, value in overrides.items()]
    words = [f"--config={folder}/configs/thirds.py:tiny", f"--workdir={tmp_path / 'run'}", *words]
    done = run(["pretraining.train", *words], environment)
    assert done.returncode == 0, done.stderr
    lines = metrics.read(tmp_path / "run" / metrics.FILE)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["train/thirds"]) for line in lines)
    assert "eval/thirds" in lines[-1]


def test_it_passes_the_contract(elsewhere):
    _, environment = elsewhere
    contract = "tests/objectives/test_contract.py"
    done = run(["pytest", contract, "-k", "thirds", "-p", "no:cacheprovider"], environment)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
