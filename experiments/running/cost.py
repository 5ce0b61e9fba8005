"""What training will take, before a sweep starts: `--dry`."""

from collections.abc import Sequence

from experiments.running import table
from experiments.running.planned import Planned, duration
from pretraining import metrics
from pretraining.goodput import PREFIX

# Of the peak, where no run of the sweep has come to its end yet: a run's share lies between a tenth
# (tiny models) and a half.
ASSUMED_SHARE = 0.25


def describe(planned: Sequence[Planned], jobs: int) -> str:
    """A line for each run, and the totals; seconds are an estimate, and the last line says whence.

    Args:
      planned: the runs.
      jobs: that go on at once.
    """
    speed, source = _speed(planned)
    lines = [("run", "status", "steps", "tokens", "FLOPs", "time")]
    seconds, flops, tokens = 0.0, 0.0, 0
    for each in planned:
        trained, cost = table.is_trained(each), each.cost
        left = 0.0 if trained else cost.flops / speed
        seconds, flops, tokens = seconds + left, flops + cost.flops, tokens + cost.tokens
        status = table.DONE if table.is_done(each) else "yardstick left" if trained else "to run"
        figures = f"{cost.steps:,}", f"{cost.tokens:,}", f"{cost.flops:.3g}", duration(left)
        lines.append((each.name, status, *figures))
    lines.append((f"{len(planned)} runs", "", "", f"{tokens:,}", f"{flops:.3g}", duration(seconds)))
    yardsticks = sum(bool(each.sample) and not table.is_done(each) for each in planned)
    without = f", and {yardsticks} yardsticks, which are not counted" if yardsticks else ""
    at_once = f"About {duration(seconds / jobs)} with {jobs} at once{without}: {source}."
    return "\n".join([*_aligned(lines), at_once])


def _speed(planned: Sequence[Planned]) -> tuple[float, str]:
    """FLOP/s of one run, and where that comes from."""
    trained = [each for each in planned if table.is_trained(each)]
    seconds = sum(_seconds(each) for each in trained)
    if seconds:
        flops = sum(each.cost.flops for each in trained)
        return flops / seconds, f"by the {len(trained)} runs trained so far"
    peak = planned[0].cost.peak
    return ASSUMED_SHARE * peak, (
        f"no run is trained yet, so {ASSUMED_SHARE:.0%} of the peak of {peak:.3g} FLOP/s, measured "
        "now, is assumed; starts are not counted"
    )


def _seconds(planned: Planned) -> float:
    """All time of a training run, starts and interruptions included."""
    lines = metrics.read(planned.folder / metrics.FILE)
    last = lines[-1] if lines else {}
    phases = {key: value for key, value in last.items() if key.startswith(PREFIX)}
    return sum(phases.values()) - phases.get(f"{PREFIX}down", 0.0)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
