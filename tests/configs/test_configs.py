"""Every recipe in configs/, at every size: it loads, is valid, builds; and every key is read."""

import ast
import importlib
import pathlib
import types

import jax
import numpy as np
import pytest

import configs
from pretraining import config as config_lib
from pretraining import optimizer, state
from pretraining.config import objective_names

ROOT = pathlib.Path(__file__).parent.parent.parent
RECIPES = [
    f"configs/{path.name}:{size}"
    for path in sorted(pathlib.Path(configs.__path__[0]).glob("*.py"))
    if path.name not in ("__init__.py", "base.py")
    for size in getattr(importlib.import_module(f"configs.{path.stem}"), "SIZES", [""])
]
# Where the keys of a section are read once the section itself has been handed over.
HOMES = {
    "model": ("pretraining/models", "objectives"),
    "data": ("pretraining/data",),
    "tokenizer": ("pretraining/data",),
    "optimizer": ("pretraining/optimizer.py",),
    "objective": ("objectives",),
    "mesh": ("pretraining/sharding.py",),
}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def vocabulary(size):
    ids = np.arange(size)
    return types.SimpleNamespace(
        size=size, pad=0, unk=1, bos=2, cls=2, eos=3, sep=3, mask=4, special_ids=(0, 1, 2, 3, 4),
        word_start=ids % 3 == 0, bytes_per_id=np.full(size, 4), unigram_counts=np.ones(size, int),
    )  # fmt: skip


def test_every_recipe_is_found():
    sizes = ("tiny", "small", "base", "large")
    expected = {f"configs/{name}.py:{size}" for name in objective_names() for size in sizes}
    assert len(expected) >= 20
    assert {"configs/quickstart.py:", *expected} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid_and_build_at_full_size(recipe):
    config = config_lib.load(recipe.rstrip(":"))
    config_lib.validate(config)
    config = config_lib.resolve_durations(config, rows_per_epoch=100_000)
    objective = config_lib.build_objective(config, vocabulary(config.tokenizer.size))
    params = jax.eval_shape(lambda: state.init_params(objective, config))
    rate = optimizer.schedule(config.optimizer, config.train.steps)
    jax.eval_shape(optimizer.create(config.optimizer, rate, params).init, params)
    table = params["encoder"]["embeddings"]["token"]["embedding"]
    assert table.shape[0] == config.tokenizer.size
    blocks = [name for name in params["encoder"] if name.startswith("layer_")]
    assert len(blocks) == config.model.layers


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_is_read(recipe):
    everywhere = chains("pretraining", "objectives", "experiments")
    unread = []
    for key in config_lib.flatten(config_lib.load(recipe.rstrip(":"))):
        section, _, name = key.rpartition(".")
        home = chains(*HOMES[section]) if section in HOMES else set()
        if not (ends(everywhere, key) or ends(home, name) or generic(key)):
            unread.append(key)
    assert not unread


def generic(key):
    """Keys that the engine reads by a table of key names."""
    return key in config_lib._DURATIONS or key.startswith("mesh.")


def ends(found, name):
    return any(chain == name or chain.endswith("." + name) for chain in found)


def chains(*places):
    """Every attribute chain ("config.train.steps") and literal subscript in the given sources."""
    found = set()
    for place in places:
        path = ROOT / place
        for file in [path] if path.is_file() else path.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(ast.unparse(node))
    return found


def test_a_key_that_nobody_reads_would_be_found():
    assert not ends(chains("pretraining", "objectives"), "train.never_read")
    assert ends(chains("pretraining"), "train.accumulation")
