"""A cache that holds the token stores that are there, and no compiled program."""

import os
import pathlib

from configs import base
from pretraining.data import cache
from pretraining.errors import UserError


def environment(folder: pathlib.Path) -> dict[str, str]:
    """The variable with which a process finds such a cache, in a new folder.

    What is compiled goes there, as in a user's own cache: with the same locks and the same bound.

    Raises:
      UserError: compiled programs would go to another place.
    """
    if place := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise UserError(
            f"JAX_COMPILATION_CACHE_DIR={place}: unset it, nothing compiled may be found"
        )
    there = cache.root(base.get_config().data)
    folder.mkdir()
    for name in ("stores", "tokenizers"):
        (folder / name).symlink_to(there / name)
    return {"PRETRAINING_CACHE": str(folder)}
