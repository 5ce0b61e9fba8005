"""Tests that injure the program, too: each file is one row of the table."""

import pathlib
import sys
import tempfile
import xml.etree.ElementTree as ET

from tests.faults.outcome import Outcome
from tests.running import finish, start

FILES = (
    "data/test_full_disk.py",
    "data/test_hostile_corpora.py",
    "test_distributed.py",
    "test_processes.py",
    "test_hostile_configs.py",
    "test_hostile_files.py",
)
TIMEOUT_S = 3600


def run(name: str, folder: pathlib.Path) -> Outcome:
    """Runs one of FILES, with temporary files below `folder`; counts its tests."""
    own = pathlib.Path(tempfile.mkdtemp(dir=folder))
    report = own / "report.xml"
    words = [sys.executable, "-m", "pytest", "-n0", f"tests/{name}"]
    words += [f"--junitxml={report}", f"--basetemp={own / 'tests'}"]
    ended = finish(start(words, devices=8), TIMEOUT_S)
    outcome = Outcome(name, "-")
    if report.exists():
        read(report, outcome)
    if ended.status and not outcome.complaints:
        outcome.complaints.append(f"{ended.problem()} {ended.out[-2000:]}")
    return outcome


def read(report: pathlib.Path, outcome: Outcome) -> None:
    """Adds the tests of a report in JUnit's format."""
    reasons = []
    for case in ET.parse(report).getroot().iter("testcase"):
        name = case.get("name")
        if (skipped := case.find("skipped")) is not None:
            reasons.append(f"{name} ({skipped.get('message')})")
            continue
        wrong = [*case.iter("failure"), *case.iter("error")]
        outcome.count(f"{name}: {wrong[0].get('message')}" if wrong else None)
    passed, failed = outcome.survived, outcome.injected - outcome.survived
    outcome.note = f"{passed} passed, {failed} failed, {len(reasons)} skipped"
    outcome.skipped = "; ".join(reasons)
