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
    "n: seeds. sd: standard deviation over them (of a sample, n - 1). Against: the contrast that "
    "the question planned. Difference: mean over the seeds that both have, with a 95 % interval "
    "(Student's t) that is not corrected for the number of contrasts. p: paired t-test over seeds, "
    "two-sided; p (Holm): after Holm's correction over all planned contrasts, also those without a "
    "figure yet. Alike: seeds whose difference has the sign of the mean one. With fewer than two "
    "seeds, or differences without any spread, there is no test. Verdicts stand on the question's "
    "first metric alone, once all its runs have it: lower or higher where p (Holm) is below .05 "
    "and all seeds are alike. A seed changes the initialization, the corruption and the dropout; "
    "the rows and their order are the same in all. So intervals and p-values are conditional on "
    "one order of one corpus and on the items evaluated: nothing is said of other text or items."
)
_HEADER = (
    *("variant", "n", "mean", "sd", "against", "difference", "95 % interval, not corrected"),
    *("p", "p (Holm)", "alike"),
)
_VERDICT = "verdict"


class Context(NamedTuple):
    """What all sections read.

    Attributes:
      sweep: what there is.
      frame: `results.frame` of it.
      contrasts: {variant: the variant it is held against}.
      primary: the metric on which there are verdicts; "" = none, as the contrasts were not planned.
      figures: what is drawn.
      look: how each variant is drawn.
    """

    sweep: Sweep
    frame: pandas.DataFrame
    contrasts: dict[str, str]
    primary: str
    figures: tuple[Figure, ...]
    look: dict[str, figures.Look]


def make(sweep: Sweep, baseline: str | None) -> Context:
    """The context of a sweep.

    Args:
      baseline: a variant against which all others are held, without verdicts; None = the contrasts
        of the question, or else all against the first variant.

    Raises:
      UserError: there is no such variant.
    """
    variants = sweep.variants
    if baseline is not None and baseline not in variants:
        raise UserError(f"--baseline={baseline}: no run is of it; there are {', '.join(variants)}")
    frame = results_lib.frame(sweep.results)
    asked = sweep.question.figures if sweep.question else _without_question(sweep, frame)
    is_planned = sweep.question is not None and baseline is None
    first = baseline or variants[0]
    others = {variant: first for variant in variants if variant != first}
    return Context(
        sweep,
        frame,
        sweep.contrasts if is_planned else others,
        asked[0].metric if is_planned else "",
        asked,
        figures.looks(variants),
    )


def declared(of: Context) -> list[str]:
    """The metrics that the question's figures show, and that it so declares comparable."""
    return [figure.metric for figure in of.figures] if of.sweep.question else []


def compare(of: Context, runs: pandas.DataFrame, metric: str) -> list[Comparison]:
    """The contrasts, of rows of `results.frame`."""
    present = set(runs["variant"])
    order = [variant for variant in of.sweep.variants if variant in present]
    values = runs.pivot(index="seed", columns="variant", values=metric)[order].astype(float)
    return statistics.compare(values, of.contrasts)


def table(of: Context, compared: Sequence[Comparison], metric: str, told: str) -> Table:
    """The comparisons with their tests, and verdicts where there are some; `told` begins the
    caption."""
    lacking = _lacking(of, metric)
    verdicts = metric == of.primary and not lacking
    rows = [_row(c) + [_verdict(c)] * verdicts for c in compared]
    captions = [f"{told}; {wording.count(len(of.contrasts), 'contrast')}", _detectable(compared)]
    if metric == of.primary and lacking:
        lack = wording.count(len(lacking), "planned run") + " lack" + "s" * (len(lacking) == 1)
        captions.append(f"No verdicts yet: {lack} {metric}")
    captions.append(_items(of, metric))
    caption = ". ".join(filter(None, captions)) + "."
    return Table([*_HEADER, *[_VERDICT] * verdicts], rows, caption)


def plain_table(compared: Sequence[Comparison], told: str) -> Table:
    """Means and differences without tests."""
    return Table(_HEADER[:6], [_row(c)[:6] for c in compared], told)


def _row(c: Comparison) -> list[str]:
    cells = [c.variant, str(c.count), wording.number(c.mean), wording.number(c.sd, "{:.2g}")]
    if not c.pairs:
        return [*cells, c.against, *[""] * 5]
    cells += [c.against, wording.number(c.difference, "{:+.3g}")]
    alike = f"{c.alike} of {c.pairs}"
    if math.isnan(c.p):
        return [*cells, "", "no test", "", alike]
    interval = f"{c.low:+.3g} to {c.high:+.3g}"
    return [*cells, interval, wording.p_value(c.p), wording.p_value(c.holm), alike]


def _verdict(c: Comparison) -> str:
    if math.isnan(c.p):
        return ""
    return ("lower" if c.difference < 0 else "higher") if c.decided else "not told apart"


def _lacking(of: Context, metric: str) -> list[str]:
    """Planned runs of the contrasts that do not have the metric."""
    variants = {*of.contrasts, *of.contrasts.values()}
    have = set(of.frame.index[of.frame[metric].notna()])
    return [r.name for r in of.sweep.planned if r.variant in variants and r.name not in have]


def _detectable(compared: Sequence[Comparison]) -> str:
    """Which differences would have been decided."""
    known = sorted((c.detectable, c.variant) for c in compared if not math.isnan(c.detectable))
    if not known:
        return ""
    (least, one), (most, other) = known[0], known[-1]
    needed = f"{least:.2g}" if len(known) == 1 else f"{least:.2g} ({one}) to {most:.2g} ({other})"
    return f"With the spread seen, a difference of {needed} would be told apart"


def _items(of: Context, metric: str) -> str:
    """Of how many items a figure is, where it is known."""
    told = {metrics.items(result, metric) for result in of.sweep.results} - {""}
    return f"Measured on {' or '.join(sorted(told))}" if told else ""


def _without_question(sweep: Sweep, frame: pandas.DataFrame) -> tuple[Figure, ...]:
    """The loss and the families' figures against the one config key that differs, or else against
    the variants."""
    ignored = ("seed.", "log.", "checkpoint.", "data.cache")
    differing = results_lib.differing([result.config for result in sweep.results])
    knobs = [key for key in differing if not key.startswith(ignored)]
    knob = knobs[0] if len(knobs) == 1 else ""
    families = sorted(column for column in frame if column.startswith(metrics.FAMILY))
    return (
        Figure(metrics.LOSS, "validation loss", "lower", knob),
        *(Figure(name, metrics.named(name), "lower", knob) for name in families),
    )
