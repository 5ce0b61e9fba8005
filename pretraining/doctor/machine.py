"""Checks of where the time went, and of what ran."""

import platform
import time

from pretraining import goodput, run_folder, signs
from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record

_SECONDS = 30.0  # of updates, from which shares of time mean something
_WAIT, _LONG_WAIT = 0.1, 0.3  # shares of the time of updates
_GOODPUT = 0.5
_SILENT = 600.0  # seconds without a sign of life after which a run counts as stopped


def progress(record: Record) -> Finding:
    """How far it is, and whether it goes on."""
    figures = {"step": record.step, "steps": record.steps}
    text = f"step {record.step:,} of {record.steps:,}"
    if record.finished:
        return Finding("progress", "ok", text + ", finished", figures)
    sign = signs.read(record.folder)
    if sign and sign["ended"] is None:
        if sign["host"] != platform.node():  # whose clock may be another
            text += f"; the last sign of life is of host {sign['host']}"
            return Finding("progress", "ok", text, figures)
        if time.time() - sign["time"] < _SILENT:
            return Finding("progress", "ok", text + ", it goes on", figures)
    why = run_folder.why_left(record.folder)
    if why and record.starts[-1]["population"]:  # it has not gone on alone since
        advice = ("python -m pretraining.train with its arguments goes on with it alone",)
        left = f"{text}, has left its population: {why}"
        return Finding("progress", "warning", left, figures, (), advice)
    why = sign["ended"] if sign and sign["ended"] else "no sign of life"
    advice = ("the command that started it, again: it resumes",)
    return Finding("progress", "note", f"{text}, stopped ({why})", figures, (), advice)


def data_wait(record: Record) -> Finding | None:
    """Do devices wait for rows?"""
    wait, updates = record.total("data_wait"), record.total("step")
    if wait + updates < _SECONDS:
        return None
    share = wait / (wait + updates)
    text = f"{share:.0%} of the time of updates is waiting for rows"
    if share < _WAIT:
        return Finding("data wait", "ok", text, {"share": share})
    return Finding(
        "data wait",
        "warning" if share >= _LONG_WAIT else "note",
        text,
        {"share": share},
        (
            "a token store on a slow file system (data.cache)",
            "rows that are not made ahead (data.prefetch=0) or by too few threads",
            "cores that other programs use",
        ),
        ("data.cache on a local disk", "data.prefetch=8 data.threads=8"),
    )


def useful_time(record: Record) -> Finding | None:
    """How much of all time made updates?"""
    totals = {phase: record.total(phase) for phase in goodput.PHASES}
    everything = sum(totals.values())
    if totals["step"] < _SECONDS:
        return None
    share = totals["step"] / everything
    others = {phase: seconds for phase, seconds in totals.items() if phase != "step"}
    worst = max(others, key=others.get)
    text = (
        f"{share:.0%} of all time made updates; next is {worst}, {others[worst] / everything:.0%}"
    )
    if share >= _GOODPUT:
        return Finding("goodput", "ok", text, {"share": share})
    causes = {
        "compile": "a short run, or many starts of it",
        "evaluate": "evaluate.every that is low, or evaluate.rows that is high",
        "save": "checkpoint.every that is low, or a slow file system",
        "lost": "crashes between two checkpoints",
        "down": "time in a queue between two starts",
        "data_wait": "rows that come too slowly",
        "prepare": "text that had to be tokenized first",
        "start": "many starts",
    }
    advice = ("every line of metrics.jsonl says where all time went (time/total/*)",)
    return Finding("goodput", "note", text, {"share": share}, (causes[worst],), advice)


def same_code(record: Record) -> Finding | None:
    """Was it one program, on one kind of machine, from start to end?"""
    seen = {
        name: {str(start.get(name)) for start in record.starts}
        for name in ("commit", "versions", "devices")
    }
    changed = [name for name, values in seen.items() if len(values) > 1]
    figures = {"starts": len(record.starts)}
    if not changed:
        return Finding("one program", "ok", f"{len(record.starts)} start(s), all alike", figures)
    return Finding(
        "one program",
        "note",
        f"{len(record.starts)} starts with different {', '.join(changed)}: the run is not exact",
        figures,
        ("an update of code or packages while the run had stopped",),
        ("provenance.jsonl says what was what",),
    )


CHECKS = (progress, data_wait, useful_time, same_code)
