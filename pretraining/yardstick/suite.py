"""All figures of a run by which it is compared: `python -m pretraining.evaluate --suite=yardstick`.

- `family/...`: of its own predictions of held-out tokens; see family.py. They compare runs of one
  `Objective.family` alone.
- `blimp/...`: grammatical minimal pairs; see blimp.py.
- `probe/...`: what a linear classifier reads out of its vectors; see probe.py.

The last two, of the files in --tasks (see tasks.py), compare runs of any objectives.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

import jax

from pretraining.data.prepare import Prepared
from pretraining.errors import UserError
from pretraining.yardstick import blimp, family, probe, tasks

NAME = "yardstick"
# Of how all figures are computed; goes up with every change that moves one.
PROTOCOL = 2


def read(folder: str | None, sample: str) -> tasks.Tasks:
    """The tasks of a folder, None = no tasks; says which are missing.

    Raises:
      UserError: an unknown sample, no such folder, or a file is missing or malformed.
    """
    if sample not in tasks.SAMPLES:
        raise UserError(f"--sample={sample!r} is not one of {', '.join(tasks.SAMPLES)}")
    found = tasks.NONE
    if folder is not None:
        found = tasks.read(pathlib.Path(folder), tasks.SAMPLES[sample])
    if found.left_out:
        given = "without --tasks" if folder is None else f"--tasks={folder}"
        print(f"{given}: left out, {', '.join(found.left_out)}", file=sys.stderr)
    return found


def measure(run, prepared: Prepared, found: tasks.Tasks, sample: str) -> dict[str, Any]:
    """What is stored of one checkpoint, "step" and "ema" apart; computes on the first device.

    Args:
      run: a notebook.Run.
      prepared: of `prepare_validation`.
      found: of `read`.
      sample: "quick" or "full", how much is read of each.

    Returns:
      "suite", "family", "settings" (what must be equal if two runs are to be compared; its part
      "family" concerns `family/...` alone, "blimp_score" `blimp/...`; "cut" is how many texts were
      longer than `payload`, a row of the model, so that their beginning was read), "figures"
      {name: number} and "left_out" (tasks that were not there).
    """
    run = dataclasses.replace(run, params=jax.device_put(run.params, jax.devices()[0]))
    rows = family.SAMPLES[sample]
    of_tasks, cut = _of_tasks(run, found)
    own = family.measure(run, prepared.validation, rows)
    return {
        "suite": NAME,
        "family": run.objective.family,
        "settings": {
            "protocol": PROTOCOL,
            "sample": sample,
            "tasks": found.digests,
            "payload": run.payload,
            "vocabulary": run.vocabulary.fingerprint,
            "dtype": run.config.model.dtype,
            "cut": cut,
            "blimp_score": blimp.kind(run.objective),
            "family": {
                "validation": prepared.fingerprint,
                "rate": family.RATE,
                "seed": family.SEED,
                **rows._asdict(),
            },
        },
        "figures": {f"family/{name}": value for name, value in own.items()} | of_tasks,
        "left_out": list(found.left_out),
    }


def merge(path: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
    """What is to be stored at `path`: the new evaluation and what only the older one there has.

    The older one gives way as a whole, and a line says so, where a setting that both have differs:
    other task files, another protocol. `probe/average` is there as soon as its parts are, whichever
    evaluation they come from.
    """
    if not path.exists():
        return new
    parts, ours = ("tasks", "cut"), new["settings"]
    flat = lambda x: {k: v for k, v in x.items() if k not in parts} | x["tasks"] | x["cut"]
    now = flat(ours)
    try:
        old = json.loads(path.read_text())
        settings, figures, left_out = old["settings"], dict(old["figures"]), set(old["left_out"])
        before = flat(settings)
    except (ValueError, TypeError, KeyError, AttributeError):
        print(f"{path} is replaced: it is damaged", file=sys.stderr)
        return new
    other = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
    if other:
        print(f"{path} is replaced: other settings ({', '.join(other)})", file=sys.stderr)
        return new
    joined = {part: settings[part] | ours[part] for part in parts}
    return new | {
        "settings": ours | joined,
        "figures": _with_average(figures | new["figures"]),
        "left_out": [name for name in new["left_out"] if name in left_out],
    }


def _with_average(figures: dict[str, float]) -> dict[str, float]:
    parts = [f"probe/{name}" for name in probe.AVERAGED]
    if not set(parts) <= set(figures):
        return figures
    return figures | {"probe/average": statistics.fmean(figures[name] for name in parts)}


def _of_tasks(run, found: tasks.Tasks) -> tuple[dict[str, float], dict[str, int]]:
    figures, cut = {}, {}
    if found.blimp:
        of_pairs, cut["blimp"] = blimp.measure(run, found.blimp)
        figures |= {f"blimp/{name}": value for name, value in of_pairs.items()}
    if found.glue or found.conll2003:
        of_probes, of_texts = probe.measure(run, found)
        cut |= of_texts
        figures |= {f"probe/{name}": value for name, value in of_probes.items()}
    return figures, cut
