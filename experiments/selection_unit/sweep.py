"""What should be masked together: tokens, words, spans or n-grams?

15 % of the tokens under every unit, replaced 80/10/10. The variants change the unit alone; spanbert
is SpanBERT's whole scheme: spans, one draw of the replacement for each span, random tokens by
frequency, and a count that is rounded up (Joshi et al. 2020, section 3.1). Its table 6 also has
named entities and noun phrases, which need annotated text.

Evaluation masks single tokens under every unit in `yardstick/family/masked_loss`; `eval/loss` masks
each run's own units, so it does not compare.

Protocols: tiny and small are those of experiments/sizes.py; paper is the size and optimizer of
SpanBERT's ablations (base, 1.2 M updates of 256 rows of 512), on one segment, where table 6 has two
and next-sentence prediction.
"""

from collections.abc import Iterator

from experiments.question import Figure, Protocol, Published, Run, repeat, values
from experiments.sizes import SEEDS, SMALL, TINY

PROTOCOLS = {
    "tiny": Protocol("2 layers of 128, 3 seeds: minutes per run on a CPU core"),
    "small": Protocol("12 layers of 256, 100 M tokens, 3 seeds: one accelerator", "full"),
    "paper": Protocol("12 layers of 768, 157 G tokens, 1 seed: many accelerators", "full"),
}
BASELINE = "token"

UNITS = ("token", "whole_word", "ngram", "span")
VARIANTS = values("objective.unit", {unit: unit for unit in UNITS}) | {
    "spanbert": {
        "objective.unit": "span",
        "objective.count": "ceil",
        "objective.replacement_unit": "span",
        "objective.random_tokens": "unigram",
    },
}
PAPER = {
    "model.activation": "gelu_erf",
    "tokenizer.size": 28_996,
    "optimizer.name": "adamw",
    "optimizer.schedule": "linear",
    "optimizer.epsilon": 1e-8,
    "optimizer.decay_exclude": (),
    "train.steps": 1_200_000,
}
SIZES = {"tiny": (TINY, SEEDS), "small": (SMALL, SEEDS), "paper": (PAPER, 1)}
RECIPES = {"tiny": "tiny", "small": "small", "paper": "base"}


def runs(protocol: str) -> Iterator[Run]:
    shared, count = SIZES[protocol]
    for variant, overrides in VARIANTS.items():
        recipe = f"configs/masked_lm.py:{RECIPES[protocol]}"
        yield from repeat(variant, recipe, shared | overrides, count)


# -------------------------------------------------------------------------------------- figures

_SOURCE = "Joshi et al. 2020, table 6"
PUBLISHED = (
    Published(
        "GLUE",
        "average, development set",
        _SOURCE,
        {"token": 83.2, "whole_word": 82.9, "spanbert": 83.4},
    ),
    Published(
        "MNLI-m", "accuracy (%)", _SOURCE, {"token": 86.7, "whole_word": 86.3, "spanbert": 87.0}
    ),
    Published(
        "QNLI", "accuracy (%)", _SOURCE, {"token": 92.5, "whole_word": 92.8, "spanbert": 93.3}
    ),
    Published("SQuAD 2.0", "F1", _SOURCE, {"token": 83.8, "whole_word": 84.3, "spanbert": 85.4}),
)
FIGURES = (
    Figure("yardstick/probe/average", "Linear probes, average", "higher", published=PUBLISHED),
    Figure("yardstick/blimp/accuracy", "BLiMP", "higher", published=PUBLISHED),
    Figure(
        "yardstick/family/masked_loss",
        "Loss at a fixed 15 % of [MASK]",
        "lower",
        published=PUBLISHED,
    ),
)
