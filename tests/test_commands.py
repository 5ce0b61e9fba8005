"""Every command answers --help, and mistakes, before it imports what takes seconds."""

import sys

import pytest

from experiments.speed.start import _is_command, commands
from tests import running

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow", "matplotlib", "pandas", "scipy"}
PROGRAM = """
import runpy, sys
sys.argv = ["program", *sys.argv[1:]]
try:
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("status", end.code)
print("imported", *sorted(HEAVY & set(sys.modules)))
"""


def run(module: str, *words: str) -> tuple[str, str]:
    """What a command prints, and "status 0", "imported ..." as its last two lines."""
    program = PROGRAM.replace("MODULE", repr(module)).replace("HEAVY", repr(HEAVY))
    ended = running.finish(running.start([sys.executable, "-c", program, *words]))
    assert ended.status == 0, ended.err
    return ended.out.splitlines(), ended.err


def test_all_commands_are_known():
    assert {
        "pretraining.benchmark",
        "pretraining.data.prepare",
        "pretraining.doctor",
        "pretraining.evaluate",
        "pretraining.export",
        "pretraining.plan",
        "pretraining.population",
        "pretraining.replay",
        "pretraining.show",
        "pretraining.train",
        "experiments.report",
        "experiments.run",
        "experiments.speed.costs",
        "experiments.speed.peers",
        "experiments.speed.population",
        "experiments.speed.preparation",
        "experiments.speed.start",
    } <= set(commands())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("cli.run('name', __doc__)", True),
        ("cli.end_with(lambda: main(sys.argv[1:]))", True),
        ("worker.serve(start)", False),
    ],
)
def test_a_command_is_a_main_block_that_goes_through_cli(body, expected):
    assert _is_command(f"if __name__ == '__main__':\n    {body}\n") is expected
    assert not _is_command(f"def later():\n    {body}\n")


@pytest.mark.parametrize("module", commands())
def test_help_imports_nothing_heavy(module):
    out, _ = run(module, "--help")
    assert "Options:" in out
    assert out[-2:] == ["status 0", "imported"]


@pytest.mark.parametrize("module", commands())
def test_a_mistake_is_told_as_soon(module):
    out, err = run(module, "--wrokdir=runs/mlm")
    assert "wrokdir" in err
    assert out[-2:] == ["status 2", "imported"]


def test_the_keys_of_a_recipe_are_listed_without_importing_anything_heavy():
    out, _ = run("pretraining.train", "--config=configs/masked_lm.py:tiny", "--help")
    assert any("--config.objective.mask_rate=0.15" in line for line in out)
    assert out[-2:] == ["status 0", "imported"]
