"""The notebooks, executed on tiny runs."""

import json
import os
import shutil
import sys

import nbformat
import pytest
import traitlets
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.running import ROOT

FOLDER = ROOT / "experiments" / "notebooks"


class ThisPython(KernelSpecManager):
    """The interpreter that runs the tests, whatever kernels the machine knows."""

    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name=kernel_name, language="python")


class Kernel(AsyncKernelManager):
    """A kernel of that interpreter, which the client shuts down itself, as its class is its own."""

    @traitlets.default("kernel_spec_manager")
    def _kernel_spec_manager_default(self):
        return ThisPython(parent=self)


def execute(name: str, **variables: str) -> list[str]:
    """What its code cells gave: the text of each, and the kinds of what was drawn."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=Kernel,
        timeout=300,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    client.execute(
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    )
    return [_outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(cell) -> str:
    told = []
    for output in cell.outputs:
        told.append(output.get("text", ""))
        for kind, content in output.get("data", {}).items():
            told.append(f"<{kind}>" if kind.startswith("image/") else str(content))
    return "\n".join(told)


def code_of(name: str) -> list[str]:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def given(name: str, outputs: list[str], code: str) -> str:
    """What the one cell that holds `code` gave."""
    (found,) = [
        output for source, output in zip(code_of(name), outputs, strict=True) if code in source
    ]
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_stored_and_cells_are_short(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= 20


# What an objective of each kind has an answer to, and what it has not.
@pytest.mark.parametrize(
    "objective, answers, refuses",
    [
        ("masked_lm", "run.fill_mask", "run.generate"),
        ("causal_lm", "run.generate", "run.fill_mask"),
    ],
)
def test_read_a_checkpoint(objective, answers, refuses, trained):
    name = "read_a_checkpoint.ipynb"
    outputs = execute(name, PRETRAINING_RUN=str(trained[objective]))
    told = lambda code: given(name, outputs, code)
    assert "step 40" in told("pretraining.load")
    assert "eval/unigram_loss" in told("run.metrics")
    for code in ("run.plot()", "display.attention(found)", "display.attention(found, ", "run.show"):
        assert "<image/png>" in told(code), code
    assert f"not with {objective}" in told(refuses)
    assert told(answers).strip()
    assert "not with" not in told(answers)
    assert told("run.neighbours").count("\n") >= 8
    assert told("observe.nearest").count("nearest") == 4
    assert '<span title="-' in told("run.colour")
    assert "in order -" in told("run.score")


def write_sweep(folder, source) -> None:
    """Two mask rates with two seeds each: .4 is .5 nats above, seed 1 is .1 above seed 0."""
    for rate, above in ((15, 0.0), (40, 0.5)):
        for seed in (0, 1):
            run = folder / "runs" / f"rate{rate}-seed{seed}"
            shutil.copytree(source, run, ignore=shutil.ignore_patterns("checkpoints"))
            config = json.loads((run / "config.json").read_text())
            config["objective"]["mask_rate"] = rate / 100
            config["seed"]["init"] = seed
            (run / "config.json").write_text(json.dumps(config))
            lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            changed = [
                line | {"eval/loss": 5 + above + seed / 10} if "eval/loss" in line else line
                for line in lines
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in changed))


def test_compare_runs(trained, tmp_path):
    write_sweep(tmp_path, trained["masked_lm"])
    name = "compare_runs.ipynb"
    outputs = execute(name, PRETRAINING_SWEEP=str(tmp_path))
    told = lambda code: given(name, outputs, code)
    assert "rate40-seed1" in told("results.frame(folder)")
    assert "<image/png>" in told("results.curves")
    assert "<image/png>" in told("errorbar")
    rates = told("keys[0] if")
    assert "objective.mask_rate" in rates
    # Means of 5.0, 5.1 and 5.5, 5.6; both have a standard deviation of .1 / sqrt(2).
    assert [number in rates for number in ("5.05", "5.55", "0.070711")] == [True] * 3
    paired = told("by_seed[baseline]")
    assert paired.count("0.5") >= 2
    assert "-0.5" not in paired
    assert "rate40" in told("standard error")


@pytest.mark.parametrize("name", ["read_a_checkpoint.ipynb", "compare_runs.ipynb"])
def test_a_missing_folder_is_told_in_the_first_cell(name, tmp_path):
    place = str(tmp_path / "nothing")
    with pytest.raises(CellExecutionError, match="nothing holds no run") as told:
        execute(name, PRETRAINING_RUN=place, PRETRAINING_SWEEP=place)
    assert "write a path into this cell" in str(told.value)
