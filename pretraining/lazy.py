"""Names of a package that are imported when they are asked for: commands must start quickly."""

import importlib
from collections.abc import Callable
from typing import Any


def names(package: str, **places: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
      package: its `__name__`.
      **places: name in the package -> "module.name", where it is defined in the package.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = places[name].partition(".")
        return getattr(importlib.import_module(f"{package}.{module}"), attribute)

    return get
