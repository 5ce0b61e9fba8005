"""The table of populations, by hand."""

from experiments.speed import population
from experiments.speed.population import Timed
from pretraining import config as config_lib


def test_members_differ_in_every_seed_and_in_the_learning_rate(tmp_path):
    changed = {**population.OVERRIDES, "optimizer.learning_rate": 0.25}
    first, second = (each.overrides for each in population.plan(tmp_path, 2, changed))
    seeds = {f"seed.{name}" for name in config_lib.load(population.RECIPE).seed}
    different = {key for key in first if first[key] != second[key]}
    assert different == {*seeds, "optimizer.learning_rate"}
    assert [each["optimizer.learning_rate"] for each in (first, second)] == [0.25, 0.375]
    alike = population.plan(tmp_path, 2, changed, one_rate=True)
    assert [each.overrides["optimizer.learning_rate"] for each in alike] == [0.25, 0.25]


def test_throughputs_and_ratios_are_of_the_median_round():
    """1,200 tokens in 2, 4 and 6 s (median 4) against 8 s; updates alone 1, 2, 3 s against 3 s."""
    rows = {
        "one population": [Timed(2.0, 1.0), Timed(6.0, 3.0), Timed(4.0, 2.0)],
        "one after another": [Timed(8.0, 3.0)],
    }
    lines = population.table(rows, 1200).splitlines()
    assert [line.strip("| ").split(" | ") for line in lines[2:]] == [
        ["one population", "2 6 4", "300", "2.00", "1 3 2", "600", "1.50"],
        ["one after another", "8", "150", "1.00", "3", "400", "1.00"],
    ]
