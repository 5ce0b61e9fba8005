"""Numbers as people read them."""

import re

import numpy as np


def number(value: float, form: str = "{:#.4g}") -> str:
    """A dash where there is none."""
    return form.format(value).rstrip(".") if np.isfinite(value) else "—"


def p_value(value: float) -> str:
    """Three decimals."""
    return "<.001" if value < 0.001 else f"{value:.3f}"


def tokens(value: float) -> str:
    """61,000 -> "61k"."""
    for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g}{unit}"
    return number(value, "{:.0f}")


def flops(value: float) -> str:
    """8e11 -> "8.00e+11"."""
    return number(value, "{:.2e}")


def duration(seconds: float) -> str:
    """400 -> "6.7 min"."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return number(seconds, "{:.0f} s")


def count(number: int, noun: str) -> str:
    """1, "run" -> "1 run"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def seeds(least: int, most: int) -> str:
    """How many seeds a mean is of."""
    count = f"{least}" if least == most else f"{least} to {most}"
    return f"mean of {count} seeds" if most > 1 else "1 seed"


def slug(text: str) -> str:
    """A text as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
