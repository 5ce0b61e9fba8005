"""Reference curves: what healthy runs of an objective did, with the spread between seeds.

A file `pretraining/references/<objective>-<digest>.json`:

  {"objective": ..., "term": name of the loss of tokens,
   "config": {key: value} of the keys that matter (`MATTERS`),
   "points": [{"tokens": seen, "excess": {"mean": ..., "sd": ...}, "gradient_norm": {...}}],
   "seeds": runs, "provenance": {"commit", "devices", "data"}}

`excess` is the validation loss of tokens minus that of the unigram distribution, which takes most
of the text's own difficulty out; `gradient_norm` is the median since the point before.
"""

import collections
import hashlib
import itertools
import json
import pathlib
import re

import numpy as np

from pretraining.doctor.finding import Finding
from pretraining.doctor.record import Record
from pretraining.errors import UserError
from pretraining.files import write_atomically

FOLDER = pathlib.Path(__file__).parent.parent / "references"

# Keys that must be equal for two curves to be the same but for the seed; the way in which the same
# function is computed does not count.
MATTERS = re.compile(
    r"(objective|optimizer)\."
    r"|model\.(?!attention$|execution$|remat$|logits_chunk$|dtype$)"
    r"|train\.(steps|batch_size)$|data\.(sequence_length|copies)$|init_from$"
)
_KEYS = {"objective", "term", "config", "points", "seeds", "provenance"}
_LIMIT = 4.0  # standard deviations
_FLOORS = {"excess": 0.05, "gradient_norm": 0.0}  # least standard deviation, in the figure's unit
_RELATIVE = {"excess": 0.0, "gradient_norm": 0.3}  # and as a share of the mean


# --------------------------------------------------------------------------------------- recording


def record(runs: list[Record]) -> list[dict]:
    """One reference for each group of finished runs that differ in their seeds alone.

    Raises:
      UserError: there is no such group of at least two runs, or they share no evaluation.
    """
    groups = collections.defaultdict(list)
    for run in runs:
        if run.finished and len(run.excess()[0]):
            groups[json.dumps([run.term, _data(run), matters(run)], sort_keys=True)].append(run)
    references = [_reference(group) for group in groups.values() if len(group) > 1]
    if not references:
        raise UserError(
            f"--record: of {len(runs)} runs no two are finished and differ in their seeds alone"
        )
    return references


def _reference(runs: list[Record]) -> dict:
    first = runs[0]
    curves = [_curves(run) for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not shared:
        raise UserError(f"--record: {first.folder} and the others share no evaluation")
    points = [
        {"tokens": tokens}
        | {name: _spread([curve[tokens][name] for curve in curves]) for name in _FLOORS}
        for tokens in shared
    ]
    start = first.starts[0]
    return {
        "objective": first.config["objective.name"],
        "term": first.term,
        "config": matters(first),
        "points": points,
        "seeds": len(runs),
        "provenance": {
            "commit": start["commit"],
            "devices": start["devices"],
            "data": _data(first),
        },
    }


def _curves(run: Record) -> dict[int, dict[str, float]]:
    """{tokens seen: {"excess", "gradient_norm"}} at each evaluation."""
    steps, excess = run.excess()
    at, norms = run.series("train/gradient_norm")
    found = {}
    for (before, step), value in zip(itertools.pairwise([0, *steps]), excess, strict=True):
        between = norms[(at > before) & (at <= step)]
        if len(between):
            tokens = int(step) * run.tokens_per_step
            found[tokens] = {"excess": float(value), "gradient_norm": float(np.median(between))}
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}


def matters(run: Record) -> dict:
    """The keys of the config that shape a curve, and V."""
    chosen = {key: value for key, value in run.config.items() if MATTERS.match(key)}
    return json.loads(json.dumps(chosen | {"vocabulary": len(run.counts)}, sort_keys=True))


def _data(run: Record) -> str:
    return run.starts[0]["data"][:12]


