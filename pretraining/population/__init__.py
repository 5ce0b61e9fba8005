"""Runs that differ only in traced scalars, trained as one program.

The command is `python -m pretraining.population`, in `__main__.py`. `check.py` says which runs one
program can train, `vmapped.py` is that program, `runs.py` are the runs as the training loop of
`train.py` works with them: all as if they were one.
"""
