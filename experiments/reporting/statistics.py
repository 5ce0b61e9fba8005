"""Variants against each other: means, standard deviations and paired tests over seeds."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas
from scipy import stats

CONFIDENCE = 0.95
LEVEL = 0.05  # of the p-values after Holm's correction


class Comparison(NamedTuple):
    """A variant, and how it differs from the one that it is held against.

    Attributes:
      variant: its name.
      count: seeds that have the figure.
      mean: over them.
      sd: standard deviation of a sample (n - 1); NaN for one seed.
      against: the other variant; "" = the question asks for no contrast.
      pairs: seeds that both have.
      difference: mean over the pairs of variant - against; NaN without any.
      low, high: 95 % confidence interval of the difference, by Student's t, not corrected.
      p: of the paired t-test, two-sided; NaN where there is no test.
      holm: p after Holm's correction over all planned contrasts.
      alike: pairs whose difference has the sign of the mean difference.
      detectable: the mean difference that Holm's first step would reject, were the spread of the
        differences the same: t(1 - LEVEL / 2m, pairs - 1) x their sd / sqrt(pairs), m contrasts.
    """

    variant: str
    count: int
    mean: float
    sd: float
    against: str = ""
    pairs: int = 0
    difference: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    holm: float = np.nan
    alike: int = 0
    detectable: float = np.nan

    @property
    def decided(self) -> bool:
        """The adjusted p-value is below LEVEL, and every seed differs in the same direction."""
        return self.holm < LEVEL and self.alike == self.pairs


def compare(values: pandas.DataFrame, contrasts: Mapping[str, str]) -> list[Comparison]:
    """The contrasts of a question, paired by seed.

    There is no test with fewer than two pairs, nor where the differences of all pairs are equal.

    Args:
      values: indexed by seed, a column per variant; NaN where there is none.
      contrasts: {variant: the variant it is held against}, all that are planned: the correction
        counts also those of which there is no figure yet.
    """
    count = len(contrasts)
    tested = [_compared(values, variant, contrasts.get(variant), count) for variant in values]
    adjusted = holm({c.variant: c.p for c in tested if not np.isnan(c.p)}, count)
    return [c._replace(holm=adjusted.get(c.variant, np.nan)) for c in tested]


def holm(p_values: Mapping[Hashable, float], count: int) -> dict[Hashable, float]:
    """Holm's step-down correction (Holm 1979): of `count` p-values in ascending order the i-th,
    counted from 0, is multiplied by count - i, is at least the one before it, and at most 1. Those
    that are not there count as the largest."""
    order = sorted(p_values, key=p_values.__getitem__)
    steps = [p_values[name] * (count - rank) for rank, name in enumerate(order)]
    return dict(zip(order, np.minimum(np.maximum.accumulate(steps), 1.0).tolist(), strict=True))


def interpolate(curve: pandas.Series, at: float) -> float:
    """The value of a curve at a place between its points, linearly; NaN outside of them."""
    known = curve.dropna().sort_index()
    if not len(known):
        return np.nan
    return float(np.interp(at, known.index, known.to_numpy(), left=np.nan, right=np.nan))


def matched(curves: Sequence[pandas.Series]) -> float:
    """The largest place that all curves reached; NaN when they have no place in common."""
    known = [curve.dropna() for curve in curves]
    if not all(map(len, known)) or not known:
        return np.nan
    last = min(float(curve.index.max()) for curve in known)
    return last if last >= max(float(curve.index.min()) for curve in known) else np.nan


def _compared(
    values: pandas.DataFrame, variant: str, against: str | None, count: int
) -> Comparison:
    own = values[variant].dropna()
    sd = float(own.std(ddof=1)) if len(own) > 1 else np.nan
    alone = Comparison(variant, len(own), float(own.mean()), sd, against or "")
    if against not in values:
        return alone
    differences = (values[variant] - values[against]).dropna()
    if differences.empty:
        return alone
    mean = float(differences.mean())
    alike = int((np.sign(differences) == np.sign(mean)).sum()) if mean else 0
    pairs = len(differences)
    compared = alone._replace(pairs=pairs, difference=mean, alike=alike)
    if pairs < 2 or np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return compared
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    needed = stats.t.ppf(1 - LEVEL / (2 * count), pairs - 1)
    return compared._replace(
        low=float(low),
        high=float(high),
        p=float(test.pvalue),
        detectable=float(needed * stats.sem(differences)),
    )
