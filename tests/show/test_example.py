"""What is shown is what the loop would compute, and is named for what it is."""

import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pretraining import config as config_lib
from pretraining import notebook, predict, random, show, step
from pretraining.data import tokenizer
from pretraining.errors import UserError
from pretraining.show import example
from pretraining.state import LossAverage, State, empty_rows

TEXT = "the value of the object returns a list"


@pytest.fixture(scope="module")
def vocabulary(small_corpus, small_overrides):
    config = config_lib.load("configs/masked_lm.py:tiny", small_overrides)
    trained = tokenizer.train(small_corpus.read_text().split("\n\n"), config.tokenizer)
    return trained.with_counts(np.ones(trained.size))


@pytest.fixture(scope="module")
def make_run(vocabulary, small_overrides):
    """(objective, step, overrides) -> a Run without parameters, which these need not be shown."""

    def make(name, step=0, **overrides):
        config = config_lib.load(f"configs/{name}.py:tiny", small_overrides | overrides)
        objective = config_lib.build_objective(config, vocabulary)
        return notebook.Run(pathlib.Path(), config, vocabulary, objective, None, step)

    return make


def loop_example(run, rows, fields):
    """Fields of the first example of a batch, read as metrics out of the real training step."""

    def loss(apply, params, examples, knobs, key, train):
        one = jnp.ones(())
        return {
            f"{field}/{i}": SimpleNamespace(sum=value, weight=one, scale=0.0, smooth=0.0)
            for field in fields
            for i, value in enumerate(getattr(examples, field)[0].astype(jnp.float32))
        }

    objective = run.objective._replace(loss=loss)
    update = step.train_step(objective, optax.sgd(0.0), lambda step: jnp.zeros(()), run.config)
    params = {"unused": jnp.zeros(())}
    zero, losses = jnp.int32(0), LossAverage(*[jnp.float32(0)] * 3)
    optimizer = optax.sgd(0.0).init(params)
    state = State(jnp.int32(run.step), params, optimizer, None, zero, zero, losses)
    _, metrics = jax.jit(update)(state, rows, random.seeds(run.config))
    found = {field: {} for field in fields}
    for name, value in metrics.items():
        field, _, i = name.partition("/")
        if field in fields:
            found[field][int(i)] = int(value)
    return {field: [values[i] for i in sorted(values)] for field, values in found.items()}


@pytest.mark.parametrize(
    "name, configured, given",
    [("causal_lm", 5, None), ("masked_lm", 5, None), ("masked_lm", 0, 5)],
)
def test_the_example_is_the_loops(name, configured, given, make_run):
    shown = show.read(make_run(name, 3, **{"seed.corruption": configured}), TEXT, given)

    run = make_run(name, 3, **{"seed.corruption": 5})
    rows = jax.tree.map(np.array, empty_rows(run.config, 4))
    text = predict.text_row(run.vocabulary, TEXT, run.payload)
    for field, value in zip(rows, text, strict=True):
        field[0] = value
    loop = loop_example(run, rows, ("tokens", "positions", "labels", "weights"))
    words = lambda ids: [piece.replace("\u2581", "·") for piece in run.vocabulary.pieces(ids)]

    lines = {line.title: line.pieces for line in shown.lines}
    assert len(lines["input"]) > len(TEXT.split())
    assert lines["input"] == words(loop["tokens"])[: len(lines["input"])]
    used = [i for i, weight in enumerate(loop["weights"]) if weight]
    labels = words(loop["labels"])
    answers = shown.lines[-1].pieces
    assert {i: piece for i, piece in enumerate(answers) if piece} == {
        loop["positions"][i]: labels[i] for i in used
    }


def test_what_was_drawn_is_named_in_the_order_of_the_objective(make_run):
    changes = {"objective.mask_rate_final": 0.5, "objective.mask_rate_schedule": "linear"}
    shown = show.read(make_run("masked_lm", 20, **changes), TEXT, seed=4)  # of 40 steps
    assert [line.title for line in shown.lines] == ["original", "input", "predicted"]
    assert shown.name == "masked_lm"
    assert shown.facts.startswith("seed 4, step 20, ")
    assert "mask_rate 0.325" in shown.facts


@pytest.mark.parametrize(
    "text, seed, message",
    [
        ("", None, "0 tokens; this model takes 1 to 29"),
        ("the value of " * 30, None, "tokens; this model takes 1 to 29"),
        (TEXT, -1, "seed=-1 is out of range"),
        (TEXT, 2**32, "seed=4294967296 is out of range"),
    ],
)
def test_what_cannot_be_shown_is_said(text, seed, message, make_run):
    with pytest.raises(UserError, match=message):
        show.read(make_run("causal_lm"), text, seed)


def test_an_objective_without_the_part(make_run):
    run = make_run("causal_lm")
    bare = SimpleNamespace(**vars(run) | {"objective": run.objective._replace(describe=None)})
    with pytest.raises(UserError, match="no part `describe`"):
        show.read(bare, TEXT)


def test_marks_say_what_happened(corrupted):
    original, seen, predicted = corrupted.lines
    assert original.marks == ["special", "plain", "plain", "plain", "plain"]
    assert seen.marks == ["special", "plain", "changed", "changed", "plain"]
    assert predicted.marks == ["plain", "plain", "answer", "answer", "answer"]
    assert [line.whole for line in corrupted.lines] == [True, True, False]
    assert corrupted.answered.tolist() == [False, False, True, True, True]
    assert corrupted.labels == ["[CLS]", "·a", "·a", "[MASK]", "·ran"]
    assert corrupted.sees["content"].shape == (5, 5)


def test_pieces_are_readable(make):
    shown = make({"input": ["▁▁b", "\n", "\x1b", r"$\frac$"]})
    assert shown.lines[0].pieces == ["··b", "↵", "\ufffd", r"$\frac$"]


@pytest.mark.parametrize(
    "widths, available, expected",
    [
        ([3, 3, 3], 9, [[0, 1, 2]]),
        ([3, 3, 3], 8, [[0, 1], [2]]),
        ([9, 1, 1], 2, [[0], [1, 2]]),
        ([1, 9, 1], 2, [[0], [1], [2]]),
    ],
)
def test_bands_hold_what_fits(widths, available, expected):
    assert [list(band) for band in example.bands(widths, available)] == expected
