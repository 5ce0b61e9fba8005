"""Docstrings and topics: prose, in order, without importing what is read."""

import sys
import textwrap

import pytest

from configs import base
from pretraining.data import corpus, python_docs


@pytest.fixture(scope="module")
def docs():
    return list(corpus.documents("python-docs", base.get_config().data))


def test_python_docs(docs):
    assert 1.5e6 < sum(len(text.encode()) for text in docs) < 4e6
    assert len(set(docs)) == len(docs) > 300
    assert all(len(text) >= 200 for text in docs)
    module = next(text for text in docs if text.startswith(textwrap.__doc__))
    places = [module.index(name) for name in ("Object for wrapping", "wrap(text : string)")]
    assert places == sorted(places)
    assert not {"turtle", "antigravity", "this"} & set(sys.modules)


def test_python_docs_fingerprint(monkeypatch):
    first = corpus.fingerprint("python-docs", base.get_config().data)
    assert corpus.fingerprint("python-docs", base.get_config().data) == first
    monkeypatch.setattr(python_docs.platform, "python_version", lambda: "4.0")
    assert corpus.fingerprint("python-docs", base.get_config().data) != first


def test_modules_are_those_of_the_library(tmp_path, monkeypatch):
    names = ["b.py", "a/x.py", "a/test/t.py", "site-packages/p.py", "_sysconfigdata_x.py", "n.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(python_docs.sysconfig, "get_path", {"stdlib": tmp_path}.get)
    assert python_docs._modules() == [tmp_path / "a" / "x.py", tmp_path / "b.py"]


def test_docstrings_come_in_the_order_of_the_source(tmp_path):
    source = '''"""Module."""
class A:
    """Class."""
    def f(self):
        """Method."""
        x = "no docstring"
        def g():
            r"""Inner \\d."""
if True:
    async def h():
        """Coroutine."""
        "neither"
'''
    path = tmp_path / "a.py"
    path.write_text(source)
    expected = ["Module.", "Class.", "Method.", r"Inner \d.", "Coroutine."]
    assert python_docs._docstrings(path) == "\n\n".join(expected)
    path.write_text("def (")
    assert python_docs._docstrings(path) == ""


def test_prose_is_unwrapped():
    long = "x" * 60
    text = f"Title\n=====\n\n{long}\ngoes on {long}\n   and on.\n\nshort\nlines\n{long}\n>>> code"
    expected = f"Title\n\n{long} goes on {long} and on.\n\nshort\nlines\n{long}\n>>> code"
    assert python_docs._prose(text) == expected
