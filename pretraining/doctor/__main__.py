"""Says in words what looks wrong in a run, and what usually causes it.

    python -m pretraining.doctor runs/mlm [--json] [--all]
    python -m pretraining.doctor runs/objectives --record

Of a folder of runs (a sweep) it goes through all of them; runs may still be going on. It compares
the curves with what is known without a model (log V, the unigram distribution, the majority) and
with reference curves of healthy runs, and looks at learning rate, gradients and time. Exit status:
0 = nothing suspicious, 1 = warnings, 2 = a mistake.
"""

import json
import sys
import textwrap

from pretraining import cli

_WIDTH = 100


def main(workdir: str, json: bool = False, all: bool = False, record: bool = False) -> int:
    """Examines a run, or every run of a folder; see the module's docstring."""
    from pretraining import doctor
    from pretraining.doctor import reference
    from pretraining.doctor.record import find

    records = [doctor.read_record(folder) for folder in find(workdir)]
    if record:
        for path in reference.save(reference.record(records)):
            print(path)
        return 0
    references = reference.load()
    found = [(each, doctor.diagnose(each, references)) for each in records]
    print(_as_json(found) if json else "\n\n".join(_in_words(*each, all) for each in found))
    return int(any(f.severity == "warning" for _, findings in found for f in findings))


def _as_json(found: list) -> str:
    runs = [
        {"folder": str(run.folder), "step": run.step, "findings": [f._asdict() for f in findings]}
        for run, findings in found
    ]
    return json.dumps(runs, indent=1)


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


if __name__ == "__main__":
    cli.run(
        main,
        sys.modules[__name__].__doc__,
        with_config=False,
        positional="workdir",
        json="flag: findings for machines",
        all="flag: what is in order, too",
        record="flag: writes reference curves of the finished runs, instead of examining them",
    )
