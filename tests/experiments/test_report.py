"""The numbers of reports of sweeps that are written by hand, so that every one is known."""

import pytest

from pretraining.errors import UserError
from tests.experiments.synthetic import SWEEP, metric_table, table, text_of, write_run, write_sweep


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


def test_table_of_the_ablated_metric(sweep):
    """t = 2 / (1 / sqrt(3)) and 4 / (1 / sqrt(3)): p = 1 - t / sqrt(t^2 + 2), the smaller twice."""
    rows = metric_table(text_of(sweep), "yardstick/family/masked_loss", "masked")
    assert rows["p15"] == ["3", "5.100", "0.1", "", "", "", "", "", "", ""]
    half = 0.1 * 4.302653 / 3**0.5
    for name, mean, sd, difference, p, holm, decided in (
        ("p40", "4.900", "0", -0.2, "0.074", "0.074", "not told apart"),
        ("p80", "5.500", "0.2", 0.4, "0.020", "0.040", "higher"),
    ):
        interval = f"{difference - half:+.3g} to {difference + half:+.3g}"
        against = ["p15", f"{difference:+.3g}"]
        cells = ["3", mean, sd, *against, interval, p, holm, "3 of 3", decided]
        assert rows[name][:2] == cells[:2]
        assert float(rows[name][2]) == pytest.approx(float(sd), abs=1e-9)
        assert rows[name][3:] == cells[3:]


def test_costs(sweep):
    rows = table(text_of(sweep), "## Variants and what they took")
    assert rows["p40"] == ["3", "400", "400k", "400k", "8.00e+11", "5.0 min", "67%"]
    rates = table(text_of(sweep), "of it that made steps.")
    assert rates["objective.mask_rate"] == ["0.15", "0.4", "0.8"]


def test_verdicts_stand_on_the_first_metric_alone(sweep):
    text = text_of(sweep)
    assert metric_table(text, "yardstick/family/masked_loss", "masked")["variant"][-1] == "verdict"
    for other in (("eval/loss", "hidden"), ("yardstick/blimp/accuracy",)):
        assert metric_table(text, *other)["variant"][-1] == "alike"


def test_contrasts_of_the_question(sweep):
    """p80 - p40: .4, .6, .8."""
    asked = sweep.parent / "more" / "sweep.py"
    asked.write_text(SWEEP + '\nCONTRASTS = {"p40": "p15", "p80": "p40"}\n')
    rows = metric_table(text_of(sweep), "yardstick/family/masked_loss", "masked")
    assert rows["p40"][3:5] == ["p15", "-0.2"]
    assert rows["p80"][3:5] == ["p40", "+0.6"]
    assert "Contrasts: p40 against p15; p80 against p40." in text_of(sweep)


def test_captions_tell_what_could_be_found_and_of_how_many_items(sweep):
    """Both have differences with an sd of .1; t(.9875, 2) = 6.205347 from a table."""
    text = text_of(sweep)
    assert round(6.205347 * 0.1 / 3**0.5, 2) == 0.36
    assert "2 contrasts. With the spread seen, a difference of 0.36 (p" in text
    assert "Measured on 512 rows of held-out text." in text
    assert "Measured on at most 20 pairs of each paradigm." in text


def test_another_baseline(sweep):
    """It was not planned: there are tests, and no verdicts."""
    rows = metric_table(text_of(sweep, "p80"), "yardstick/family/masked_loss", "masked")
    assert rows["p80"][3:5] == ["", ""]
    assert rows["p15"][3:5] == ["p80", "-0.4"]
    assert rows["p15"][7] == "0.040"
    assert "verdict" not in rows["variant"]
    with pytest.raises(UserError, match="--baseline=p90: no run is of it; there are p15, p40, p80"):
        text_of(sweep, "p90")


def test_matched_views(tmp_path):
    """The second takes 2,000 FLOPs a token, the first 1,000, and has 300 steps, not 400.

    Tokens: both reached 300k, where the first is at 6 - 1/2 and the second at 5. FLOPs: the first
    reached .4e9 x 1,000, which is step 200 of the second.
    """
    write_run(tmp_path / "a-seed0", {200: 6.0, 400: 5.0}, step_flops=1e6)
    short = {"train.steps": 300}
    write_run(tmp_path / "b-seed0", {100: 7.0, 200: 5.5, 300: 5.0}, short, step_flops=2e6)
    write_run(tmp_path / "dead-seed0", {100: 7.0}, step_flops=2e6)
    text = text_of(tmp_path)
    tokens = text[: text.index("Matched tokens: eval/loss at 300k tokens")]
    rows = table(tokens[tokens.rindex("| variant") :], "|")
    assert (rows["a"][1], rows["b"][1], rows["b"][4]) == ("5.500", "5.000", "-0.5")
    assert rows["variant"] == ["n", "mean", "sd", "against", "difference"]
    assert "No tests: a trained further, so the schedule of the learning rate is not" in text
    assert "Left out, as not at their end: dead-seed0." in text
    flops = text[: text.index("Matched FLOPs: eval/loss at 4.00e+08 FLOPs")]
    rows = table(flops[flops.rindex("| variant") :], "|")
    assert (rows["a"][1], rows["b"][1], rows["b"][4]) == ("5.000", "5.500", "+0.5")
    assert "No tests: b trained further" in text


def test_matched_views_of_runs_that_ended_together(sweep):
    text = text_of(sweep)
    assert "Matched tokens: all whole runs were last evaluated at 400k tokens" in text
    assert "Matched FLOPs: all whole runs were last evaluated at 8.00e+11 FLOPs" in text


def test_blimp_by_phenomenon(sweep):
    rows = table(text_of(sweep), "## BLiMP by phenomenon")
    assert rows["variant"] == ["binding", "ellipsis"]
    assert rows["p15"] == ["0.600", "0.700"]


def test_a_variant_of_two_series_is_counted_once_in_each(sweep):
    """p15 is in both."""
    asked = sweep.parent / "more" / "sweep.py"
    series = '{"up": {"variant": ("p15", "p40")}, "far": {"variant": ("p15", "p80")}}'
    old = 'Figure("eval/loss", "Validation loss", "lower")'
    assert old in SWEEP
    asked.write_text(SWEEP.replace(old, f"{old[:-1]}, series={series})"))
    text = text_of(sweep)
    assert "Validation loss: eval/loss (nats, lower is better) against variant, mean of 3 s" in text
    assert "6 seeds" not in text


@pytest.mark.parametrize("steps, matched", [(133, True), (131, False)])
def test_runs_of_equal_flops_are_matched_to_an_update(steps, matched, tmp_path):
    """133 updates of 3e6 FLOPs are less than one more than 400 of 1e6, 131 are two less."""
    write_run(tmp_path / "a-seed0", {200: 6.0, 400: 5.0}, step_flops=1e6)
    own = {"train.steps": steps}
    write_run(tmp_path / "b-seed0", {60: 6.0, steps: 5.0}, own, step_flops=3e6)
    text = text_of(tmp_path)
    assert ("Matched FLOPs: all whole runs were last evaluated at" in text) == matched
    assert ("No tests: a trained further" in text[text.index("Matched FLOPs") :]) != matched
