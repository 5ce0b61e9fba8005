"""Layers point one way: the engine knows no objective by name."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ENGINE = sorted((ROOT / "pretraining").rglob("*.py"))
OBJECTIVES = [
    path.stem
    for path in (ROOT / "objectives").glob("*.py")
    if re.search(r"^def build\(", path.read_text(), re.M)
]


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def code(source):
    """The source without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_the_engine_imports_no_objective(path):
    found = [name for name in imports(path.read_text()) if name.split(".")[0] == "objectives"]
    assert not found


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_the_engine_names_no_objective(path):
    assert len(OBJECTIVES) >= 5
    text = code(path.read_text())
    assert not [name for name in OBJECTIVES if re.search(rf"\b{name}\b", text)]


def test_models_import_nothing_of_the_loop():
    allowed = {"errors", "models"}
    for path in (ROOT / "pretraining" / "models").glob("*.py"):
        for name in imports(path.read_text()):
            if name.startswith("pretraining."):
                assert name.split(".")[1] in allowed, (path.name, name)


def test_objectives_import_models_rows_and_each_other_only():
    for path in (ROOT / "objectives").glob("*.py"):
        for name in imports(path.read_text()):
            if name.startswith("pretraining."):
                assert re.match(r"pretraining\.(models|data\.row|errors)", name), (path.name, name)
