"""SpanBERT: masked spans, predicted in place and from the two tokens around them.

    python -m pretraining.train --config=configs/span_boundary.py:small --workdir=runs/span_boundary

Sizes:
  tiny   2 layers of 128 on 4,096 pieces, 128 positions: to see that everything runs.
  small  12 layers of 256 on 8,192 pieces, 128 positions: the size for comparisons. Like tiny it
         is the network, data and optimizer of configs/masked_lm.py, so that the two differ in the
         objective alone.
  base   SpanBERT-base: BERT-base cased, 12 layers of 768, 512 positions.
  large  SpanBERT-large, 24 layers of 1,024, likewise.

base and large train by the published command (SpanBERT, pretraining/README.md): plain Adam, every
parameter decayed, 2.4M steps of 256 rows. The command decays by .01, which is taken here; the paper
(Joshi et al. 2020) says .1: --config.optimizer.weight_decay=0.1. Departures: a
vocabulary of our own of the same size, and no clamp of the attention scores, a guard for float16.
They want a large corpus: --config.data.corpus="tfds:wiki40b/en:train".

Run so far: tiny, on 2 CPU cores and 103 MB of English Wikipedia (2026-11-20): 500 steps in 137 s
beside other work, masked_lm 6.47 and span_boundary 6.52 in validation, against 6.67 of the unigram
baseline (experiments/first_runs).

Ablations of the paper (tables 6 and 7), as changes of these keys:
  without the objective   boundary_weight=0
  single tokens           unit=token replacement_unit=token
  whole words             unit=whole_word replacement_unit=token
"""

import ml_collections

from configs import base, masked_lm

ADAM = dict(
    name="adamw",
    schedule="linear",
    learning_rate=1e-4,
    warmup=10_000,
    epsilon=1e-8,
    weight_decay=0.01,  # the published command; the paper: 0.1
    decay_exclude=(),  # norms and biases are decayed too
)
TRAIN = dict(
    data=dict(sequence_length=512),
    tokenizer=dict(size=28_996),
    optimizer=ADAM,
    train=dict(steps=2_400_000, batch_size=256),
    evaluate=dict(every=10_000),
    checkpoint=dict(every=10_000),
)
MODEL = dict(logits_chunk=128, segments=2, activation="gelu_erf")

SIZES = {
    "tiny": masked_lm.SIZES["tiny"],
    "small": masked_lm.SIZES["small"],
    "base": dict(model=dict(layers=12, width=768, heads=12, mlp_width=3072, **MODEL), **TRAIN),
    "large": dict(model=dict(layers=24, width=1024, heads=16, mlp_width=4096, **MODEL), **TRAIN),
}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """One of SIZES; UserError for any other."""
    return base.at_size(SIZES, size, objective())


def objective():
    """The keys of configs/masked_lm.py, where they are explained, set as SpanBERT has them."""
    return masked_lm.objective() | dict(
        name="span_boundary",
        unit="span",  # geometric lengths of span_probability=0.2, at most span_longest=10 words
        count="ceil",  # 15 % of the tokens without [CLS] and [SEP], rounded up
        replacement_unit="span",  # one draw for each merged span
        random_tokens="unigram",  # by frequency in the training split
        boundary_longest=15,  # tokens of a merged span that the boundaries predict, the first ones
        boundary_width=200,  # width of the embeddings of their places in the span
        boundary_weight=1.0,  # factor of the boundary loss; 0 = a metric only
        boundary_smooth=1.0,  # added to the number of its predictions, which divides it
    )
