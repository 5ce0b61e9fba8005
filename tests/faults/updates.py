"""Updates that go wrong: not finite, or a loss that jumps."""

import functools
import json
import math
import pathlib
import re

import numpy as np

from pretraining import guard, metrics
from pretraining.data import loader, prepare
from tests.faults import bench as runs
from tests.faults import faulty
from tests.faults.bench import Bench
from tests.faults.outcome import Outcome

# ---------------------------------------------------------------------------------------- NaN


def not_finite(bench: Bench, seed: int, kinds=("stop", "skip", "gradient", "for ever")) -> Outcome:
    """A loss or only a gradient of NaN, at one update, or at all: stopped, or skipped and counted;
    made again.
    """
    outcome = Outcome("loss not finite", bench.objective)
    bench = faulty.install(bench)
    step = int(runs.generator(bench, seed).integers(runs.SAVE_EVERY + 1, runs.STEPS - 1))
    for kind in kinds:
        folder = bench.folder / f"nan_{kind.replace(' ', '_')}"
        _KINDS[kind](bench, folder, step, outcome)
    return outcome


def _stop(bench: Bench, folder: pathlib.Path, step: int, outcome: Outcome) -> None:
    saved = (step - 1) // runs.SAVE_EVERY * runs.SAVE_EVERY
    ended = runs.train(bench, folder, {"objective.fault": "nan", **faulty.during(step)})
    told = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    pattern = rf"error: update {step} is not finite .* rows [\d, ]*.* checkpoint is that of step "
    ok = len(told) == 1 and re.match(pattern + str(saved), told[0]) and "Traceback" not in ended.err
    outcome.count(ended.problem(2), None if ok else f"not told in one line: {ended.err}")
    outcome.complaints += replay_complaints(bench, folder, step)


def _skip(bench: Bench, folder: pathlib.Path, step: int, outcome: Outcome, fault="nan") -> None:
    changes = {"objective.fault": fault, "guard.non_finite": "skip", "log.every": 9}
    ended = runs.train(bench, folder, changes | faulty.during(step))
    lines = {line["step"]: line for line in metrics.read(folder / metrics.FILE)}
    skipped = {number: line["train/skipped"] for number, line in lines.items()}
    right = step in lines and skipped == {number: float(number >= step) for number in lines}
    by_loss = lines[step]["train/loss"] is None if step in lines else None
    bad = [name for name, leaf in runs.leaves(folder).items() if not np.isfinite(leaf).all()]
    outcome.count(
        ended.problem(),
        None if right else f"skipped by step: {skipped}",
        None if by_loss == (fault == "nan") else f"the loss is not finite: {by_loss}",
        None if f"warning: skipped: update {step} is" in ended.out else "the skip is not told",
        f"not finite: {', '.join(bad)}" if bad else None,
    )
    outcome.complaints += replay_complaints(bench, folder, step)
    ordinary = max(number for number in lines if number != step and number % 9 == 0)
    outcome.complaints += replay_complaints(bench, folder, ordinary, kept=False)


def _for_ever(bench: Bench, folder: pathlib.Path, step: int, outcome: Outcome) -> None:
    changes = {"objective.fault": "nan", "guard.non_finite": "skip"}
    first = min(step, runs.STEPS - guard.MOST_SKIPPED - 2)
    ended = runs.train(bench, folder, changes | faulty.during(first, runs.STEPS))
    last = first + guard.MOST_SKIPPED - 1
    told = rf"error: {guard.MOST_SKIPPED} updates in a row were skipped, .*; update {last} is"
    found = re.search(told, ended.err)
    outcome.count(ended.problem(2), None if found else f"not told: {ended.err}")


_KINDS = {
    "stop": _stop,
    "skip": _skip,
    "gradient": functools.partial(_skip, fault="gradient"),
    "for ever": _for_ever,
}


def replay_complaints(
    bench: Bench, folder: pathlib.Path, step: int, kept: bool = True
) -> list[str]:
    """Complaints unless `replay` makes an update again as it was, by what it prints.

    Args:
      kept: whether its batch was kept; else its line of metrics is held against it.
    """
    ended = runs.replay(bench, folder, step)
    if ended.status:
        return [f"replay of {step}: {ended.problem()}"]
    if not kept:
        return _unlike_line(ended.out, folder, step)
    found = re.findall(r"^  (\S+) .*, (equal|NOT equal)$", ended.out, re.M)
    complaints = [f"replay of {step}: {name} is {same}" for name, same in found if same != "equal"]
    for part in ("the rows are those that were kept", "row "):
        if part not in ended.out:
            complaints.append(f"replay of {step} does not say {part!r}")
    return complaints + ([] if len(found) >= 8 else [f"replay of {step}: {ended.out}"])


def _unlike_line(text: str, folder: pathlib.Path, step: int) -> list[str]:
    (line,) = [each for each in metrics.read(folder / metrics.FILE) if each["step"] == step]
    printed = dict(re.findall(r"^  (\S+) +(\S+)$", text, re.M))
    names = [key for key in line if key.startswith("train/") and key != "train/rewinds"]
    wrong = [key for key in names if repr(line[key]) != printed.get(key.removeprefix("train/"))]
    return [f"replay of {step}: {key} is not {line[key]!r}" for key in wrong]


