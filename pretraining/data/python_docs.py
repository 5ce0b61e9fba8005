"""English technical prose that every Python brings along: no download."""

import ast
import itertools
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator


def documents() -> Iterator[str]:
    """The topics of `help()`, then the docstrings of the running Python's standard library.

    About 2 MB, in an order that depends on the version of Python alone. One document per topic, and
    one per module: its docstrings in the order of the source, joined by blank lines. Modules are
    parsed, never imported. Documents below 200 characters and repeated ones are dropped.
    """
    from pydoc_data.topics import topics

    modules = map(_docstrings, _modules())
    texts = map(_prose, itertools.chain((topics[name] for name in sorted(topics)), modules))
    yield from dict.fromkeys(text for text in texts if len(text) >= 200)


def contents() -> Iterator[bytes]:
    """What a fingerprint covers: the version of Python, its module names and their source."""
    yield platform.python_version().encode()
    for path in _modules():
        yield path.name.encode()
        yield path.read_bytes()


def _modules() -> list[pathlib.Path]:
    """Sorted; without installed packages, tests, and what a build wrote about itself."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3"}
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if not skip & set(path.parts))
    return [root / path for path in sorted(kept) if not path.name.startswith("_sysconfigdata")]


def _docstrings(path: pathlib.Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's escape sequences
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a template
            return ""
    return "\n\n".join(filter(None, map(ast.get_docstring, _definitions(tree))))


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def _prose(text: str) -> str:
    """Without indentation and underlines; lines that were wrapped at a margin are joined again."""
    text = re.sub(r"(?m)^[ \t]+", "", text)
    text = re.sub(r"(?m)^([=*~^#\"'`+-])\1{2,}\n", "", text)
    return re.sub(r"(?m)^(.{50,})\n(?=[A-Za-z(\"'`])", r"\1 ", text)
