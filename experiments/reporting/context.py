"""What all sections of a report read, and the table that several of them have."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas

from experiments import results as results_lib
from experiments.question import Figure
from experiments.reporting import figures, metrics, statistics, wording
from experiments.reporting.page import Table
from experiments.reporting.source import Sweep
from experiments.reporting.statistics import Comparison
from pretraining.errors import UserError

HOW_TO_READ = (
    "n: seeds. sd: standard deviation over them (of a sample, n - 1). Difference: mean over the "
    "seeds that both have of variant - baseline, with its 95 % interval (Student's t). p: paired "
    "t-test over seeds, two-sided; p (Holm): after Holm's correction over the variants of the "
    "table. Alike: seeds whose difference has the sign of the mean one. Decided: p (Holm) is below "
    ".05 and all seeds are alike. With fewer than two seeds, or differences without any spread, "
    "there is no test."
)
_HEADER = (
    *("variant", "n", "mean", "sd", "difference", "95 % interval", "p", "p (Holm)", "alike"),
    "decided",
)


class Context(NamedTuple):
    """What all sections read.

    Attributes:
      sweep: what there is.
      frame: `results.frame` of it.
      baseline: the variant that the others are compared to; None = no run of it has begun.
      figures: what is drawn.
      look: how each variant is drawn.
    """

    sweep: Sweep
    frame: pandas.DataFrame
    baseline: str | None
    figures: tuple[Figure, ...]
    look: dict[str, figures.Look]


def make(sweep: Sweep, baseline: str | None) -> Context:
    """The context of a sweep.

    Args:
      baseline: a variant; None = that of the question, or else the first one.

    Raises:
      UserError: there is no such variant.
    """
    variants = sweep.variants
    if baseline is not None and baseline not in variants:
        raise UserError(f"--baseline={baseline}: no run is of it; there are {', '.join(variants)}")
    chosen = baseline or (sweep.question.baseline if sweep.question else variants[0])
    asked = sweep.question.figures if sweep.question else _without_question(sweep)
    return Context(
        sweep,
        results_lib.frame(sweep.results),
        chosen if chosen in variants else None,
        asked,
        figures.looks(variants),
    )


def compare(of: Context, runs: pandas.DataFrame, metric: str) -> list[Comparison]:
    """Rows of `results.frame`, of which every variant is held against the baseline."""
    present = set(runs["variant"])
    order = [variant for variant in of.sweep.variants if variant in present]
    values = runs.pivot(index="seed", columns="variant", values=metric)[order].astype(float)
    return statistics.compare(values, of.baseline if of.baseline in present else None)


def table(of: Context, compared: Sequence[Comparison], told: str) -> Table:
    """The comparisons, with a caption that begins with `told`."""
    with_baseline = any(c.variant == of.baseline for c in compared)
    against = f"against {of.baseline}" if with_baseline else "the baseline is not here, so no test"
    return Table(_HEADER, [_row(c, of.baseline) for c in compared], f"{told}; {against}.")


def _row(c: Comparison, baseline: str | None) -> list[str]:
    cells = [c.variant, str(c.count), wording.number(c.mean), wording.number(c.sd, "{:.2g}")]
    if c.variant == baseline or not c.pairs:
        return [*cells, "baseline" if c.variant == baseline else "", "", "", "", "", ""]
    cells.append(wording.number(c.difference, "{:+.3g}"))
    alike = f"{c.alike} of {c.pairs}"
    if math.isnan(c.p):
        return [*cells, "", "no test", "", alike, ""]
    interval = f"{c.low:+.3g} to {c.high:+.3g}"
    verdict = ("lower" if c.difference < 0 else "higher") if c.decided else "no"
    return [*cells, interval, wording.p_value(c.p), wording.p_value(c.holm), alike, verdict]


def _without_question(sweep: Sweep) -> tuple[Figure, ...]:
    """The validation loss against the one config key that differs, or else against the variants."""
    ignored = ("seed.", "log.", "checkpoint.", "data.cache")
    differing = results_lib.differing([result.config for result in sweep.results])
    knobs = [key for key in differing if not key.startswith(ignored)]
    knob = knobs[0] if len(knobs) == 1 else ""
    return (Figure(metrics.LOSS, "validation loss", "lower", knob),)
