"""Says in words what looks wrong in a run, and what usually causes it.

    python -m pretraining.doctor runs/mlm [--json] [--full]
    python -m pretraining.doctor runs/objectives --record

Of a folder of runs (a sweep) it goes through all of them; runs may still be going on. It compares
the curves with what is known without a model (log V, the unigram distribution, the majority) and
with reference curves of healthy runs, and looks at learning rate, gradients and time. Exit status:
0 = nothing suspicious, 1 = warnings, or runs that cannot be read, 2 = a mistake.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.doctor.__main__",
        __doc__,
        with_config=False,
        positional="workdir",
        json="flag: findings for machines",
        full="flag: what is in order, too",
        record="flag: writes reference curves of the finished runs, instead of examining them",
    )

import os
import sys
import textwrap
from json import dumps

from pretraining import doctor
from pretraining.doctor import reference
from pretraining.doctor.record import find
from pretraining.errors import UserError

_WIDTH = 100


def main(workdir: str, json: bool = False, full: bool = False, record: bool = False) -> int:
    """Examines a run, or every run of a folder; see the module's docstring."""
    records, unread = _read(find(workdir))
    if record:
        _print("\n".join(map(str, reference.save(reference.record(records)))))
        return int(unread)
    references = reference.load()
    found = [(each, doctor.diagnose(each, references)) for each in records]
    _print(_as_json(found) if json else "\n\n".join(_in_words(*each, full) for each in found))
    return int(unread or any(f.severity == "warning" for _, findings in found for f in findings))


def _read(folders: list) -> tuple[list, bool]:
    """The runs that can be read, and whether there are others, which are named.

    Raises:
      UserError: none can be read.
    """
    records, errors = [], []
    for folder in folders:
        try:
            records.append(doctor.read_record(folder))
        except UserError as error:
            errors.append(error)
    if not records:
        raise errors[0]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return records, bool(errors)


def _print(text: str) -> None:
    """Prints, as far as anybody reads it (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what Python still has to write at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_json(found: list) -> str:
    runs = [
        {"folder": str(run.folder), "step": run.step, "findings": [f._asdict() for f in findings]}
        for run, findings in found
    ]
    return dumps(runs, indent=1)


def _in_words(run, findings: list, everything: bool) -> str:
    counts = {
        severity: sum(f.severity == severity for f in findings) for severity in ("warning", "note")
    }
    head = f"{run.folder}  step {run.step:,} of {run.steps:,}"
    lines = [f"{head}: {counts['warning']} warnings, {counts['note']} notes"]
    for severity in ("warning", "note", *["ok"] * everything):
        lines += [_paragraph(f) for f in findings if f.severity == severity]
    fine = [f.check for f in findings if f.severity == "ok"]
    if fine and not everything:
        lines.append(_wrap("fine: ", ", ".join(fine)))
    return "\n".join(lines)


def _paragraph(finding) -> str:
    lines = [_wrap(f"{finding.severity}: {finding.check}: ", finding.text)]
    lines += [_wrap("    usual cause: ", cause) for cause in finding.causes]
    lines += [_wrap("    try: ", advice) for advice in finding.advice]
    return "\n".join(lines)


def _wrap(label: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent="      ")
