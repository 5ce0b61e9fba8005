"""How large should ELECTRA's generator be?

Its width, feed-forward and heads are a share of the discriminator's, its layers are not changed
(Clark et al. 2020, section 3.2). The paper found 1/4 to 1/2 best at the same number of updates; its
figure 3 shows that as curves, without numbers that could stand here.

All runs have the same updates, so a larger generator costs more FLOPs: `<size>-flops` has as many
updates as cost the FLOPs of a generator of a quarter.

Protocols: tiny and small are those of experiments/sizes.py; paper is ELECTRA-base with 500,000
updates, those of the paper's comparison of shared weights (section 3.2).
"""

from collections.abc import Iterator

from experiments.question import Figure, Protocol, Run, SameFlops, product, repeat, values
from experiments.sizes import SEEDS, SMALL, TINY

PROTOCOLS = {
    "tiny": Protocol("2 layers of 128, 3 seeds: minutes per run on a CPU core"),
    "small": Protocol("12 layers of 256, 100 M tokens, 3 seeds: one accelerator", "full"),
    "paper": Protocol("12 layers of 768, 66 G tokens, 1 seed: many accelerators", "full"),
}
BASELINE = "quarter"

GENERATORS = values(
    "objective.generator_size",
    {"eighth": 0.125, "quarter": 0.25, "half": 0.5, "three_quarters": 0.75, "whole": 1.0},
)
PAPER = {"train.steps": 500_000}
SIZES = {
    "tiny": ("tiny", TINY, SEEDS),
    "small": ("small", SMALL, SEEDS),
    "paper": ("base", PAPER, 1),
}


def runs(protocol: str) -> Iterator[Run]:
    """At the same updates, then at the same FLOPs."""
    size, shared, count = SIZES[protocol]
    recipe = f"configs/replaced_token_detection.py:{size}"
    others = {name: overrides for name, overrides in GENERATORS.items() if name != BASELINE}
    same_flops = product(others, {"flops": {"train.steps": SameFlops(BASELINE)}})
    for name, overrides in (GENERATORS | same_flops).items():
        yield from repeat(name, recipe, shared | overrides, count)


# -------------------------------------------------------------------------------------- figures

SERIES = {
    "same updates": {"variant": (*GENERATORS,)},
    "same FLOPs": {"variant": (BASELINE, *(f"{name}-flops" for name in GENERATORS))},
}


def by_size(metric: str, title: str) -> Figure:
    return Figure(metric, title, "higher", "objective.generator_size", SERIES)


FIGURES = (
    by_size("yardstick/probe/average", "Linear probes, average"),
    by_size("yardstick/blimp/accuracy", "BLiMP"),
)
