"""Should 15 % of the tokens be masked?

Wettig et al. 2023, "Should You Mask 15 % in Masked Language Modeling?", change three things, which
are changed here apart: how many tokens are masked, what stands in their place ([MASK] alone, or
BERT's 80/10/10), and how many of those corrupted are predicted.

More predicted than corrupted means two copies of each row with disjoint masks (`data.copies`). The
batch has twice the rows then, so that all runs see the same text at the same step; it costs twice
the FLOPs, and `tokens` counts both copies. Fewer predicted than corrupted means that some of the
masked tokens have no loss.

Protocols: tiny and small are those of experiments/sizes.py. paper has the sizes and the optimizer
of the paper's large models: 24 layers of 1,024 with norms before the sub-layers, 128 positions,
23,000 updates of 4,096 rows, peak 2e-3 after 6 % (DinkyTrain, run_efficient_mlm_recipe.sh).
Departures from that script: a vocabulary of our own, and [CLS] and [SEP] are never masked.
"""

from collections.abc import Iterator

from experiments.question import Figure, Protocol, Published, Run, product, repeat, values
from experiments.sizes import SEEDS, SMALL, TINY

PROTOCOLS = {
    "tiny": Protocol("2 layers of 128, 3 seeds: minutes per run on a CPU core"),
    "small": Protocol("12 layers of 256, 100 M tokens, 3 seeds: one accelerator", "full"),
    "paper": Protocol("24 layers of 1,024, 12 G tokens, 1 seed: many accelerators", "full"),
}
BASELINE = "mask-15"
CONTRASTS = {  # rates; replacement at one rate; prediction at one corruption
    **{f"mask-{rate}": BASELINE for rate in (20, 30, 40, 50, 60, 70, 80)},
    "bert-15": "mask-15",
    "bert-40": "mask-40",
    "corrupt-20-predict-40": "mask-20",
    "corrupt-40-predict-20": "mask-40",
}

MASK_ONLY = {
    "objective.mask_fraction": 1.0,
    "objective.random_fraction": 0.0,
    "objective.keep_fraction": 0.0,
}
BERT = {
    "objective.mask_fraction": 0.8,
    "objective.random_fraction": 0.1,
    "objective.keep_fraction": 0.1,
}
PAPER = {
    "model.norm_order": "pre",
    "model.segments": 0,
    "model.activation": "gelu_erf",
    "objective.count": "stochastic",
    "objective.random_tokens": "no_specials",
    "data.sequence_length": 128,
    "tokenizer.size": 50_265,
    "optimizer.name": "adamw",
    "optimizer.schedule": "linear",
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup": "6%",
    "optimizer.beta2": 0.98,
    "optimizer.decay_exclude": (),
    "optimizer.clip": 0.0,
    "train.steps": 23_000,
    "train.batch_size": 4096,
    "evaluate.every": "5%",
    "checkpoint.every": "5%",
}
SIZES = {  # recipe, overrides, percentages, seeds
    "tiny": ("configs/masked_lm.py:tiny", TINY, (15, 20, 40, 60, 80), SEEDS),
    "small": ("configs/masked_lm.py:small", SMALL, (15, 20, 40, 60, 80), SEEDS),
    "paper": ("configs/masked_lm.py:large", PAPER, (15, 20, 30, 40, 50, 60, 70, 80), 1),
}
ROWS = {"tiny": 32, "small": 128, "paper": 4096}  # of a batch


def runs(protocol: str) -> Iterator[Run]:
    """Rates, then replacement, then corruption and prediction apart."""
    recipe, shared, rates, count = SIZES[protocol]
    twice = {"data.copies": 2, "train.batch_size": 2 * ROWS[protocol]}
    variants = product({"mask": MASK_ONLY}, rated(*rates)) | product({"bert": BERT}, rated(15, 40))
    variants["corrupt-20-predict-40"] = variants["mask-20"] | twice
    variants["corrupt-40-predict-20"] = variants["mask-40"] | {"objective.predict_rate": 0.2}
    for variant, overrides in variants.items():
        yield from repeat(variant, recipe, shared | overrides, count)


def rated(*percentages: int) -> dict[str, dict[str, float]]:
    """The overrides that mask so many in a hundred."""
    return values("objective.mask_rate", {str(each): each / 100 for each in percentages})


# -------------------------------------------------------------------------------------- figures

# By rate, 24 layers, 23,000 updates, development sets: the paper's README.
_TABLE = {
    0.15: (84.2, 90.9, 87.8, 93.3),
    0.20: (84.1, 91.3, 87.9, 92.7),
    0.30: (84.2, 91.6, 88.0, 93.0),
    0.40: (84.5, 91.6, 88.1, 92.8),
    0.50: (84.1, 91.1, 88.1, 92.7),
    0.60: (83.2, 90.7, 87.8, 92.6),
    0.70: (82.3, 89.4, 87.5, 91.9),
    0.80: (80.8, 87.9, 87.1, 90.5),
}
_SOURCE = "Wettig et al. 2023, large, 23k updates (DinkyTrain, README.md)"
PUBLISHED = tuple(
    Published(task, "accuracy, development set (%)", _SOURCE, {k: v[i] for k, v in _TABLE.items()})
    for i, task in enumerate(("MNLI", "QNLI", "QQP", "SST-2"))
)
APART = Published(
    "MNLI, corruption and prediction apart",
    "accuracy, development set (%)",
    "Wettig et al. 2023, table 3",
    {
        "mask-40": 84.5,
        "corrupt-40-predict-20": 83.7,
        "mask-20": 84.1,
        "corrupt-20-predict-40": 85.7,
    },
)

# One curve for each way of replacing, of the runs that predict what they corrupt.
_AS_CORRUPTED = {"objective.predict_rate": 0.0, "data.copies": 1}
_SERIES = {
    "[MASK] alone": {"objective.mask_fraction": 1.0} | _AS_CORRUPTED,
    "80/10/10": {"objective.mask_fraction": 0.8} | _AS_CORRUPTED,
}


def by_rate(metric: str, title: str, better: str, published=()) -> Figure:
    return Figure(metric, title, better, "objective.mask_rate", _SERIES, published)


FIGURES = (
    by_rate("yardstick/family/masked_loss", "Loss at a fixed 15 % of [MASK]", "lower", PUBLISHED),
    by_rate("yardstick/blimp/accuracy", "BLiMP", "higher", PUBLISHED),
    by_rate("yardstick/probe/average", "Linear probes, average", "higher", PUBLISHED),
    by_rate("eval/loss", "Validation loss at 15 %, replaced 80/10/10", "lower"),
    Figure(
        "yardstick/family/masked_loss",
        "Corruption and prediction apart",
        "lower",
        series={"": {"variant": (*APART.points,)}},
        published=(APART,),
    ),
)
