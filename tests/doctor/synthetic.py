"""Runs whose curves are drawn by hand."""

import dataclasses
import math
import pathlib

import numpy as np

from pretraining import config as config_lib
from pretraining import doctor
from tests import running

STEPS, WARMUP, PEAK, V = 2000, 200, 1e-3, 4096
EVERY, EVALUATED = 10, 200
NOWHERE = pathlib.Path("there/is/no/such/run")


def healthy() -> doctor.Record:
    """A run of 2,000 steps of 32 x 125 tokens, whose curves are drawn by hand."""
    config = config_lib.load(f"{running.ROOT}/configs/masked_lm.py:tiny", {"train.steps": STEPS})
    config = config_lib.flatten(config_lib.resolve_durations(config, rows_per_epoch=100_000))
    counts = np.full(V, 3_000)  # 12.3 M tokens
    start = {"data": "d" * 64, "commit": "c", "versions": {}, "devices": [1, "cpu"]}
    lines = [line(step) for step in range(EVERY, STEPS + 1, EVERY)]
    return doctor.Record(NOWHERE, config, lines, counts, [start], "masked_lm", {"mask_rate": 0.15})


def line(step: int) -> dict:
    rate = PEAK * min(step / WARMUP, (STEPS - step) / (STEPS - WARMUP))
    loss = 4.0 + (math.log(V) - 4.0) * math.exp(-step / 300)
    values = {
        "step": step,
        "train/loss": loss,
        "train/masked_lm": loss,
        "train/unigram_loss": 6.5,
        "train/accuracy": 0.3,
        "train/overflow": 0.0,
        "train/fill": 1.0,
        "train/gradient_norm": 0.8,
        "train/learning_rate": rate,
        "train/loss_deviation": 0.5,
        "train/skipped": 0.0,
        "train/rewinds": 0.0,
        "train/knobs/mask_rate": 0.15,
        "time/total/step": 0.5 * step,
        "time/total/data_wait": 0.01 * step,
        "time/total/compile": 20.0,
    }
    if step % EVALUATED == 0:
        values |= {f"eval/{name}": loss + 0.02 for name in ("loss", "masked_lm")}
        values |= {"eval/accuracy": 0.3, "eval/unigram_loss": 6.5, "eval/overflow": 0.0}
    return values


def edited(change, **config) -> doctor.Record:
    """The healthy run with every line changed by `change(line)`, and other keys of the config."""
    record = healthy()
    for values in record.lines:
        change(values)
    return dataclasses.replace(
        record, config=record.config | {k.replace("__", "."): v for k, v in config.items()}
    )


def put(**values):
    """Sets metrics, `eval` ones in the lines that have them: numbers, or functions of the step."""

    def change(line):
        for name, value in values.items():
            name = name.replace("__", "/")
            if name in line or not name.startswith("eval/"):
                line[name] = value(line["step"]) if callable(value) else value

    return change


def late(value, otherwise, start=1000):
    """The value from a step on; before it another one, or a function of the step."""
    before = otherwise if callable(otherwise) else lambda _: otherwise
    return lambda step: value if step >= start else before(step)


def nothing(line):
    pass


def falling(step):
    return 4.0 + 4.3 * math.exp(-step / 300)


def losses(train, held_out=None):
    held_out = held_out or train
    return put(
        train__loss=train, train__masked_lm=train, eval__loss=held_out, eval__masked_lm=held_out
    )


def diagnosed(record, references=()):
    """{check: finding}"""
    found = doctor.diagnose(record, list(references))
    assert len({finding.check for finding in found}) == len(found)
    return {finding.check: finding for finding in found}


def without(*names):
    """Removes metrics."""

    def change(line):
        for name in names:
            line.pop(name, None)

    return change
