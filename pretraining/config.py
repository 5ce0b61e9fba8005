"""Configs: read from a file, overridden on the command line, checked, stored, compared.

A recipe is a Python file with `get_config(arg) -> ml_collections.ConfigDict`, named on the command
line as `--config=configs/masked_lm.py:tiny` and changed by `--config.section.key=value`. The keys
of `configs/base.py` are the schema; only the section `objective` differs from recipe to recipe.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import math
import pathlib
import re
import traceback
from collections.abc import Collection
from typing import Any

import ml_collections

from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError

# ---------------------------------------------------------------------------------------- reading


def load(recipe: str, overrides: dict[str, Any] | None = None) -> ml_collections.ConfigDict:
    """The locked config of "file.py" or "file.py:argument", with overrides {"train.steps": 10}."""
    path, _, argument = recipe.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={recipe}: there is no file {path!r}")
    if not path.endswith(".py"):
        raise UserError(f"--config={recipe}: a recipe is a Python file")
    try:
        config = _run_recipe(recipe, path, argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever is wrong with it, in one line
        first, line = str(error).split("\n")[0], traceback.extract_tb(error.__traceback__)[-1]
        where = f"{line.filename} line {line.lineno}"
        raise UserError(f"--config={recipe}: {type(error).__name__}: {first} ({where})") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={recipe}: get_config gives {config!r:.40}, not a ConfigDict")
    config.lock()
    known = flatten(config)
    for key, value in (overrides or {}).items():
        if key not in known:
            raise UserError(f"unknown config key {key!r}{nearest(key, known)}")
        config.update_from_flattened_dict({key: value})
    check_keys(config)
    return config


def _run_recipe(recipe: str, path: str, argument: str):
    """What its `get_config` returns."""
    spec = importlib.util.spec_from_file_location("_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={recipe}: {path} has no function get_config")
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config={recipe}: {path} comes in one size, without ':{argument}'")
    return module.get_config(argument) if argument else module.get_config()


def flatten(config) -> dict[str, Any]:
    """{"section.key": value} of a config or of nested dicts."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def check_keys(config: ml_collections.ConfigDict) -> None:
    """Refuses a recipe that lacks a key of configs/base.py or adds one outside `objective`."""
    known, present = flatten(base_recipe().get_config()), flatten(config)
    for key in present:
        if key not in known and not key.startswith("objective."):
            raise UserError(f"unknown config key {key!r}{nearest(key, known)}")
    for key in known:
        if key not in present:
            raise UserError(f"config key {key!r} is missing in the recipe")


def nearest(key: str, known) -> str:
    """'; the nearest key is ...', or nothing when no known key resembles `key`."""
    close = difflib.get_close_matches(key, known, 1, 0.5)
    if not close:  # a key set in the wrong section
        tail = key.rsplit(".", 1)[-1]
        close = [other for other in known if other.rsplit(".", 1)[-1] == tail][:1]
    return f"; the nearest key is {close[0]!r}" if close else ""


def base_recipe():
    """The module configs.base: the schema of every recipe."""
    return importlib.import_module("configs.base")


def objective_names() -> list[str]:
    """The names of all objectives: the files of the package `objectives` that have `build`."""
    folders = importlib.import_module("objectives").__path__
    files = [file for folder in folders for file in pathlib.Path(folder).glob("*.py")]
    return sorted(f.stem for f in files if re.search(r"^def build\(", f.read_text(), re.M))


def build_objective(config, vocabulary):
    """The Objective of the file objectives/<config.objective.name>.py."""
    names = objective_names()
    if config.objective.name not in names:
        raise UserError(
            f"config.objective.name={config.objective.name!r}: there is no file "
            f"objectives/{config.objective.name}.py; there are {', '.join(names)}"
        )
    module = importlib.import_module(f"objectives.{config.objective.name}")
    return module.build(config, vocabulary)


# --------------------------------------------------------------------------------------- checking

_POSITIVE = ("a number above 0", lambda value: value > 0)
_NOT_NEGATIVE = ("a number of at least 0", lambda value: value >= 0)
_SHARE = ("a number in [0, 1)", lambda value: 0 <= value < 1)

