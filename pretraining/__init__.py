"""Compare language-model pretraining objectives on the same tokens.

In a notebook: `run = pretraining.load("runs/mlm")`.
"""

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":  # imported when asked for: commands must start quickly
        from pretraining.notebook import load

        return load
    raise AttributeError(f"module 'pretraining' has no attribute {name!r}")
