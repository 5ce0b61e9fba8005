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
    `score` where it has one. Nothing is divided by the length, as in both papers. The accuracy of a
    phenomenon is the mean over its paradigms, the overall one the mean over all paradigms, which
    with 1,000 pairs each is that of all pairs (Warstadt et al. 2020, table 3).

    Departures: equal scores count half, by which a model that knows nothing gets .5; phenomena are
    named by the files' `linguistics_term`, which has 13: the two paradigms of `s-selection` are
    argument structure in the paper's table. An objective without `query` has no figures.
    """
    if run.objective.query is None:
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
    return figures | {term: float(np.mean(terms[term])) for term in sorted(terms)}, both.cut


def _scores(run, sentences: texts.Texts) -> list[float]:
    def totals(objective, rows, _):
        found = predict.scores(objective, run.params, rows, run.vocabulary.special_ids)
        return [values.sum(dtype=np.float64) for values in found]

    return texts.apply(run, sentences, totals, "BLiMP")
