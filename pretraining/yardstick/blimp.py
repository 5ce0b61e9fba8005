"""BLiMP: of two sentences that differ in one place, is the grammatical one scored higher?
(Warstadt et al. 2020.)"""

import collections

import numpy as np

from pretraining import predict
from pretraining.yardstick import texts
from pretraining.yardstick.tasks import Paradigm


def measure(run, paradigms: list[Paradigm]) -> tuple[dict[str, float], int]:
    """{"accuracy", each linguistics_term} in [0, 1], and how many sentences were cut.

    A sentence is scored as a whole: by its log-likelihood where positions see their left, by its
    pseudo-log-likelihood where they see both sides (Salazar et al. 2020), by the objective's own
    `score` where it has one: see `kind`. Nothing is divided by the length, as in both papers. The
    accuracy of a phenomenon is the mean over its paradigms, the overall one the mean over all
    paradigms, which with 1,000 pairs each is that of all pairs (Warstadt et al. 2020, table 3).

    Departures: equal scores count half, by which a model that knows nothing gets .5; phenomena are
    named by the files' `linguistics_term`, which has 13: the two paradigms of `s-selection` are
    argument structure in the paper's table. No end of the text is scored, so that a likelihood is
    that of a beginning; what stands before it is what the objective's rows begin with. An unknown
    token counts by the probability of being unknown. An objective whose `kind` is "" has no
    figures.
    """
    if not kind(run.objective):
        return {}, 0
    pairs = [pair for paradigm in paradigms for pair in paradigm.pairs]
    both = texts.tokenize(run, [sentence for pair in pairs for sentence in pair])
    good, bad = np.array(_scores(run, both)).reshape(-1, 2).T
    right = (good > bad) + 0.5 * (good == bad)
    starts = np.cumsum([len(paradigm.pairs) for paradigm in paradigms])[:-1]
    terms = collections.defaultdict(list)
    for paradigm, values in zip(paradigms, np.split(right, starts), strict=True):
        terms[paradigm.term].append(float(values.mean()))
    figures = {"accuracy": float(np.mean([value for found in terms.values() for value in found]))}
    return figures | {term: float(np.mean(terms[term])) for term in sorted(terms)}, sum(both.cut)


def kind(objective) -> str:
    """What sentences are scored by; "" where there is nothing to score them by."""
    if objective.query is None:
        return ""
    if objective.score is not None:
        return objective.score_kind
    # Another network's likelihoods tell nothing of the one that probes read.
    if objective.log_probs is None or objective.predictor or not objective.family:
        return ""
    return "likelihood" if objective.context == "left" else "pseudo-likelihood"


def _scores(run, sentences: texts.Texts) -> list[float]:
    def totals(objective, rows, _):
        found = predict.scores(objective, run.params, rows, ())
        return [values.sum(dtype=np.float64) for values in found]

    return texts.apply(run, sentences, totals, "BLiMP")
