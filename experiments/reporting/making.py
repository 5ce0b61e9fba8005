"""How a sweep was made, as the report tells it: data, code, machine, command and dates."""

import shlex
from collections.abc import Iterable
from typing import Any

from experiments.reporting.page import Block, Heading, Table
from experiments.reporting.source import Sweep

_KEYS = {
    "corpus": "data.corpus",
    "vocabulary size": "tokenizer.size",
    "sequence length": "data.sequence_length",
}
_STARTS = {
    "commit": lambda start: start["commit"] or "unknown",
    "jax": lambda start: start["versions"].get("jax", "unknown"),
    "Python": lambda start: start["python"],
    "devices": lambda start: "{} x {}".format(*start["devices"]),
    "cores": lambda start: start["cores"],
}
_UNKNOWN = "—"


def section(sweep: Sweep) -> list[Block]:
    """What another person needs to make the runs again, over all starts of all runs."""
    configs = [result.config for result in sweep.results]
    starts = [start for result in sweep.results for start in result.provenance]
    rows = [(what, _listed(c[key] for c in configs if key in c)) for what, key in _KEYS.items()]
    rows += [(what, _listed(map(value, starts))) for what, value in _STARTS.items()]
    times = sorted(start["time"] for start in starts if "time" in start)
    rows += [(f"{what} start", _listed(at)) for what, at in _ends(times).items()]
    if sweep.told:
        rows.append(("command", _command(sweep)))
    told = "Of all runs, at every start of theirs; several values where they differ."
    return [Heading(2, "How this was made"), Table(("what", "value"), rows, told)]


def decision_rule(sweep: Sweep) -> Iterable[str]:
    """Where the rule is written down by which the question is decided."""
    if sweep.question:
        path = sweep.question.folder / "README.md"
        yield (
            f"The decision rule is in the question's README, {path}."
            if path.is_file()
            else f"No decision rule is written down: there is no {path}."
        )


def _ends(times: list[str]) -> dict[str, list[str]]:
    return {"first": times[:1], "last": times[-1:]}


def _command(sweep: Sweep) -> str:
    told = sweep.told
    words = ["python", "-m", "experiments.run", told["question"], f"--workdir={sweep.folder}"]
    words.append(f"--protocol={told['protocol']}")
    words += [f"--tasks={told['tasks']}"] if told["tasks"] else []
    words += [f"--config.{key}={value}" for key, value in told["overrides"].items()]
    return shlex.join(words)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values))) or _UNKNOWN
