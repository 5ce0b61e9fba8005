"""Run folders written by hand, with numbers that are known."""

import csv
import json
import math
import re

from experiments.reporting import comparable, context, page, sections, source

CONFIG = {
    "objective": {"name": "hidden", "mask_rate": 0.15},
    "data": {"sequence_length": 103, "copies": 1, "validation": 0.02, "corpus": "some-text"},
    "tokenizer": {"size": 1024},
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

SWEEP = '''"""Is more better?

More text.
"""
from experiments.question import Figure, Protocol, Published, Run, repeat

PROTOCOLS = {"tiny": Protocol("seconds")}
BASELINE = "p15"
MNLI = Published("MNLI", "accuracy (%)", "A paper, table 1", {0.15: 84.2, 0.4: 84.5})
FIGURES = (
    Figure(
        "yardstick/family/masked_loss", "Loss at 15 %", "lower", "objective.mask_rate",
        published=(MNLI,),
    ),
    Figure("eval/loss", "Validation loss", "lower"),
)
RECIPE = "configs/masked_lm.py:tiny"


def runs(protocol):
    for rate in (15, 40, 80):
        yield from repeat(f"p{rate}", RECIPE, {"objective.mask_rate": rate / 100}, 3)
'''
PLANNED = {  # of SWEEP, see `question.plan_of`
    "baseline": "p15",
    "contrasts": {},
    "metric": "yardstick/family/masked_loss",
    "better": "lower",
}
# Loss at the end by variant and seed. Differences to p15: p40 -.1 -.2 -.3, p80 +.3 +.4 +.5.
LOSS = {"p15": (5.0, 5.1, 5.2), "p40": (4.9, 4.9, 4.9), "p80": (5.3, 5.5, 5.7)}


def write_run(
    folder,
    losses,
    config=None,
    starts=({},),
    figures=None,
    family="masked",
    step_flops=2e9,
    settings=None,
    ended=None,
):
    """A run folder.

    Args:
      losses: {step: eval/loss}; None = not finite.
      config: {"section.key": value} that differs from CONFIG.
      starts: what differs from START, one for each start.
      figures: of its yardstick, at the last step.
      ended: what stands beside the losses in the last line.
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
    for line in lines[-1:]:
        line |= ended or {}
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


def write_sweep(tmp_path):
    """A finished sweep with its question: its folder."""
    asked = tmp_path / "more"
    asked.mkdir()
    (asked / "sweep.py").write_text(SWEEP)
    folder = tmp_path / "R"
    rows = {}
    for variant, losses in LOSS.items():
        rate = int(variant[1:]) / 100
        for seed, loss in enumerate(losses):
            name = f"{variant}-seed{seed}"
            figures = {"family/masked_loss": loss, "blimp/accuracy": loss / 10}
            figures |= {"blimp/binding": 0.6, "blimp/ellipsis": 0.7}
            losses_by_step = {200: loss + 1, 400: loss}
            config = {"objective.mask_rate": rate, "seed.init": seed}
            write_run(folder / "runs" / name, losses_by_step, config, figures=figures)
            rows[name] = ("done", {"objective.mask_rate": rate, "seed.init": seed})
    write_table(folder, rows)
    told = {"question": str(asked), "protocol": "tiny", "overrides": {}, "tasks": ""}
    told |= {"planned": PLANNED}
    (folder / "sweep.json").write_text(json.dumps(told))
    return folder


def write_families(tmp_path):
    """Two objectives, each of a family of its own, with two seeds."""
    for seed in (0, 1):
        for name, family, metric in (
            ("both", "masked", "family/masked_loss"),
            ("left", "causal", "family/bits_per_byte"),
            ("third", "third", "family/bits_per_byte"),
        ):
            values = {metric: 2.0 + seed, "blimp/accuracy": 0.5 + seed / 10}
            folder, config = tmp_path / f"{name}-seed{seed}", {"objective.name": name}
            write_run(folder, {400: 3.0 + seed}, config, figures=values, family=family)
    return tmp_path


def table(text, first):
    """{first cell: the other cells} of the Markdown table that follows `first`."""
    lines = text[text.index(first) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            return rows
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name.strip("-"):
            rows[name] = cells
    return rows


def metric_table(text, metric, label=""):
    """The `table` of a metric, of the runs of a label, whatever the title of its figure is."""
    heading = re.search(rf"^## (.* \()?{re.escape(metric)}\)?$", text, re.M)
    return table(text[heading.start() :], f"### {label}\n" if label else "")


def text_of(folder, baseline=None):
    return page.markdown(sections.blocks(context.make(source.read(folder), baseline)))


def faults_of(folder):
    return "\n".join(comparable.differences(source.read(folder))[0])


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
