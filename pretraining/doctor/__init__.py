"""What looks wrong in a run, and what usually causes it.

    for finding in doctor.examine("runs/mlm"):
        print(finding.severity, finding.text)

Only the run folder is read, while the run goes on or afterwards. The command is `python -m
pretraining.doctor`, in `__main__.py`. Objectives are not known here: they say which term is a loss
of tokens (`token_term`), and what a figure must be compared with stands beside it in
`metrics.jsonl` (`unigram_loss`, `majority_accuracy`).
"""

import pathlib

from pretraining.doctor import losses, machine, optimization, reference
from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record
from pretraining.doctor.record import read as read_record

__all__ = ["Finding", "Record", "diagnose", "examine", "read_record"]

CHECKS = (
    *optimization.CHECKS,
    *losses.CHECKS,
    *machine.CHECKS,
)


def examine(folder: str | pathlib.Path) -> list[Finding]:
    """`diagnose` of a run folder, with the references that come with the project.

    Raises:
      UserError: there is no run in the folder, or it is damaged.
    """
    return diagnose(read_record(folder), reference.load())


def diagnose(record: Record, references: list[dict] = ()) -> list[Finding]:
    """One finding of every check that applies to the run, good ones too."""
    if not record.lines:
        return [Finding("metrics", "note", "no line of metrics.jsonl has been written yet")]
    found = [check(record) for check in CHECKS]
    found += reference.compare(record, references)
    return [finding for finding in found if finding is not None]
