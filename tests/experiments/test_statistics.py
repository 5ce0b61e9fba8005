"""Means, paired tests and Holm's correction, against arithmetic by hand.

With two degrees of freedom Student's t has a closed form: p = 1 - t / sqrt(t^2 + 2).
"""

import math

import numpy as np
import pandas
import pytest

from experiments.reporting import statistics

T_975_DF_2 = 4.302653  # from a table
NAN = float("nan")


def compare(baseline="base", **columns):
    values = pandas.DataFrame(columns)
    contrasts = {name: baseline for name in columns if baseline and name != baseline}
    return {c.variant: c for c in statistics.compare(values, contrasts)}


def test_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3), t = 2 sqrt(3)."""
    found = compare(base=[10.0, 20.0, 30.0], other=[11.0, 22.0, 33.0])["other"]
    assert (found.count, found.mean, found.sd) == (3, 22.0, 11.0)
    assert (found.pairs, found.difference, found.alike) == (3, 2.0, 3)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    half = T_975_DF_2 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_baseline_and_single_seeds_are_not_tested():
    found = compare(base=[1.0, 2.0, 3.0], one=[NAN, NAN, 4.0])
    assert found["base"].mean == 2.0
    assert found["base"].sd == 1.0
    assert math.isnan(found["base"].difference)
    assert found["one"].count == found["one"].pairs == 1
    assert found["one"].difference == 1.0
    assert math.isnan(found["one"].sd)
    assert math.isnan(found["one"].p)
    assert math.isnan(found["one"].holm)
    assert not found["one"].decided


def test_pairs_are_those_that_both_have():
    """Seeds 1 and 2 alone: differences 1 and 3, where all of the means would give another one."""
    found = compare(base=[NAN, 1.0, 2.0], other=[100.0, 2.0, 5.0])["other"]
    assert (found.count, found.pairs, found.difference) == (3, 2, 2.0)
    # One degree of freedom: t = 2 / (sqrt(2) / sqrt(2)) = 2; p = 1 - 2 atan(t) / pi.
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_differences_without_spread_are_not_tested():
    found = compare(base=[0.1, 0.2, 0.3], other=[0.4, 0.5, 0.6])["other"]
    assert found.difference == pytest.approx(0.3)
    assert math.isnan(found.p)
    assert compare(base=[1.0, 2.0], other=[1.0, 2.0])["other"].difference == 0.0


def test_holm_by_hand():
    """.01 x 3; .03 x 2; .04 x 1, but not below the one before it."""
    found = statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03}, 3)
    assert found == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert statistics.holm({"a": 0.6, "b": 0.5}, 2) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({}, 0) == {}


def test_holm_counts_those_that_are_not_there_yet():
    """.01 x 5, .02 x 4, as if three larger ones were to come."""
    assert statistics.holm({"a": 0.02, "b": 0.01}, 5) == pytest.approx({"b": 0.05, "a": 0.08})


def test_contrasts_have_baselines_of_their_own():
    values = pandas.DataFrame({"a": [1.0, 2.0], "b": [2.0, 4.0], "c": [5.0, 5.0], "d": [0.0, 9.0]})
    found = {c.variant: c for c in statistics.compare(values, {"b": "a", "c": "b", "d": "gone"})}
    assert (found["a"].against, found["a"].pairs) == ("", 0)
    assert (found["b"].against, found["b"].difference) == ("a", 1.5)
    assert (found["c"].against, found["c"].difference) == ("b", 2.0)
    assert (found["d"].against, found["d"].pairs) == ("gone", 0)
    assert found["b"].holm == pytest.approx(min(1.0, 3 * found["b"].p))


def test_detectable_difference_by_hand():
    """Differences 1, 2, 3, a standard error of 1 / sqrt(3); from a table t(.975, 2) = 4.302653 for
    one contrast and t(.9875, 2) = 6.205347 for two. At that difference p is .05 / m."""
    one = compare(base=[0.0, 0.0, 0.0], other=[1.0, 2.0, 3.0])["other"]
    assert one.detectable == pytest.approx(T_975_DF_2 / math.sqrt(3), rel=1e-6)
    two = compare(base=[0.0] * 3, other=[1.0, 2.0, 3.0], third=[NAN] * 3)["other"]
    assert two.detectable == pytest.approx(6.205347 / math.sqrt(3), rel=1e-6)
    at = compare(base=[0.0] * 3, other=[x - 2 + two.detectable for x in (1, 2, 3)], third=[NAN] * 3)
    assert at["other"].holm == pytest.approx(0.05, rel=1e-6)


def test_correction_counts_the_contrasts_that_were_planned():
    """t = 2 sqrt(3) and 4 sqrt(3), and one that has no pairs yet."""
    found = compare(
        base=[1.0, 2.0, 3.0], small=[2.0, 4.0, 6.0], large=[4.0, 6.0, 8.0], none=[NAN, NAN, NAN]
    )
    small, large = 1 - math.sqrt(12 / 14), 1 - math.sqrt(48 / 50)
    assert found["large"].holm == pytest.approx(3 * large)
    assert found["small"].holm == pytest.approx(2 * small)
    assert not found["large"].decided  # .0606
    assert not found["small"].decided
    assert math.isnan(found["none"].mean)


def test_no_decision_against_the_direction_of_a_seed():
    base = np.zeros(6)
    found = compare(base=base, other=np.array([10.0, 10.1, 9.9, 10.0, 10.2, -0.5]))["other"]
    assert found.holm < 0.05
    assert found.alike == 5
    assert not found.decided


def test_direction_of_negative_differences():
    found = compare(base=[5.0, 5.0, 5.0], other=[4.0, 4.5, 5.5])["other"]
    assert found.difference == pytest.approx(-1 / 3)
    assert found.alike == 2


def test_no_baseline_no_test():
    found = compare(None, a=[1.0, 2.0], b=[3.0, 5.0])
    assert [c.pairs for c in found.values()] == [0, 0]


def test_interpolation_between_evaluations():
    curve = pandas.Series({200.0: 3.0, 100.0: 5.0, 150.0: NAN})
    assert statistics.interpolate(curve, 125) == 4.5
    assert statistics.interpolate(curve, 200) == 3.0
    assert math.isnan(statistics.interpolate(curve, 99))
    assert math.isnan(statistics.interpolate(curve, 201))
    assert math.isnan(statistics.interpolate(pandas.Series(dtype=float), 1))


def test_matched_is_what_all_reached():
    def curve(*places):
        return pandas.Series(1.0, index=places)

    assert statistics.matched([curve(1, 4), curve(2, 3)]) == 3
    assert statistics.matched([curve(1, 4), curve(4, 9)]) == 4
    assert math.isnan(statistics.matched([curve(1, 3), curve(4, 9)]))
    assert math.isnan(statistics.matched([curve(1, 3), curve()]))
    assert math.isnan(statistics.matched([]))
