"""Faults injected into the real program, one at a time: `python -m tests.faults --all`."""