# Ranges of the keys that the engine itself reads; models, tokenizers, optimizers and objectives
# check their own.
_RANGES = {
    "data.sequence_length": ("at least 8", lambda value: value >= 8),
    "data.validation": ("a share above 0 and below 1", lambda value: 0 < value < 1),
    "data.copies": _POSITIVE,
    "data.prefetch": _NOT_NEGATIVE,
    "data.threads": _POSITIVE,
    "data.workers": _NOT_NEGATIVE,
    "model.heads": _POSITIVE,  # by which the width is divided before models check their own
    "tokenizer.size": ("at most 2**24", lambda value: value <= 2**24),
    "train.batch_size": _POSITIVE,
    "train.accumulation": _POSITIVE,
    "train.ema": _SHARE,
    "evaluate.rows": _NOT_NEGATIVE,
    "evaluate.batch_size": _POSITIVE,
    "checkpoint.keep": _POSITIVE,
    "log.every": _POSITIVE,
    "log.profile_start": _NOT_NEGATIVE,
    "log.profile_steps": _POSITIVE,
    "log.peak_flops": _NOT_NEGATIVE,
} | {
    f"seed.{name}": ("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
    for name in ("init", "data", "corruption", "dropout", "evaluation")
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks ranges and contradictions of the engine's own keys, before anything is prepared."""
    flat = flatten(config)
    for key, (allowed, is_valid) in _RANGES.items():
        if not is_valid(flat[key]):
            raise UserError(f"config.{key}={flat[key]!r} is out of range: {allowed}")
    for key in _DURATIONS:
        _parse_duration(key, flat[key])
    batch, parts = config.train.batch_size, config.train.accumulation * config.data.copies
    if batch % parts:
        raise UserError(
            f"config.train.batch_size={batch} is not divisible by config.train.accumulation="
            f"{config.train.accumulation} x config.data.copies={config.data.copies}"
        )


# -------------------------------------------------------------------------------------- durations

_DURATIONS = (
    "train.steps",  # first: the percentages of the others refer to it
    "optimizer.warmup",
    "optimizer.decay",
    "evaluate.every",
    "checkpoint.every",
    "checkpoint.keep_every",
)


def resolve_durations(
    config: ml_collections.ConfigDict, rows_per_epoch: int
) -> ml_collections.ConfigDict:
    """A copy in which every duration is an int, in steps.

    A step consumes batch_size x T tokens (T = sequence_length - 3, fillers and copies counted) and
    batch_size / copies rows; an epoch is every row of every training source once.
    """
    tokens_per_step = config.train.batch_size * (config.data.sequence_length - SPECIAL_POSITIONS)
    units = {
        "steps": 1.0,
        "tokens": 1 / tokens_per_step,
        "epochs": rows_per_epoch * config.data.copies / config.train.batch_size,
    }
    resolved = config.to_dict()
    for key in _DURATIONS:
        section, name = key.split(".")
        written = resolved[section][name]
        amount, unit = _parse_duration(key, written)
        if unit == "%" and key == "train.steps":
            raise UserError(f"config.train.steps={written!r}: a share of what? Give steps")
        scale = resolved["train"]["steps"] / 100 if unit == "%" else units[unit]
        # Rounded first: 10 % of 70 is 7.000000000000001 in binary, and must not become 8.
        resolved[section][name] = math.ceil(round(amount * scale, 6))
    if resolved["train"]["steps"] < 1:
        raise UserError(f"config.train.steps={config.train.steps!r} is out of range: at least 1")
    return ml_collections.ConfigDict(resolved).lock()


def without_epochs(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A resolved copy for checks before the number of rows is known: no phase is in epochs."""
    flat = flatten(config)
    written = config.to_dict()
    for key in _DURATIONS:
        if _parse_duration(key, flat[key])[1] == "epochs":
            section, name = key.split(".")
            written[section][name] = 10**9 if key == "train.steps" else 0
    return resolve_durations(ml_collections.ConfigDict(written), rows_per_epoch=1)


def _parse_duration(key: str, value) -> tuple[float, str]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value, "steps"
    match = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)\s*(steps?|tokens?|epochs?|%)\s*", str(value)
    )
    if not match:
        raise UserError(
            f"config.{key}={value!r} is not a duration: "
            "an int (steps), or e.g. '500 steps', '10M tokens', '2 epochs', '10%'"
        )
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    unit = match[3] if match[3] == "%" else match[3].rstrip("s") + "s"
    return float(match[1]) * factor, unit


# -------------------------------------------------------------------------- storing and comparing

# Durations that shape a schedule: they may change between two starts as long as nothing that has
# already happened would have been different.
SCHEDULE = ("train.steps", "optimizer.warmup", "optimizer.decay")

# What may differ between two starts of one run: it changes no parameter but in its last bits (the
# mesh), though it may change what is evaluated from then on.
_MAY_CHANGE = re.compile(
    r"(mesh|log|checkpoint|evaluate|guard)\.|data\.(cache|workers|prefetch|threads)$"
)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """The locked config that `to_json` wrote; lists become tuples again."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ml_collections.ConfigDict(tuples(json.loads(text))).lock()


# What the members of a population may differ in, beside the knobs of their objective: what a
# program can be given as an input, or as a function of the step.
_TRACED = re.compile(r"seed\.|optimizer\.(learning_rate|schedule|warmup|decay|end_fraction)$")


def untraced(config: ml_collections.ConfigDict, knobs: Collection[str]) -> dict[str, Any]:
    """{key: value} of what all members of a population have alike (pretraining/population).

    Of an objective they may differ in what decides a knob: the keys of its name, with `_final` and
    `_schedule`, and `keep_fraction`, which is what the other fractions leave.

    Args:
      knobs: the names of the objective's knobs.
    """

    def is_traced(key: str) -> bool:
        section, _, name = key.partition(".")
        of_knob = name == "keep_fraction" or re.sub("_(final|schedule)$", "", name) in knobs
        return bool(_TRACED.match(key)) or (section == "objective" and of_knob)

    return {key: value for key, value in flatten(config).items() if not is_traced(key)}


def without_seeds(config: ml_collections.ConfigDict) -> str:
    """As JSON with all seeds 0: the same for all configs that differ in nothing but seeds."""
    written = config.to_dict()
    return to_json(
        ml_collections.ConfigDict({**written, "seed": dict.fromkeys(written["seed"], 0)})
    )


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> dict[str, str]:
    """{key: "old -> new"} of the keys whose change makes another run of it."""
    before, after = (flatten(json.loads(to_json(config))) for config in (old, new))
    missing = "(absent)"
    return {
        key: f"{before.get(key, missing)!r} -> {after.get(key, missing)!r}"
        for key in sorted(before | after)
        if before.get(key, missing) != after.get(key, missing) and not _MAY_CHANGE.match(key)
    }
