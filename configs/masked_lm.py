"""BERT's masked language modelling, and every knob of it that an ablation turns.

    python -m pretraining.train --config=configs/masked_lm.py:small --workdir=runs/masked_lm

Sizes:
  tiny   2 layers of 128 on 4,096 pieces, 128 positions: to see that everything runs.
  small  12 layers of 256 on 8,192 pieces, 128 positions: the size for comparisons.
  base   BERT-base, 12 layers of 768, 512 positions, with BERT's optimizer (Devlin et al. 2019,
         appendix A.2; google-research/bert). Departure: 512 positions from the start, where BERT
         took 128 for the first 90 % of the steps.
  large  BERT-large, 24 layers of 1,024, likewise.

base and large want a large corpus: --config.data.corpus="tfds:wiki40b/en:train".

Run so far: tiny, on 2 CPU cores and 103 MB of English Wikipedia (2026-11-20): 500 steps in 160 s
beside other work, validation loss 6.38, against 6.63 of the unigram baseline
(experiments/first_runs).

Other published recipes, as changes of these keys:
  RoBERTa               count=stochastic random_tokens=no_specials
  Whole-word BERT       unit=whole_word
  ALBERT's n-grams      unit=ngram
  SpanBERT's spans      unit=span count=ceil replacement_unit=span random_tokens=unigram
  "Should You Mask 15 %?"  mask_rate=0.4 mask_fraction=1 random_fraction=0 keep_fraction=0
  Corrupt 20, predict 40   mask_rate=0.2, and data.copies=2
"""

import ml_collections

from configs import base

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
        model=dict(logits_chunk=128, layers=12, width=768, heads=12, mlp_width=3072, segments=2),
        tokenizer=dict(size=30_522),
        data=dict(sequence_length=512),
        optimizer=dict(name="bert_adam", schedule="bert", learning_rate=1e-4, warmup=10_000),
        train=dict(steps=1_000_000, batch_size=256),
        evaluate=dict(every=10_000),
        checkpoint=dict(every=10_000),
    ),
    "large": dict(
        model=dict(logits_chunk=128, layers=24, width=1024, heads=16, mlp_width=4096, segments=2),
        tokenizer=dict(size=30_522),
        data=dict(sequence_length=512),
        optimizer=dict(name="bert_adam", schedule="bert", learning_rate=1e-4, warmup=10_000),
        train=dict(steps=1_000_000, batch_size=256),
        evaluate=dict(every=10_000),
        checkpoint=dict(every=10_000),
    ),
}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """One of SIZES; UserError for any other."""
    return base.at_size(SIZES, size, objective())


def objective():
    return dict(
        name="masked_lm",
        mask_rate=0.15,  # share of the tokens that is corrupted, to the nearest 0.0001
        mask_rate_final=0.0,  # the same at the end of the run; 0 = mask_rate
        mask_rate_schedule="constant",  # from one to the other: constant | linear | cosine
        # share of the tokens that is predicted, of those that are corrupted; 0 = all of them.
        # To predict more than is corrupted: data.copies
        predict_rate=0.0,
        # what becomes of a corrupted token; the three add up to 1
        mask_fraction=0.8,  # [MASK]
        random_fraction=0.1,  # a random token
        keep_fraction=0.1,  # itself
        random_tokens="all",  # ids drawn: all (BERT) | no_specials (RoBERTa) | unigram (SpanBERT)
        # that happens to each: token (BERT) | span, all adjacent ones alike (SpanBERT)
        replacement_unit="token",
        # what is chosen: token | whole_word (BERT) | span, geometric (SpanBERT) | ngram (ALBERT)
        unit="token",
        # how many: exact, rounded (BERT) | ceil, rounded up (SpanBERT) | stochastic, rounded by lot
        # (RoBERTa) | bernoulli, one draw per token (transformers' collator)
        count="exact",
        span_probability=0.2,  # unit=span: p of the geometric law of the length in words
        span_longest=10,  # unit=span: where that law is cut off
        ngram_longest=3,  # unit=ngram: n = 1..3 with probability proportional to 1 / n
        evaluation_mask_rate=0.15,  # the mask rate of every evaluation
        smooth=0.0,  # added to the number of predicted tokens that divides the loss (BERT: 1e-5)
    )
