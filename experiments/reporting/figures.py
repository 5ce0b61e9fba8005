"""The figures of a report, as matplotlib figures; a variant looks the same in all of them."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.question import Published
from experiments.reporting import wording

# Paul Tol's "muted" colours, which colour-blind readers tell apart, too.
_COLOURS = (
    *("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#44AA99", "#AA4499"),
    "#DDCC77",
)
_DASHES, _MARKERS = ("-", "--", ":", "-."), "osD^vP"
_NEUTRAL = "#404040"  # of a curve that goes through several variants, and of published ones
_GAP = 0.12  # in inches, around the panels


class Look(NamedTuple):
    """How a variant is drawn."""

    colour: str
    dash: str
    marker: str


class Curve(NamedTuple):
    """A curve of the ablated metric.

    Attributes:
      label: "" where there is one curve only.
      points: indexed by the run's name, with columns place (on the x axis), value and variant.
    """

    label: str
    points: pandas.DataFrame


def looks(variants: Sequence[str]) -> dict[str, Look]:
    """A colour for each variant; when they are used up, again with another dash and marker."""
    count = len(_COLOURS)
    return {
        name: Look(
            _COLOURS[i % count],
            _DASHES[i // count % len(_DASHES)],
            _MARKERS[i // count % len(_MARKERS)],
        )
        for i, name in enumerate(variants)
    }


def loss_curves(
    panels: Mapping[str, Mapping[str, pandas.DataFrame]], look: Mapping[str, Look], metric: str
) -> Figure:
    """A metric over training: the mean of the seeds, and a band from the least to the largest.

    Args:
      panels: {"tokens" or "FLOPs": {variant: frame indexed by the place, a column per seed}}.
      look: of every variant.
      metric: label of the y axis.
    """
    figure = _figure(10.0, 4.6)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for variant, seeds in curves.items():
            _band(axis, seeds, look[variant], f"{variant} ({seeds.shape[1]})")
        _amounts(axis, label)
    axes[0].set_ylabel(metric)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="variant (seeds)", loc="outside right upper")
    return figure


def ablation(
    curves: Sequence[Curve],
    look: Mapping[str, Look],
    knob: str,
    metric: str,
    title: str,
    published: Sequence[Published],
) -> Figure:
    """The ablated metric against the ablated knob, and the published curves beside it.

    A point is the mean of the seeds, its bar goes from the least to the largest, the small points
    are the seeds. Every panel has a scale of its own. Names instead of numbers as places stand in
    rows.
    """
    named = any(isinstance(place, str) for curve in curves for place in curve.points["place"])
    columns = min(len(published), 1 if named else 2)
    rows = math.ceil(len(published) / columns) if columns else 1
    places = sum(curve.points["place"].nunique() for curve in curves)
    height = max(4.2, (1.75 if named else 2.3) * rows, 1.2 + 0.42 * places * named)
    figure = _figure(6.4 + (5.0 if named else 3.0) * columns, height)
    grid = figure.add_gridspec(rows, 1 + columns, width_ratios=[2.0, *[1.3] * columns])
    measured = figure.add_subplot(grid[:, 0])
    (_rows_of_names if named else _against_numbers)(measured, curves, look)
    measured.set_title(f"measured: {title}")
    measured.set(**({"xlabel": metric} if named else {"xlabel": knob, "ylabel": metric}))
    for number, curve in enumerate(published):
        axis = figure.add_subplot(grid[number // columns, 1 + number % columns])
        _published(axis, curve, knob)
    return figure


def heatmap(values: pandas.DataFrame, label: str) -> Figure:
    """A table in colours: a row per variant, a column per task, the values written in the cells."""
    rows, columns = values.shape
    figure = _figure(2.6 + 0.72 * columns, 1.9 + 0.42 * rows)
    axis = figure.subplots()
    image = axis.imshow(values, cmap="cividis", aspect="auto")
    axis.set_xticks(range(columns), values.columns, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(rows), values.index)
    axis.grid(visible=False)
    low, high = np.nanmin(values), np.nanmax(values)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "w" if value < (low + high) / 2 else "k"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
    figure.colorbar(image, label=label, shrink=0.8)
    return figure


# ----------------------------------------------------------------------------------------- panels


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=_GAP, h_pad=_GAP)
    return figure


def _band(axis: Axes, seeds: pandas.DataFrame, look: Look, label: str) -> None:
    known = seeds.dropna()
    mean = known.mean(axis=1)
    axis.plot(known.index, mean, color=look.colour, ls=look.dash, label=label, lw=1.6)
    axis.fill_between(
        known.index, known.min(axis=1), known.max(axis=1), color=look.colour, alpha=0.18, lw=0
    )
    axis.grid(alpha=0.25)


def _amounts(axis: Axes, label: str) -> None:
    """The x axis of a panel of curves, logarithmic where it is of FLOPs over a decade or more."""
    least, most = axis.dataLim.intervalx
    if label == "FLOPs" and most >= 10 * least:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(f"{label} of training")


def _against_numbers(axis: Axes, curves: Sequence[Curve], look: Mapping[str, Look]) -> None:
    for number, curve in enumerate(curves):
        groups = curve.points.groupby("place", sort=True)["value"]
        mean = groups.mean()
        seeds = wording.seeds(groups.count().min(), groups.count().max())
        label = f"{curve.label} ({seeds})" if curve.label else seeds
        dash = _DASHES[number % len(_DASHES)]
        axis.plot(mean.index, mean, color=_NEUTRAL, ls=dash, lw=1.2, zorder=1, label=label)
        _points(axis, curve, look, horizontal=False)
    places = pandas.concat([curve.points["place"] for curve in curves])
    if pandas.api.types.is_integer_dtype(places):
        axis.set_xticks(sorted(set(places)))
    axis.legend(frameon=False, fontsize="small")
    axis.grid(alpha=0.25)


def _rows_of_names(axis: Axes, curves: Sequence[Curve], look: Mapping[str, Look]) -> None:
    """Every curve on rows of its own, the first at the top."""
    names, placed = [], []
    for curve in curves:
        rows = {place: len(names) + i for i, place in enumerate(dict.fromkeys(curve.points.place))}
        names += [f"{curve.label}: {place}" if curve.label else str(place) for place in rows]
        placed.append(
            curve._replace(points=curve.points.assign(place=curve.points.place.map(rows)))
        )
    for curve in placed:
        _points(axis, curve, look, horizontal=True)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(alpha=0.25, axis="x")


def _points(axis: Axes, curve: Curve, look: Mapping[str, Look], horizontal: bool) -> None:
    def draw(places, values, **style):
        axis.plot(*((values, places) if horizontal else (places, values)), ls="", **style)

    for (place, variant), points in curve.points.groupby(["place", "variant"], sort=False):
        colour, values = look[variant].colour, points["value"]
        line = axis.hlines if horizontal else axis.vlines
        line(place, values.min(), values.max(), color=colour, lw=2, alpha=0.6)
        draw([place] * len(values), values, marker=".", ms=5, color=colour, alpha=0.5)
        marker = look[variant].marker
        draw([place], [values.mean()], marker=marker, ms=7, color=colour, mec="white")


def _published(axis: Axes, curve: Published, knob: str) -> None:
    places, values = list(curve.points), list(curve.points.values())
    if any(isinstance(place, str) for place in places):
        axis.plot(values, range(len(places)), "D", color=_NEUTRAL, ms=5)
        axis.set_yticks(range(len(places)), [str(place) for place in places])
        axis.set_ylim(len(places) - 0.5, -0.5)
        axis.set_xlabel(curve.metric, fontsize="small")
    else:
        axis.plot(places, values, "-D", color=_NEUTRAL, ms=4, lw=1.2)
        axis.set_xlabel(knob, fontsize="small")
        axis.set_ylabel(textwrap.fill(curve.metric, 24), fontsize="small")
    axis.set_title(textwrap.fill(f"published: {curve.label}", 34), fontsize="medium")
    axis.tick_params(labelsize="small")
    axis.grid(alpha=0.25)
