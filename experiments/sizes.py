"""What the protocols `tiny` and `small` of all questions share, as overrides of the recipes.

tiny changes the recipe ":tiny": two layers of 128 on 1,024 pieces and 64 positions, 400 updates,
about two minutes on one CPU core. small changes ":small": 12 layers of 256 on 8,192 pieces, 128
positions, 100 M tokens. Both have rotary positions and norms before the sub-layers.

A comparison on a CPU shows nothing while all runs stand on the plateau at the unigram loss. Of what
was tried on Wikipedia with masked_lm (2026-11-20, mask rates .15 to .6), tiny at init_std .02 stood
there after 1,000 updates with 2,048 pieces, and for 300 of 800 with 512; at init_std .06 (near
1 / sqrt(width)), beta2 .98 and peak 2e-3 it had left it after 150 of 400 with 512 pieces, and
after 200 of 600 with 1,024.
"""

SEEDS = 3

TINY = {
    "model.layers": 2,
    "model.width": 128,
    "model.heads": 2,
    "model.mlp_width": 512,
    "model.position": "rotary",
    "model.norm_order": "pre",
    "model.init_std": 0.06,
    "tokenizer.size": 1024,
    "data.sequence_length": 64,
    "optimizer.learning_rate": 2e-3,
    "optimizer.beta2": 0.98,
    "train.batch_size": 32,
    "train.steps": 400,
    "evaluate.every": "12.5%",
    "checkpoint.every": "12.5%",
    "checkpoint.keep": 1,
    "log.every": 20,
    "log.tensorboard": False,
}

SMALL = {
    "model.position": "rotary",
    "model.norm_order": "pre",
    "train.steps": 6250,  # 100 M tokens in batches of 128 x 125
    "evaluate.every": "5%",
    "checkpoint.every": "10%",
    "checkpoint.keep": 1,
    "log.tensorboard": False,
}
