"""Run folders written by hand, with numbers that are known."""

import csv
import json
import math

CONFIG = {
    "objective": {"name": "hidden", "mask_rate": 0.15},
    "data": {"sequence_length": 103, "copies": 1, "validation": 0.02},
    "train": {"steps": 400, "batch_size": 10},  # 1,000 tokens a step
    "seed": {"init": 0, "data": 0, "corruption": 0, "dropout": 0, "evaluation": 0},
    "evaluate": {"rows": 512, "every": 100},
}
START = {
    "time": "2026-01-01T00:00:00+00:00",
    "step": 0,
    "data": "a" * 64,
    "commit": "c" * 40,
    "python": "3.11.7",
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    "devices": [1, "cpu"],
    "processes": 1,
    "cores": 2,
    "xla_flags": "",
}
SETTINGS = {"sample": "quick", "rows": 64}


def write_run(
    folder,
    losses,
    config=None,
    starts=({},),
    figures=None,
    family="masked",
    step_flops=2e9,
    settings=None,
):
    """A run folder.

    Args:
      losses: {step: eval/loss}; None = not finite.
      config: {"section.key": value} that differs from CONFIG.
      starts: what differs from START, one for each start.
      figures: of its yardstick, at the last step.
      step_flops: FLOPs of a step, at 0.5 s a step on a peak of 1e10.
    """
    folder.mkdir(parents=True)
    resolved = json.loads(json.dumps(CONFIG))
    for key, value in (config or {}).items():
        section, name = key.split(".")
        resolved.setdefault(section, {})[name] = value
    (folder / "config.json").write_text(json.dumps(resolved))
    starts = "".join(json.dumps(START | start) + "\n" for start in starts)
    (folder / "provenance.jsonl").write_text(starts)
    lines = [_line(step, loss, step_flops) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if figures is not None:
        stored = {"suite": "yardstick", "step": max(losses), "ema": False, "family": family}
        stored |= {"settings": settings or SETTINGS, "figures": figures}
        (folder / "evaluations").mkdir()
        path = folder / "evaluations" / f"{max(losses)}-yardstick-quick.json"
        path.write_text(json.dumps(stored))


def write_table(folder, rows):
    """runs.csv of {name: (status, overrides)}."""
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        header = "name,variant,seed,config,overrides,status,step,steps,result,folder"
        writer.writerow(header.split(","))
        for name, (status, overrides) in rows.items():
            variant, seed = name.split("-seed")
            told = json.dumps(overrides)
            writer.writerow([name, variant, seed, "x.py", told, status, 0, 400, "", ""])


def _line(step, loss, step_flops):
    return {
        "step": step,
        "train/loss": None if loss is None else loss + 0.1,
        "eval/loss": loss,
        "time/step_s": 0.5,
        "time/peak_flops": 1e10,
        "time/mfu": step_flops / 0.5 / 1e10,
        "time/goodput": 0.5,
        "time/total/step": step * 0.5,
        "time/total/evaluate": step * 0.25,
        "time/total/down": math.ldexp(step, -2),
    }
