"""Signals that ask a program to stop."""

import contextlib
import signal
from collections.abc import Iterator

_ASK = signal.SIGTERM, signal.SIGINT


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT.

    A second one of the same, and Ctrl-C in any case, acts as usual. SIGTERM after Ctrl-C is noted
    too: who starts several processes passes it on at once.
    """
    numbers: list[int] = []

    def note(number, _frame):
        numbers.append(number)
        for each in {number, signal.SIGINT}:
            signal.signal(each, signal.SIG_DFL)

    old = {number: signal.signal(number, note) for number in _ASK}
    try:
        yield numbers
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
