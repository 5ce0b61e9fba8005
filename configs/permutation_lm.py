"""XLNet's permutation language modelling, and every knob of it that an ablation turns.

    python -m pretraining.train --config=configs/permutation_lm.py:small --workdir=runs/permutation

Sizes:
  tiny   2 layers of 128 on 4,096 pieces, 128 positions: to see that everything runs.
  small  12 layers of 256 on 8,192 pieces, 128 positions: the size for comparisons. Like tiny it
         has the widths, text and steps of configs/masked_lm.py, one permutation for the whole row
         and no reversed rows.
  base   XLNet-base, 12 layers of 768, 512 positions in two permutations of 256, half of the rows
         reversed. How it was trained was not published; its batch, steps, learning rate and
         warm-up are those of BERT-base, to which Yang et al. (2019, section 3.4) compare it.
  large  XLNet-large, 24 layers of 1,024, with the hyperparameters of table 7 of that paper.
         (The command in the README of zihangdai/xlnet has batches of 2,048 instead.)

base and large have XLNet's optimizer (xlnet/model_utils.py): Adam without bias correction, linear
decay to a thousandth, and weight decay on the attention biases too. Departure: no memory of the
previous row. They want a large corpus: --config.data.corpus="tfds:wiki40b/en:train".

Run so far: tiny, on 2 CPU cores and 103 MB of English Wikipedia (2026-11-20): 500 steps in 246 s
beside other work, validation loss 6.40, against 6.64 of the unigram baseline
(experiments/first_runs).

Other recipes, as changes of these keys:
  The code of XLNet, its n-grams of pieces   ngram_unit=pieces
  The last sixth of the permutation (section 2.3)   select=last
"""

import ml_collections

from configs import base, masked_lm

XLNET = dict(
    position="relative",
    embedding_norm=False,
    head_transform=False,
)
OPTIMIZER = dict(
    name="bert_adam",
    schedule="linear",
    end_fraction=0.001,
    # "/": the biases of the scores, content_bias and its like, are decayed
    decay_exclude=("/bias$", "norm", "scale$"),
)


def like_masked_lm(size: str) -> dict:
    """The size of configs/masked_lm.py with XLNet's network."""
    shared = masked_lm.SIZES[size]
    return shared | dict(model=shared["model"] | XLNET)


SIZES = {
    "tiny": like_masked_lm("tiny"),
    "small": like_masked_lm("small"),
    "base": dict(
        model=dict(logits_chunk=128, layers=12, width=768, heads=12, mlp_width=3072, **XLNET),
        objective=dict(permutation_size=256, backward_fraction=0.5),
        tokenizer=dict(size=32_000),
        data=dict(sequence_length=512),
        optimizer=dict(learning_rate=1e-4, warmup=10_000, **OPTIMIZER),
        train=dict(steps=1_000_000, batch_size=256),
        evaluate=dict(every=10_000),
        checkpoint=dict(every=10_000),
    ),
    "large": dict(
        model=dict(logits_chunk=128, layers=24, width=1024, heads=16, mlp_width=4096, **XLNET),
        objective=dict(permutation_size=256, backward_fraction=0.5),
        tokenizer=dict(size=32_000),
        data=dict(sequence_length=512),
        optimizer=dict(learning_rate=4e-4, warmup=40_000, **OPTIMIZER),
        train=dict(steps=500_000, batch_size=8192),
        evaluate=dict(every=10_000),
        checkpoint=dict(every=10_000),
    ),
}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """One of SIZES; UserError for any other."""
    return base.at_size(SIZES, size, objective())


def objective():
    return dict(
        name="permutation_lm",
        # share of the positions that is predicted, rounded: 85 of 512 (XLNet's K = 6)
        predict_fraction=1 / 6,
        # what is predicted: ngram, n-grams and single tokens | last, the last of the permutation
        select="ngram",
        ngram_longest=5,  # n = 1..5 with probability proportional to 1 / n
        ngram_unit="words",  # n counts words | pieces (XLNet's code)
        mask_alpha=6,  # an n-gram stands in a context of n * mask_alpha // mask_beta tokens
        mask_beta=1,
        # positions of one permutation, which sees all before it and nothing after it; must divide
        # data.sequence_length; 0 = all of them (XLNet: 256 of 512)
        permutation_size=0,
        backward_fraction=0.0,  # share of the rows that is reversed in training (XLNet: 0.5)
    )
