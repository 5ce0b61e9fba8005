"""The table of populations, by hand."""

from experiments.speed import population
from experiments.speed.population import Timed


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
