"""What a check of a run gives."""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """The answer of one check.

    Attributes:
      check: what was looked at.
      severity: ok; note: worth knowing; warning: something is probably wrong.
      text: what was found, with its numbers.
      figures: the numbers, for machines.
      causes: what usually causes it, the most frequent first.
      advice: what to try.
    """

    check: str
    severity: Literal["ok", "note", "warning"]
    text: str
    figures: Mapping[str, float] = {}
    causes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