# --------------------------------------------------------------------------------------- spikes

_SPIKY = {"guard.spike": 20.0, "guard.spike_memory": 5, "guard.rewinds": 1, "checkpoint.keep": 9}


def spike(bench: Bench, seed: int, kinds=("row", "killed", "again")) -> Outcome:
    """A loss that jumps because of one row: the run goes back and leaves the row out."""
    outcome, generator = Outcome("loss spike", bench.objective), runs.generator(bench, seed)
    bench = faulty.install(bench)
    step = int(generator.integers(runs.SAVE_EVERY + 2, 2 * runs.SAVE_EVERY + 1))
    culprit = batch(bench, step - 1).tokens[generator.integers(16)].tolist()
    changes = _SPIKY | {"objective.culprit": tuple(culprit)}
    wanted = bench.folder / "spike_row"
    _go_back(bench, wanted, step, changes, outcome)
    if "killed" in kinds:
        _killed_after(bench, bench.folder / "spike_killed", step, changes, outcome, wanted)
    if "again" in kinds:
        _spike_again(bench, bench.folder / "spike_again", step, outcome)
    return outcome


def batch(bench: Bench, number: int):
    """Batch `number` of the rows as they lie, from 0."""
    prepared = prepare.prepare(config := _config(bench))
    batches = loader.train_batches(prepared.train, config, number)
    rows = next(batches)
    batches.close()
    return rows


def _config(bench: Bench):
    from pretraining import config as config_lib

    overrides = bench.overrides | {
        key: str(bench.overrides[key]) for key in ("data.corpus", "data.cache")
    }
    return config_lib.load(f"configs/{bench.objective}.py:tiny", overrides)


def _go_back(bench: Bench, folder: pathlib.Path, step: int, changes, outcome: Outcome) -> None:
    ended = runs.train(bench, folder, changes)
    outcome.count(ended.problem(), *_rewound(folder, step), *_each_once(folder))
    if (count := ended.out.count("standard deviations above")) != 1:
        outcome.complaints.append(f"{count} spikes are told instead of one")
    outcome.complaints += replay_complaints(bench, folder, step)  # of the branch that was left
    outcome.complaints += replay_complaints(bench, folder, step + 2, kept=False)


def _rewound(folder: pathlib.Path, step: int) -> list[str]:
    """Complaints unless one rewind is noted, from `step` to the checkpoint before it."""
    saved = (step - 1) // runs.SAVE_EVERY * runs.SAVE_EVERY
    noted = guard.read_rewinds(folder)
    wanted = {"spike": step, "checkpoint": saved, "skipped_batches": step - saved}
    if len(noted) != 1 or noted[0] != noted[0] | wanted:
        return [f"rewinds: {noted}, not {wanted}"]
    kept = json.loads((folder / guard.OFFENDING / f"{step}-0.json").read_text())["figures"]
    usual = metrics.read(folder / metrics.FILE)[step - 1]["train/loss"]
    return [] if kept["loss"] > 5 * usual else [f"a spike of {kept['loss']} beside {usual}"]


def _each_once(folder: pathlib.Path) -> list[str]:
    steps = [line["step"] for line in metrics.read(folder / metrics.FILE)]
    return [] if steps == list(range(1, runs.STEPS + 1)) else [f"metrics of the steps {steps}"]


def _killed_after(bench, folder, step, changes, outcome: Outcome, wanted: pathlib.Path) -> None:
    """Killed after the rewind, before the next checkpoint or after it."""
    process = runs.launch(bench, folder, changes)
    rewound = lambda: (folder / guard.REWINDS).exists() and runs.last_step(folder) > step
    late = runs.kill_when(process, rewound)
    outcome.count(late, runs.train(bench, folder, changes).problem(), *_rewound(folder, step))
    outcome.compare(folder, wanted)


def _spike_again(bench: Bench, folder: pathlib.Path, step: int, outcome: Outcome) -> None:
    """A spike that comes whatever the rows: told again, and gone on from."""
    ended = runs.train(bench, folder, _SPIKY | faulty.during(step))
    outcome.count(ended.problem(), *_rewound_in_vain(folder, step), *_each_once(folder))
    outcome.complaints += rows_after(bench, folder, step)
    if ended.out.count("standard deviations above") != 2:
        outcome.complaints.append(f"two spikes are not told: {ended.out}")


def _rewound_in_vain(folder: pathlib.Path, step: int) -> list[str]:
    line = metrics.read(folder / metrics.FILE)[step - 1]
    if len(guard.read_rewinds(folder)) != 1 or not math.isfinite(line["train/loss"]):
        return [f"rewinds: {guard.read_rewinds(folder)}, loss {line['train/loss']}"]
    return []


def rows_after(bench: Bench, folder: pathlib.Path, step: int) -> list[str]:
    """Complaints unless the rows read at `step` after the rewind follow those of the spike.

    Those of update `step` were kept again, as it spiked again: without the batches from the
    checkpoint to the spike they are the ones that come so many batches later.
    """
    (noted,) = guard.read_rewinds(folder)
    kept = guard.load_batch(folder, step)
    rows = batch(bench, step - 1 + noted["skipped_batches"])
    return [] if np.array_equal(kept.rows.tokens, rows.tokens) else ["other rows were read"]
