"""Every check, applied to a run."""

import pathlib

from pretraining.doctor import losses, machine, optimization, reference
from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record, read

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
    return diagnose(read(folder), reference.load())


def diagnose(record: Record, references: list[dict] = ()) -> list[Finding]:
    """One finding of every check that applies to the run, good ones too."""
    if not record.lines:
        nothing = Finding("metrics", "note", "no line of metrics.jsonl has been written yet")
        return [nothing, machine.progress(record)]
    found = [check(record) for check in CHECKS]
    found += reference.compare(record, references)
    return [finding for finding in found if finding is not None]
