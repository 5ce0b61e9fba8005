"""Compare language-model pretraining objectives on the same tokens.

In a notebook: `run = pretraining.load("runs/mlm")`.
"""

from pretraining import lazy

__all__ = ["load"]

__getattr__ = lazy.names(__name__, load="notebook.load")
