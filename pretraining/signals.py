"""Signals that ask a program to stop."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; a second one acts as usual."""
    numbers: list[int] = []

    def note(number, _frame):
        numbers.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield numbers
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