def save(references: list[dict], folder: pathlib.Path = FOLDER) -> list[pathlib.Path]:
    """Writes each reference into a file of its own, which a new one of the same config replaces."""
    folder.mkdir(exist_ok=True)
    paths = []
    for found in references:
        key = json.dumps([found["config"], found["provenance"]["data"]], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        paths.append(folder / f"{found['objective']}-{digest}.json")
        write_atomically(paths[-1], json.dumps(found, indent=1) + "\n")
    return paths


def load(folder: pathlib.Path = FOLDER) -> list[dict]:
    """All references of a folder.

    Raises:
      UserError: a file is damaged.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            reference = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if not isinstance(reference, dict) or _KEYS - reference.keys() or not reference["points"]:
            raise UserError(f"{path} is damaged: it lacks one of {', '.join(sorted(_KEYS))}")
        found.append(reference)
    return found


# --------------------------------------------------------------------------------------- comparing


def compare(run: Record, references: list[dict]) -> list[Finding]:
    """The run beside the reference of its objective whose config is nearest."""
    objective = run.config["objective.name"]
    own = [found for found in references if found["objective"] == objective]
    if not own:
        text = f"there is no reference curve of {objective}"
        return [Finding("reference", "note", text)]
    nearest = min(own, key=lambda found: len(_differences(run, found)))
    different, curve = _differences(run, nearest), _curves(run)
    findings = [_compare(name, curve, nearest, different) for name in _FLOORS]
    return [finding for finding in findings if finding is not None]


def _differences(run: Record, found: dict) -> list[str]:
    """The keys that matter in which a run is not like a reference; "text" for other tokens."""
    own, theirs = matters(run), found["config"]
    keys = [key for key in sorted(own | theirs) if own.get(key, ...) != theirs.get(key, ...)]
    return keys + ["text"] * (_data(run) != found["provenance"]["data"])


def _compare(name: str, curve: dict, found: dict, different: list[str]) -> Finding | None:
    """At the last tokens that both have seen; the reference is interpolated between its points."""
    at = [point["tokens"] for point in found["points"]]
    shared = [tokens for tokens in curve if at[0] <= tokens <= at[-1]]
    if not shared:
        return None
    tokens = max(shared)
    mean, sd = (
        float(np.interp(tokens, at, [point[name][what] for point in found["points"]]))
        for what in ("mean", "sd")
    )
    value, floor = curve[tokens][name], max(_FLOORS[name], _RELATIVE[name] * abs(mean))
    z = (value - mean) / max(sd, floor)
    figures = {"tokens": tokens, "value": value, "mean": mean, "sd": sd, "z": z}
    text = (
        f"{_TITLES[name]} at {tokens:,} tokens is {value:.3f}; {found['seeds']} seeds of the "
        f"reference have {mean:.3f} (sd {sd:.3f})"
    )
    return _judge(name, text, figures, different)


_TITLES = {"excess": "validation loss minus unigram", "gradient_norm": "the gradient norm"}


def _judge(name: str, text: str, figures: dict, different: list[str]) -> Finding:
    check = f"reference, {name.replace('_', ' ')}"
    far = abs(figures["z"]) > _LIMIT
    where = "above" if figures["z"] > 0 else "below"
    if far:
        text += f": {abs(figures['z']):.1f} standard deviations {where}"
    if different:
        listed = ", ".join(different[:8]) + (" ..." if len(different) > 8 else "")
        text += f"; for orientation only: other {listed}"
        return Finding(check, "note" if far else "ok", text, figures)
    if not far:
        return Finding(check, "ok", text, figures)
    worse = name != "excess" or figures["z"] > 0
    return Finding(
        check,
        "warning" if worse else "note",
        text,
        figures,
        (
            "a change of the code since the reference was made"
            if worse
            else "an improvement, or an answer that leaks into the input",
            "other versions of libraries, or another kind of device",
        ),
        ("a run at the commit of the reference",),
    )
