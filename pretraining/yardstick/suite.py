"""All figures of a run by which it is compared: `python -m pretraining.evaluate --suite=yardstick`.

- `family/...`: of its own predictions of held-out tokens; see family.py. They compare runs of one
  `Objective.family` alone.
- `blimp/...`: grammatical minimal pairs; see blimp.py.
- `probe/...`: what a linear classifier reads out of its vectors; see probe.py.

The last two, of the files in --tasks (see tasks.py), compare runs of any objectives.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import jax

from pretraining.data.prepare import Prepared
from pretraining.errors import UserError
from pretraining.yardstick import blimp, family, probe, tasks

NAME = "yardstick"


def read(folder: str | None, sample: str) -> tasks.Tasks:
    """The tasks of a folder, None = no tasks; says which are missing.

    Raises:
      UserError: an unknown sample, no such folder, or a file is missing or malformed.
    """
    if sample not in tasks.SAMPLES:
        raise UserError(f"--sample={sample!r} is not one of {', '.join(tasks.SAMPLES)}")
    if folder is None:
        return tasks.NONE
    found = tasks.read(pathlib.Path(folder), tasks.SAMPLES[sample])
    if found.left_out:
        print(f"--tasks={folder}: left out, {', '.join(found.left_out)}", file=sys.stderr)
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
      "family" concerns `family/...` alone), "figures" {name: number}, "cut" (how many texts were
      longer than a row of the model, so that their beginning was read) and "left_out" (tasks that
      the folder does not have).
    """
    run = dataclasses.replace(run, params=jax.device_put(run.params, jax.devices()[0]))
    rows = family.SAMPLES[sample]
    of_tasks, cut = _of_tasks(run, found)
    own = family.measure(run, prepared.validation, rows)
    return {
        "suite": NAME,
        "family": run.objective.family,
        "settings": {
            "sample": sample,
            "tasks": found.digests,
            "family": {
                "validation": prepared.fingerprint,
                "vocabulary": run.vocabulary.fingerprint,
                "payload": run.payload,
                "rate": family.RATE,
                "seed": family.SEED,
                **rows._asdict(),
            },
        },
        "figures": {f"family/{name}": value for name, value in own.items()} | of_tasks,
        "cut": cut,
        "left_out": list(found.left_out),
    }


def _of_tasks(run, found: tasks.Tasks) -> tuple[dict[str, float], dict[str, int]]:
    figures, cut = {}, {}
    if found.blimp:
        of_pairs, cut["blimp"] = blimp.measure(run, found.blimp)
        figures |= {f"blimp/{name}": value for name, value in of_pairs.items()}
    if found.glue or found.conll2003:
        of_probes, cut["probe"] = probe.measure(run, found)
        figures |= {f"probe/{name}": value for name, value in of_probes.items()}
    return figures, cut
