"""Which figures of a sweep are reported, and which runs may stand beside each other in them."""

from collections.abc import Sequence

import pandas

from experiments.question import Figure
from experiments.results import YARDSTICK, Result
from pretraining.yardstick import tasks

LOSS = "eval/loss"
FAMILY = f"{YARDSTICK}family/"
BLIMP, PROBE = f"{YARDSTICK}blimp/", f"{YARDSTICK}probe/"
MAIN = (BLIMP + "accuracy", PROBE + "average")

# Of the figures that have one; shares of right answers have none.
_UNITS = {LOSS: "nats", FAMILY + "masked_loss": "nats", FAMILY + "bits_per_byte": "bits"}
ACROSS_FAMILIES = (
    "families: likelihoods of different families are of different kinds, exact or pseudo, of other "
    "positions given other text"
)
_ACROSS_OBJECTIVES = (
    "objectives, nor settings of one that may change its evaluation: each is evaluated on a loss "
    "of its own, with other targets and terms"
)


def reported(frame: pandas.DataFrame, figures: Sequence[Figure]) -> list[str]:
    """Metrics of which there is a number: the question's, the yardstick's main ones, the loss."""
    wanted = dict.fromkeys([*(figure.metric for figure in figures), *MAIN, LOSS])
    return [metric for metric in wanted if metric in frame and frame[metric].notna().any()]


def not_asked(frame: pandas.DataFrame, figures: Sequence[Figure]) -> list[str]:
    """The families' figures of which there is a number and that the question does not show."""
    shown = reported(frame, figures)
    families = [column for column in frame if column.startswith(FAMILY) and column not in shown]
    return sorted(metric for metric in families if groups(frame, metric))


def groups(
    frame: pandas.DataFrame, metric: str, declared: Sequence[str] = ()
) -> dict[str, pandas.DataFrame]:
    """{label: the runs that have the metric and may be compared in it}.

    Figures of a family compare within it, those of no family nowhere. Figures of training and its
    evaluation compare within an objective: if a question declares the metric, all runs; otherwise
    those whose keys of the objective are all alike. Families and objectives are then the labels.
    All others compare across all runs: the label is "".
    """
    have = frame[frame[metric].notna()] if metric in frame else frame[:0]
    if metric.startswith(FAMILY):
        return dict(iter(have[have.family != ""].groupby("family")))
    if metric.startswith(("eval/", "train/")):
        if metric in declared:
            return dict(iter(have.groupby("objective")))
        labels = [_evaluations(runs) for _, runs in have.groupby("objective")]
        return dict(iter(have.groupby(pandas.concat(labels), sort=False))) if labels else {}
    return {"": have} if len(have) else {}


def note(frame: pandas.DataFrame, metric: str, declared: Sequence[str] = ()) -> str:
    """What a reader must know of runs of several kinds; "" where there is nothing to say."""
    if metric.startswith(BLIMP):
        return _scores(frame)
    if len(groups(frame, metric, declared)) < 2:
        return ""
    across = ACROSS_FAMILIES if metric.startswith(FAMILY) else _ACROSS_OBJECTIVES
    return (
        f"{metric} is not ranked across {across}. Each stands in a section of its own; across "
        "families only BLiMP and the probes are compared."
    )


def named(metric: str, better: str = "") -> str:
    """The metric as an axis says it, with its unit and which direction is good."""
    unit = _UNITS.get(metric, "")
    told = ", ".join(filter(None, [unit, better and f"{better} is better"]))
    return metric.removeprefix(YARDSTICK) + (f" ({told})" if told else "")


def items(result: Result, metric: str) -> str:
    """Of what and how much a figure of a run is, "" where nothing tells."""
    if metric == LOSS:
        return f"{result.config['evaluate.rows']:,} rows of held-out text"
    settings = result.yardstick["settings"] if result.yardstick else {}
    sample = tasks.SAMPLES.get(settings.get("sample"))
    if metric.startswith(FAMILY) and "family" in settings:
        key = "pseudo_rows" if metric.endswith("pseudo_perplexity") else "rows"
        return f"{settings['family'][key]:,} rows of held-out text"
    if metric.startswith(BLIMP) and sample:
        return f"at most {sample.pairs:,} pairs of each paradigm"
    if metric.startswith(PROBE) and sample:
        texts, sentences = sample.examples[1], sample.sentences[1]
        return f"at most {texts:,} texts, of CoNLL-2003 {sentences:,} sentences"
    return ""


def _scores(frame: pandas.DataFrame) -> str:
    """By what the runs judge sentences, where it is not the same for all."""
    kinds = frame[frame.blimp_score != ""].groupby("blimp_score")["variant"].unique()
    if len(kinds) < 2:
        return ""
    told = "; ".join(f"{kind} in {', '.join(variants)}" for kind, variants in kinds.items())
    return f"Sentences are not judged alike here: by {told}. A difference may be that of the score."


def _evaluations(runs: pandas.DataFrame) -> pandas.Series:
    """For runs of one objective: its name, and the keys of it in which they differ."""
    keys = [key for key in runs if key.startswith("objective.")]
    texts = runs[keys].astype(str)
    label = runs["objective"]
    for key in (key for key in keys if texts[key].nunique() > 1):
        label = label + f", {key.removeprefix('objective.')}=" + texts[key]
    return label
