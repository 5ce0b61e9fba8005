"""Should the mask rate change while training?

Constant, falling and rising linearly, with the same mean of 22.5 % over the run, so that the same
number of tokens is predicted; and the two ends as constant rates. All tokens that are corrupted
become [MASK]. No published numbers stand beside them: what is known of such schedules comes from
other corpora and budgets.

Protocols: tiny and small are those of experiments/sizes.py; paper is configs/masked_lm.py:base on
128 positions.
"""

from collections.abc import Iterator

from experiments.question import Figure, Protocol, Run, repeat, together, values
from experiments.sizes import SEEDS, SMALL, TINY

PROTOCOLS = {
    "tiny": Protocol("2 layers of 128, 3 seeds: minutes per run on a CPU core"),
    "small": Protocol("12 layers of 256, 100 M tokens, 3 seeds: one accelerator", "full"),
    "paper": Protocol("12 layers of 768, 32 G tokens, 1 seed: many accelerators", "full"),
}
BASELINE = "constant"

MASK_ONLY = {
    "objective.mask_fraction": 1.0,
    "objective.random_fraction": 0.0,
    "objective.keep_fraction": 0.0,
}
FIRST = {
    "constant": 0.225,
    "decreasing": 0.30,
    "increasing": 0.15,
    "constant-low": 0.15,
    "constant-high": 0.30,
}
LAST = FIRST | {"decreasing": 0.15, "increasing": 0.30}
SHAPES = dict.fromkeys(FIRST, "constant") | {"decreasing": "linear", "increasing": "linear"}
VARIANTS = together(
    values("objective.mask_rate", FIRST),
    values("objective.mask_rate_final", LAST),
    values("objective.mask_rate_schedule", SHAPES),
)
# Exact counts are rounded: the means would differ.
COUNT = {"objective.count": "stochastic"}
PAPER = {"data.sequence_length": 128}
SIZES = {
    "tiny": ("tiny", TINY, SEEDS),
    "small": ("small", SMALL, SEEDS),
    "paper": ("base", PAPER, 1),
}


def runs(protocol: str) -> Iterator[Run]:
    size, shared, count = SIZES[protocol]
    for variant, overrides in VARIANTS.items():
        overrides = shared | MASK_ONLY | COUNT | overrides
        yield from repeat(variant, f"configs/masked_lm.py:{size}", overrides, count)


# -------------------------------------------------------------------------------------- figures

FIGURES = (
    Figure("yardstick/family/masked_loss", "Loss at a fixed 15 % of [MASK]", "lower"),
    Figure("yardstick/blimp/accuracy", "BLiMP", "higher"),
    Figure("yardstick/probe/average", "Linear probes, average", "higher"),
    Figure("eval/loss", "Validation loss at 15 %, replaced 80/10/10", "lower"),
)
