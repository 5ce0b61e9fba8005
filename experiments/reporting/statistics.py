"""Variants against the baseline: means, standard deviations and paired tests over seeds."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas
from scipy import stats

CONFIDENCE = 0.95
LEVEL = 0.05  # of the p-values after Holm's correction


class Comparison(NamedTuple):
    """A variant, and how it differs from the baseline.

    Attributes:
      variant: its name.
      count: seeds that have the figure.
      mean: over them.
      sd: standard deviation of a sample (n - 1); NaN for one seed.
      pairs: seeds that both the variant and the baseline have.
      difference: mean over the pairs of variant - baseline; NaN for the baseline itself.
      low, high: 95 % confidence interval of the difference, by Student's t.
      p: of the paired t-test, two-sided; NaN where there is no test.
      holm: p after Holm's correction over the variants that were tested.
      alike: pairs whose difference has the sign of the mean difference.
    """

    variant: str
    count: int
    mean: float
    sd: float
    pairs: int = 0
    difference: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    holm: float = np.nan
    alike: int = 0

    @property
    def decided(self) -> bool:
        """The adjusted p-value is below LEVEL, and every seed differs in the same direction."""
        return self.holm < LEVEL and self.alike == self.pairs


def compare(values: pandas.DataFrame, baseline: str | None) -> list[Comparison]:
    """Every variant against one of them, paired by seed.

    There is no test with fewer than two pairs, nor where the differences of all pairs are equal.

    Args:
      values: indexed by seed, a column per variant; NaN where there is none.
      baseline: one of the columns; None = no comparison.
    """
    tested = [_compared(values, variant, baseline) for variant in values.columns]
    adjusted = holm({c.variant: c.p for c in tested if not np.isnan(c.p)})
    return [c._replace(holm=adjusted.get(c.variant, np.nan)) for c in tested]


def holm(p_values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Holm's step-down correction (Holm 1979): of m p-values in ascending order the i-th, counted
    from 0, is multiplied by m - i, is at least the one before it, and at most 1."""
    order = sorted(p_values, key=p_values.__getitem__)
    steps = [p_values[name] * (len(order) - rank) for rank, name in enumerate(order)]
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


def _compared(values: pandas.DataFrame, variant: str, baseline: str | None) -> Comparison:
    own = values[variant].dropna()
    sd = float(own.std(ddof=1)) if len(own) > 1 else np.nan
    alone = Comparison(variant, len(own), float(own.mean()), sd)
    if baseline is None or variant == baseline:
        return alone
    differences = (values[variant] - values[baseline]).dropna()
    if differences.empty:
        return alone
    mean = float(differences.mean())
    alike = int((np.sign(differences) == np.sign(mean)).sum()) if mean else 0
    compared = alone._replace(pairs=len(differences), difference=mean, alike=alike)
    if len(differences) < 2 or np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return compared
    pairs = values.loc[differences.index]
    test = stats.ttest_rel(pairs[variant], pairs[baseline])
    low, high = test.confidence_interval(CONFIDENCE)
    return compared._replace(low=float(low), high=float(high), p=float(test.pvalue))
