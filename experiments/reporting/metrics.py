"""Which figures of a sweep are reported, and which runs may stand beside each other in them."""

import re

import pandas

from experiments.question import Figure
from experiments.results import YARDSTICK

LOSS = "eval/loss"
FAMILY = f"{YARDSTICK}family/"
BLIMP, PROBE = f"{YARDSTICK}blimp/", f"{YARDSTICK}probe/"
MAIN = (BLIMP + "accuracy", PROBE + "average")

# Of the figures that have one; shares of right answers have none.
_UNITS = {LOSS: "nats", FAMILY + "masked_loss": "nats", FAMILY + "bits_per_byte": "bits"}
_ACROSS_FAMILIES = (
    "families: likelihoods of different families are of different kinds, exact or pseudo, of other "
    "positions given other text"
)
_ACROSS_OBJECTIVES = (
    "objectives, nor settings of one that change its evaluation: each is evaluated on a loss of "
    "its own, with other targets and terms"
)
# Keys of objectives that change training alone; of any other, evaluation may ask something else.
_TRAINING = re.compile(
    r"objective\.(name|mask_rate|mask_rate_final|mask_rate_schedule|predict_rate|mask_fraction"
    r"|random_fraction|keep_fraction|backward_fraction|temperature)$"
)


def reported(frame: pandas.DataFrame, figures: tuple[Figure, ...]) -> list[str]:
    """Metrics of which there is a number: the question's, the yardstick's main ones, the loss."""
    families = sorted(column for column in frame if column.startswith(FAMILY))
    wanted = dict.fromkeys([*(figure.metric for figure in figures), *MAIN, *families, LOSS])
    return [metric for metric in wanted if metric in frame and frame[metric].notna().any()]


def groups(frame: pandas.DataFrame, metric: str) -> dict[str, pandas.DataFrame]:
    """{label: the runs that have the metric and may be compared in it}.

    Figures of a family compare within it; those of training and its evaluation within an objective,
    as long as it asks the same of all runs. Families and objectives are then the labels. All others
    compare across all runs: the label is "".
    """
    have = frame[frame[metric].notna()] if metric in frame else frame[:0]
    if metric.startswith(FAMILY):
        return dict(iter(have.groupby("family")))
    if metric.startswith(("eval/", "train/")):
        labels = [_evaluations(runs) for _, runs in have.groupby("objective")]
        return dict(iter(have.groupby(pandas.concat(labels)))) if labels else {}
    return {"": have} if len(have) else {}


def changes_evaluation(key: str) -> bool:
    """Whether two runs of one objective that differ in a config key may be evaluated otherwise."""
    return key.startswith("objective.") and not _TRAINING.match(key)


def note(frame: pandas.DataFrame, metric: str) -> str:
    """What a reader must know of runs of several kinds; "" where there is nothing to say."""
    if metric.startswith(BLIMP) and len(set(frame["family"]) - {""}) > 1:
        return (
            "Runs of different families stand side by side here, by likelihoods of different "
            "kinds: exact in some, pseudo in others."
        )
    if len(groups(frame, metric)) < 2:
        return ""
    across = _ACROSS_FAMILIES if metric.startswith(FAMILY) else _ACROSS_OBJECTIVES
    return (
        f"{metric} is not ranked across {across}. Each stands in a section of its own; across "
        "families only BLiMP and the probes are compared."
    )


def named(metric: str, better: str = "") -> str:
    """The metric as an axis says it, with its unit and which direction is good."""
    unit = _UNITS.get(metric, "")
    told = ", ".join(filter(None, [unit, better and f"{better} is better"]))
    return metric.removeprefix(YARDSTICK) + (f" ({told})" if told else "")


def _evaluations(runs: pandas.DataFrame) -> pandas.Series:
    """For runs of one objective: its name, and the settings in which they are evaluated."""
    keys = [key for key in runs if changes_evaluation(key)]
    texts = runs[keys].astype(str)
    label = runs["objective"]
    for key in (key for key in keys if texts[key].nunique() > 1):
        label = label + f", {key.removeprefix('objective.')}=" + texts[key]
    return label
