"""The sections of a report."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas

from experiments import results as results_lib
from experiments.question import Figure
from experiments.reporting import comparable, context, figures, making, metrics, training, wording
from experiments.reporting.context import Context
from experiments.reporting.page import Block, Heading, Picture, Table, Text, Warnings
from experiments.reporting.source import Sweep
from experiments.results import YARDSTICK


def blocks(of: Context) -> list[Block]:
    """The whole report."""
    return [
        *_opening(of),
        *_costs(of),
        *_metrics(of),
        *_families(of),
        *training.section(of),
        *_by_task(of),
        *making.section(of.sweep),
    ]


def summary(of: Context) -> list[Table]:
    """What a terminal shows: the first metric of all, by family or objective where these differ."""
    return [
        context.table(of, context.compare(of, runs, metric), metric, f"{metric} {label}".strip())
        for metric in metrics.reported(of.frame, of.figures)[:1]
        for label, runs in metrics.groups(of.frame, metric, context.declared(of)).items()
    ]


def notices(of: Context) -> list[str]:
    """What is not there yet: runs, and the metric that decides."""
    return [*_missing_runs(of.sweep), *_not_measured(of, of.figures[:1])]


# ---------------------------------------------------------------------------------------- opening


def _opening(of: Context) -> Iterable[Block]:
    sweep = of.sweep
    yield Heading(1, sweep.title)
    planned = f" of {len(sweep.planned)} planned" if sweep.planned else ""
    protocol = f", protocol {sweep.protocol}" if sweep.protocol else ""
    against = "; ".join(
        f"{', '.join(v for v, a in of.contrasts.items() if a == other)} against {other}"
        for other in dict.fromkeys(of.contrasts.values())
    )
    counts = (
        f"{wording.count(len(of.frame), 'run')}{planned}, "
        f"{wording.count(len(sweep.variants), 'variant')}{protocol}"
    )
    drawn = ", ".join(
        f"{figure.metric} against {figure.knob or 'variant'}" for figure in of.figures
    )
    yield Text(
        f"{counts}. Contrasts: {against or 'none'}."
        + (f" {sweep.note} Drawn: {drawn}." if sweep.note else "")
    )
    yield from map(Text, [*making.decision_rule(sweep), *_missing_runs(sweep)])
    yield from map(Text, _not_measured(of, of.figures))
    faults, own = comparable.differences(sweep)
    if faults:
        yield Warnings("These runs are not comparable in every respect", faults)
    else:
        yield Text(
            "No other difference than the question's own was found: same store, configuration, "
            "order of rows, evaluation, code, versions, kind of machine; all runs are at their end."
        )
    if plateau := comparable.plateau(sweep.results):
        yield Warnings("Variants that have learned little", plateau)
    if own:
        yield Warnings("Differences that the question itself asks for", own)
    yield Text(f"How to read the tables. {context.HOW_TO_READ}")


def _missing_runs(sweep: Sweep) -> Iterable[str]:
    if sweep.missing:
        planned = wording.count(len(sweep.planned), "planned run")
        told = comparable.names(sweep.missing, sweep.planned)
        yield f"{len(sweep.planned) - len(sweep.missing)} of {planned} so far; missing: {told}."


def _not_measured(of: Context, asked: Iterable[Figure]) -> Iterable[str]:
    """The metrics of figures that no run has, each once."""
    measured = metrics.reported(of.frame, of.figures)
    titles = {figure.metric: figure.title for figure in reversed([*asked])}
    for metric, title in titles.items() if of.sweep.question else ():
        of_tasks = metric.startswith(YARDSTICK) and not metric.startswith(metrics.FAMILY)
        hint = (
            "; run again with --tasks=... to have it"
            if of_tasks and not of.sweep.told["tasks"]
            else ""
        )
        if metric not in measured:
            yield f"Not measured: {title} ({metric}){hint}."


def _costs(of: Context) -> Iterable[Block]:
    yield Heading(2, "Variants and what they took")
    rows = []
    for variant in of.sweep.variants:
        runs = of.frame[of.frame.variant == variant]
        mean = runs[["step", "tokens", "distinct_tokens", "flops", "seconds", "goodput"]].mean()
        rows.append(
            [
                variant,
                str(len(runs)),
                f"{mean.step:,.0f}",
                wording.tokens(mean.tokens),
                wording.tokens(mean.distinct_tokens),
                wording.flops(mean.flops),
                wording.duration(mean.seconds),
                wording.number(mean.goodput, "{:.0%}"),
            ]
        )
    header = ("variant", "runs", "steps", "tokens", "distinct tokens", "FLOPs", "wall time")
    told = (
        "Means over runs. Tokens: steps x rows of a batch x T; distinct: copies of a row "
        "(data.copies) counted once. FLOPs: of the matrix products, forward and backward. Wall "
        "time: of all starts, without the time between them. Goodput: share of it that made steps."
    )
    yield Table((*header, "goodput"), rows, told)
    variants = of.sweep.variants
    rows = [[key, *(_values(of.sweep, v, key) for v in variants)] for key in _varied(of.sweep)]
    if rows:
        yield Table(("config key", *variants), rows, "What differs between the variants.")


def _varied(sweep: Sweep) -> list[str]:
    """Keys in which the runs differ; where it is known, those that the question overrides."""
    differing = results_lib.differing([result.config for result in sweep.results])
    planned = {key for run in sweep.planned for key in run.overrides} or differing
    return [key for key in differing if key in planned and not key.startswith("seed.")]


def _values(sweep: Sweep, variant: str, key: str) -> str:
    values = (str(r.config.get(key, "—")) for r in sweep.results if r.variant == variant)
    return ", ".join(dict.fromkeys(values))


# ---------------------------------------------------------------------------------------- metrics


def _metrics(of: Context) -> Iterable[Block]:
    for metric in metrics.reported(of.frame, of.figures):
        title = next((figure.title for figure in of.figures if figure.metric == metric), "")
        yield Heading(2, f"{title} ({metric})" if title else metric)
        if told := metrics.note(of.frame, metric, context.declared(of)):
            yield Text(told)
        for label, runs in metrics.groups(of.frame, metric, context.declared(of)).items():
            yield Heading(3, label) if label else Text("All runs:")
            compared = context.compare(of, runs, metric)
            yield context.table(of, compared, metric, metrics.named(metric))
            for number, asked in enumerate(of.figures):
                if asked.metric == metric:
                    yield from _figure(of, runs, asked, wording.slug(f"{number}-{metric}-{label}"))


def _figure(of: Context, runs: pandas.DataFrame, asked: Figure, name: str) -> Iterable[Picture]:
    curves = _curves(of, runs, asked)
    if not curves:
        return
    knob, metric = asked.knob or "variant", metrics.named(asked.metric, asked.better)
    seeds = pandas.concat([curve.points.groupby("variant").size() for curve in curves])
    sources = {}
    for published in asked.published:
        sources.setdefault(published.source, []).append(published.label)
    told = "; ".join(f"{', '.join(labels)} of {source}" for source, labels in sources.items())
    yield Picture(
        name,
        asked.title,
        f"{asked.title}: {metric} against {knob}, {wording.seeds(seeds.min(), seeds.max())}, bars "
        "from the least to the largest, small points the seeds."
        + (f" Beside it, on scales of their own: {told}." if told else ""),
        figures.ablation(curves, of.look, knob, metric, asked.title, asked.published),
    )


def _curves(of: Context, runs: pandas.DataFrame, asked: Figure) -> list[figures.Curve]:
    """The runs of each series, by their config, in the order of the variants."""
    config = {result.name: result.config for result in of.sweep.results}
    order = sorted(runs.index, key=lambda name: of.sweep.variants.index(runs.variant[name]))
    found = []
    for label, wanted in (asked.series or {"": {}}).items():
        stored = json.loads(json.dumps(wanted))  # as a run folder has it: tuples are lists
        named = {name: {"variant": runs.variant[name]} | config[name] for name in order}
        names = [name for name in order if _matches(named[name], stored, asked.knob)]
        if names:
            chosen = runs.loc[names]
            places = (
                [_place(config[n][asked.knob]) for n in names] if asked.knob else chosen.variant
            )
            points = chosen.assign(place=places, value=chosen[asked.metric].astype(float))
            found.append(figures.Curve(label, points[["place", "value", "variant"]]))
    return found


def _place(value: Any) -> float | str:
    return value if isinstance(value, int | float) else str(value)


def _matches(config: Mapping[str, Any], wanted: Mapping[str, Any], knob: str) -> bool:
    """Whether a run is of a series; of "variant" the series names all that are."""
    of_variants = "variant" not in wanted or config["variant"] in wanted["variant"]
    keys = wanted.keys() - {"variant"}
    alike = all(key in config and config[key] == wanted[key] for key in keys)
    return of_variants and alike and (not knob or knob in config)


# --------------------------------------------------------------------------------------- families


def _families(of: Context) -> Iterable[Block]:
    """The figures of a family that the question does not show: no tests."""
    found = metrics.not_asked(of.frame, of.figures)
    if not found:
        return
    yield Heading(2, "Figures of the families")
    yield Text(f"They do not rank across {metrics.ACROSS_FAMILIES}.")
    grouped = [
        (family, metric, runs)
        for metric in found
        for family, runs in metrics.groups(of.frame, metric).items()
    ]
    for family, metric, runs in sorted(grouped, key=lambda entry: entry[:2]):
        yield Heading(3, f"{metric}: {family}")
        compared = context.compare(of, runs, metric)
        yield context.plain_table(compared, f"{metrics.named(metric)}; no tests.")


# ---------------------------------------------------------------------------------------- by task


def _by_task(of: Context) -> Iterable[Block]:
    """Means of probes by task, and of BLiMP by phenomenon: no tests, there are too many."""
    for prefix, title, unit in (
        (metrics.BLIMP, "BLiMP by phenomenon", "right pairs (%)"),
        (metrics.PROBE, "Probes by task", "score x 100"),
    ):
        columns = sorted(c for c in of.frame if c.startswith(prefix) and c not in metrics.MAIN)
        means = of.frame.groupby("variant")[columns].mean().dropna(how="all")
        means = means.reindex([variant for variant in of.sweep.variants if variant in means.index])
        if not columns or means.empty:
            continue
        means.columns = [column.removeprefix(prefix) for column in columns]
        yield Heading(2, title)
        if told := metrics.note(of.frame, prefix):
            yield Text(told)
        rows = [[v, *(wording.number(x, "{:.3f}") for x in row)] for v, row in means.iterrows()]
        told = f"{title}, means over seeds; no tests."
        yield Table(("variant", *means.columns), rows, told)
        told = f"{title}: {unit}, means over seeds."
        yield Picture(wording.slug(title), title, told, figures.heatmap(100 * means, unit))
