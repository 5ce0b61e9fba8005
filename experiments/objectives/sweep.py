"""Which objective learns most from the same tokens, and from the same FLOPs?

All five see the same rows in the same order under the same optimizer and learning rate. `<name>`
has as many updates as masked_lm; `<name>-flops` as many as cost the FLOPs of masked_lm, with the
learning rate's schedule stretched to that length. Width, depth, heads and vocabulary are shared.
What a method cannot do without is kept: XLNet's two streams with relative positions and norms after
the sub-layers (the others: rotary positions, norms before them), ELECTRA's generator (beside the
network that is compared), SpanBERT's spans and its second head.

Losses of different objectives do not compare; what does is BLiMP and the probes.

Protocols: tiny and small are those of experiments/sizes.py. In paper all five take the width of
BERT-base and one schedule on 128 positions, which is nobody's published recipe: those differ in
more than the objective.
"""

from collections.abc import Iterator

from experiments.question import Figure, Protocol, Published, Run, SameFlops, repeat
from experiments.sizes import SEEDS, SMALL, TINY

PROTOCOLS = {
    "tiny": Protocol("2 layers of 128, 3 seeds: minutes per run on a CPU core"),
    "small": Protocol("12 layers of 256, 100 M tokens, 3 seeds: one accelerator", "full"),
    "paper": Protocol("12 layers of 768, 16 G tokens, 1 seed: many accelerators", "full"),
}
BASELINE = "masked_lm"

OTHERS = ("causal_lm", "permutation_lm", "span_boundary", "replaced_token_detection")
COMMON = {  # what the recipes have of their own without need
    "model.activation": "gelu_tanh",
    "model.embedding_norm": True,
    "model.head_transform": True,
}
PAPER = {
    "model.layers": 12,
    "model.width": 768,
    "model.heads": 12,
    "model.mlp_width": 3072,
    "model.norm_order": "pre",
    "model.position": "rotary",
    "tokenizer.size": 30_522,
    "data.sequence_length": 128,
    "optimizer.learning_rate": 2e-4,
    "optimizer.warmup": "1%",
    "train.steps": 500_000,
    "train.batch_size": 256,
    "evaluate.every": "2%",
    "checkpoint.every": "1%",
}
SIZES = {
    "tiny": ("tiny", TINY, SEEDS),
    "small": ("small", SMALL, SEEDS),
    "paper": ("small", PAPER, 1),
}


def runs(protocol: str) -> Iterator[Run]:
    """At the same tokens, then at the same FLOPs."""
    size, shared, count = SIZES[protocol]
    shared = shared | COMMON
    for name in (BASELINE, *OTHERS):
        yield from repeat(name, f"configs/{name}.py:{size}", shared | own(name), count)
    for name in OTHERS:
        overrides = shared | own(name) | {"train.steps": SameFlops(BASELINE)}
        yield from repeat(f"{name}-flops", f"configs/{name}.py:{size}", overrides, count)


def own(name: str) -> dict[str, str]:
    """What a method cannot do without."""
    two_streams = {"model.position": "relative", "model.norm_order": "post"}
    return two_streams if name == "permutation_lm" else {}


# -------------------------------------------------------------------------------------- figures

PUBLISHED = (
    Published(
        "BERT-base, no NSP, both sides or from the left",
        "MNLI-m, development set (%)",
        "Devlin et al. 2019, table 5",
        {"masked_lm": 83.9, "causal_lm": 82.1},
    ),
    Published(
        "XLNet-base (K = 6) beside BERT-base, Wikipedia and books",
        "MNLI-m, development set (%)",
        "Yang et al. 2019, table 6",
        {"masked_lm": 84.34, "permutation_lm": 85.63},
    ),
    Published(
        "ELECTRA-Base beside BERT-Base, same FLOPs",
        "GLUE, development set, average",
        "Clark et al. 2020, table 1",
        {"masked_lm": 82.2, "replaced_token_detection-flops": 85.1},
    ),
    Published(
        "ELECTRA-Small beside BERT-Small, same FLOPs",
        "GLUE, development set, average",
        "Clark et al. 2020, table 1",
        {"masked_lm": 75.1, "replaced_token_detection-flops": 79.9},
    ),
    Published(
        "Span masking on one segment, without and with the boundary objective",
        "GLUE, development set, average",
        "Joshi et al. 2020, table 7",
        {"span masking alone": 83.8, "span_boundary": 84.0},
    ),
)
FIGURES = (
    Figure("yardstick/probe/average", "Linear probes, average", "higher", published=PUBLISHED),
    Figure("yardstick/blimp/accuracy", "BLiMP", "higher", published=PUBLISHED),
)
