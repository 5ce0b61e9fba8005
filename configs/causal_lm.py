"""Causal language modelling: GPT's objective.

    python -m pretraining.train --config=configs/causal_lm.py:small --workdir=runs/causal_lm

Sizes:
  tiny   2 layers of 128 on 4,096 pieces, 128 positions: to see that everything runs.
  small  12 layers of 256 on 8,192 pieces, 128 positions: the size for comparisons. Like tiny it
         is the network of configs/masked_lm.py, so that the two differ in the objective alone.
  base   GPT-2's smallest, 12 layers of 768, 1,024 positions, 124M parameters (gpt-2/src/model.py).
  large  GPT-2's second, 24 layers of 1,024, 355M parameters.

base and large train as GPT-1 did, because GPT-2's learning rate and number of steps were never
published (Radford et al. 2018: 2.5e-4, 2,000 steps of warm-up, cosine), with GPT-2's batch of 512.
They want a large corpus: --config.data.corpus="tfds:wiki40b/en:train".

Run so far: tiny, on 2 CPU cores and 103 MB of English Wikipedia (2026-11-20): 500 steps in 298 s
beside other work, validation loss 5.50, against 6.65 of the unigram baseline
(experiments/first_runs).
"""

import ml_collections

from configs import base

GPT2 = dict(
    norm_order="pre",
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    embedding_norm=False,
    position_init_std=0.01,
    head_transform=False,
    head_bias=False,
)

SIZES = {
    "tiny": dict(
        model=dict(layers=2, width=128, heads=2, mlp_width=512, dropout=0.0, attention_dropout=0.0),
        tokenizer=dict(size=4096),
        data=dict(sequence_length=128),
        optimizer=dict(learning_rate=1e-3),
        train=dict(steps=500, batch_size=32),
    ),
    "small": dict(
        model=dict(layers=12, width=256, heads=4, mlp_width=1024),
        tokenizer=dict(size=8192),
        data=dict(sequence_length=128),
        optimizer=dict(learning_rate=5e-4),
        train=dict(steps=10_000, batch_size=128),
    ),
    "base": dict(
        model=dict(logits_chunk=128, layers=12, width=768, heads=12, mlp_width=3072, **GPT2),
        tokenizer=dict(kind="bpe", size=50_257, normalization="identity"),
        data=dict(sequence_length=1024),
        optimizer=dict(schedule="cosine", learning_rate=2.5e-4, warmup=2000),
        train=dict(steps=300_000, batch_size=512),
        evaluate=dict(every=5000),
        checkpoint=dict(every=5000),
    ),
    "large": dict(
        model=dict(logits_chunk=128, layers=24, width=1024, heads=16, mlp_width=4096, **GPT2),
        tokenizer=dict(kind="bpe", size=50_257, normalization="identity"),
        data=dict(sequence_length=1024),
        optimizer=dict(schedule="cosine", learning_rate=2.5e-4, warmup=2000),
        train=dict(steps=300_000, batch_size=512),
        evaluate=dict(every=5000),
        checkpoint=dict(every=5000),
    ),
}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """One of SIZES; UserError for any other."""
    return base.at_size(SIZES, size, objective())


def objective():
    return dict(
        name="causal_lm",
        label_smoothing=0.0,  # share of the label that is spread over the vocabulary, in training
        z_loss=0.0,  # factor of (log of the softmax's denominator)^2, in training (PaLM: 1e-4)
    )
