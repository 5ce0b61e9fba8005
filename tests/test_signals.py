"""The signals that ask a program to stop."""

import signal

import pytest

from pretraining import signals


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_noted_and_a_second_of_either_acts_as_usual(first):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with signals.received() as numbers:
        assert numbers == []
        signal.raise_signal(first)
        assert numbers == [first]
        for number in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
