"""Signals that ask a program to stop."""

import contextlib
import signal
from collections.abc import Iterator

_ASK = signal.SIGTERM, signal.SIGINT


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; a second one, of either, acts as usual."""
    numbers: list[int] = []

    def note(number, _frame):
        numbers.append(number)
        for each in _ASK:
            signal.signal(each, signal.SIG_DFL)

    old = {number: signal.signal(number, note) for number in _ASK}
    try:
        yield numbers
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
