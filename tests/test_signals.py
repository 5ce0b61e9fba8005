"""The signals that ask a program to stop."""

import signal

import pytest

from pretraining import signals


@pytest.mark.parametrize(
    "first, usual",
    [
        (signal.SIGTERM, {signal.SIGTERM, signal.SIGINT}),
        (signal.SIGINT, {signal.SIGINT}),  # SIGTERM follows from whoever started the process
    ],
)
def test_the_first_is_noted_and_which_second_one_acts_as_usual(first, usual):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with signals.received() as numbers:
        assert numbers == []
        signal.raise_signal(first)
        assert numbers == [first]
        for number in (signal.SIGTERM, signal.SIGINT):
            assert (signal.getsignal(number) == signal.SIG_DFL) == (number in usual)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
