"""The section of the validation loss over training: curves, at matched tokens, at matched FLOPs."""

import math
from collections.abc import Iterable, Mapping

import pandas

from experiments import results as results_lib
from experiments.reporting import context, figures, metrics, statistics, wording
from experiments.reporting.context import Context
from experiments.reporting.page import Block, Heading, Picture, Text

_AXES = {"tokens": "tokens", "FLOPs": "flops"}  # of the figure: columns of `results.frame`


def section(of: Context) -> Iterable[Block]:
    """For each objective a figure, and a table for each axis, at the most that all runs reached."""
    by_step = results_lib.curves(of.sweep.results, metrics.LOSS)
    of_objective = metrics.groups(of.frame, metrics.LOSS, context.declared(of))
    if not of_objective:
        return
    yield Heading(2, "Training, at matched tokens and at matched FLOPs")
    if told := metrics.note(of.frame, metrics.LOSS, context.declared(of)):
        yield Text(told)
    for objective, runs in of_objective.items():
        yield Heading(3, f"{metrics.LOSS}: {objective}")
        curves = {axis: _against(by_step, runs, column) for axis, column in _AXES.items()}
        curves = {axis: by_run for axis, by_run in curves.items() if by_run}
        yield Picture(
            wording.slug(f"curves-{objective}"),
            f"{metrics.LOSS} of {objective} over training",
            f"{metrics.LOSS} of {objective} over training, as far as all seeds of a variant are: "
            "their mean, their number behind each variant, a band from the least to the largest.",
            figures.loss_curves(
                {axis: _by_variant(of, runs, by_run) for axis, by_run in curves.items()},
                of.look,
                metrics.named(metrics.LOSS, "lower"),
            ),
        )
        for axis, by_run in curves.items():
            yield _matched(of, runs, axis, by_run)


def _against(
    by_step: pandas.DataFrame, runs: pandas.DataFrame, column: str
) -> dict[str, pandas.Series]:
    """{run: its curve by tokens or FLOPs}, of the runs in which these are known."""
    curves = {}
    for name, run in runs.iterrows():
        curve = by_step[name].dropna()
        if run.step and math.isfinite(run[column]):
            curves[name] = curve.set_axis(curve.index * (run[column] / run.step))
    return curves


def _by_variant(
    of: Context, runs: pandas.DataFrame, curves: Mapping[str, pandas.Series]
) -> dict[str, pandas.DataFrame]:
    """{variant: frame by place, a column per seed}."""
    drawn = {}
    for variant in of.sweep.variants:
        names = [name for name in runs.index[runs.variant == variant] if name in curves]
        alike = {name: curves[name].rename(lambda at: float(f"{at:.9g}")) for name in names}
        if alike:
            drawn[variant] = pandas.DataFrame(alike).sort_index()
    return drawn


def _matched(
    of: Context, runs: pandas.DataFrame, axis: str, curves: Mapping[str, pandas.Series]
) -> Block:
    early = {r.name for r in of.sweep.results if r.step < r.config["train.steps"]}
    whole = {name: curve for name, curve in curves.items() if name not in early}
    left_out = sorted(set(curves) - set(whole))
    told = f" Left out, as not at their end: {', '.join(left_out)}." if left_out else ""
    at = statistics.matched(list(whole.values()))
    if math.isnan(at):
        return Text(f"Matched {axis}: no place lies between evaluations of all whole runs.{told}")
    amount = wording.tokens(at) if axis == "tokens" else wording.flops(at)
    # Runs of equal FLOPs are equal to within an update: they have whole numbers of them.
    update = (runs[_AXES[axis]] / runs.step)[list(whole)].max()
    beyond = [name for name, curve in whole.items() if curve.index.max() > at + update]
    if not beyond:
        return Text(
            f"Matched {axis}: all whole runs were last evaluated at {amount} {axis}, so the table "
            f"of {metrics.LOSS} above is this view, too.{told}"
        )
    values = {name: statistics.interpolate(curve, at) for name, curve in whole.items()}
    matched = runs.loc[list(values)].assign(matched=values)
    unfinished = ", ".join(v for v in of.sweep.variants if v in set(runs.variant[beyond]))
    return context.plain_table(
        context.compare(of, matched, "matched"),
        f"Matched {axis}: {metrics.LOSS} at {amount} {axis}, the most that all whole runs reached, "
        f"linear between evaluations. No tests: {unfinished} trained further, so the schedule of "
        f"the learning rate is not finished there, while that of the others is.{told}",
    )
