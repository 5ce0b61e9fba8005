"""Healthy runs of many kinds: none may be called sick."""

import dataclasses
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from pretraining import doctor, optimizer
from tests.doctor.synthetic import (
    STEPS,
    V,
    diagnosed,
    edited,
    falling,
    healthy,
    losses,
    nothing,
    put,
    without,
)


def scheduled(name: str) -> doctor.Record:
    """The learning rates of a real schedule."""
    config = {"schedule": name, "warmup": 200, "decay": 400, "learning_rate": 1e-3}
    flat = healthy().config | {f"optimizer.{key}": value for key, value in config.items()}
    section = {key[10:]: value for key, value in flat.items() if key.startswith("optimizer.")}
    rates = np.asarray(optimizer.schedule(ConfigDict(section), STEPS)(np.arange(STEPS)))
    record = edited(put(train__learning_rate=lambda step: float(rates[step - 1])))
    return dataclasses.replace(record, config=flat)


def large() -> doctor.Record:
    """400 of a million updates of 256 rows of 509 tokens, all in the warm-up."""
    curve = lambda step: 6.45 + (math.log(V) - 6.45) * math.exp(-step / 40)

    def change(line):
        losses(curve)(line)
        put(train__learning_rate=lambda step: 1e-4 * step / 10_000)(line)

    keys = {"learning_rate": 1e-4, "warmup": 10_000}
    record = edited(change, **{f"optimizer__{key}": value for key, value in keys.items()})
    sizes = {"train.batch_size": 256, "train.steps": 1_000_000, "data.sequence_length": 512}
    config, counts = record.config | sizes, np.full(V, 10_000_000)
    return dataclasses.replace(record, config=config, lines=record.lines[:40], counts=counts)


def warm(step: int) -> float:
    return 3.002 - 1e-6 * step


def detecting() -> doctor.Record:
    """A loss of several terms, of which that of the tokens is a small one, and no first line."""

    def change(line):
        for kind in ("train", "eval"):
            if f"{kind}/loss" in line:
                line[f"{kind}/tokens"] = line.pop(f"{kind}/masked_lm")
                line[f"{kind}/told"] = 0.3
                line[f"{kind}/told_accuracy"] = 0.9
                line[f"{kind}/majority_accuracy"] = 0.87
                line[f"{kind}/loss"] += 50 * 0.3

    record = dataclasses.replace(edited(change), term="tokens")
    return dataclasses.replace(record, lines=record.lines[9:])


def left_to_right() -> doctor.Record:
    """Every position counts, so nothing is corrupted: neither slots nor knobs."""
    return edited(without("train/overflow", "eval/overflow", "train/knobs/mask_rate"))


def rarely_logged() -> doctor.Record:
    """log.every = 500, evaluate.every = 200: a line at each evaluation, and few others."""
    lines = [line for line in healthy().lines if not line["step"] % 500 or not line["step"] % 200]
    return dataclasses.replace(healthy(), lines=lines)


def harder() -> doctor.Record:
    """A mask rate that rises, and the training loss with it, while validation falls."""
    record = edited(losses(lambda step: falling(step) + step / 1000, falling))
    for line in record.lines:
        line["train/knobs/mask_rate"] = 0.15 + 0.25 * line["step"] / STEPS
    return record


def masked_alone() -> doctor.Record:
    """Trained with [MASK] alone, evaluated at 80/10/10, at which it becomes ever worse."""
    evaluated = lambda step: falling(step) + step / 1000
    record = edited(losses(falling, evaluated))
    for line in record.lines:
        line["train/knobs/mask_fraction"] = 1.0
    return dataclasses.replace(record, evaluation_knobs={"mask_fraction": 0.8})


# A run: {check: severity} of all that is not in order, the missing reference apart.
HEALTHY = {
    "as it ought to be": (healthy(), {}),
    "linear": (scheduled("linear"), {}),
    "cosine": (scheduled("cosine"), {}),
    "wsd": (scheduled("wsd"), {}),
    "bert": (scheduled("bert"), {}),
    "electra": (scheduled("electra"), {}),
    "constant": (scheduled("constant"), {"learning rate": "note"}),
    "large, in its warm-up": (large(), {"unigram baseline": "note", "progress": "note"}),
    "warm start": (edited(losses(warm), init_from="runs/other"), {}),
    "left to right": (left_to_right(), {}),
    "true or replaced": (detecting(), {}),
    "20 epochs": (dataclasses.replace(healthy(), counts=np.full(V, 100)), {"epochs": "note"}),
    "rarely logged": (rarely_logged(), {}),
    "harder and harder": (harder(), {}),
    "[MASK] alone": (
        masked_alone(),
        {"overfitting": "note", "train-validation gap": "note"},
    ),
    "pre-norm without warm-up": (
        edited(nothing, optimizer__warmup=0, model__norm_order="pre"),
        {"warm-up": "note"},
    ),
    "a word from the guard": (edited(put(train__loss_deviation=5.0)), {}),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_is_told_so(kind):
    record, expected = HEALTHY[kind]
    found = {name: finding.severity for name, finding in diagnosed(record).items()}
    assert {name: each for name, each in found.items() if each != "ok"} == expected | {
        "reference": "note"
    }
