"""The first run: masked language modelling on the documentation of Python.

    python -m pretraining.train --config=configs/quickstart.py --workdir=runs/quickstart

4 layers of 128 on 4,096 pieces, batches of 64 rows of 128 tokens.
"""

import ml_collections

from configs import masked_lm


def get_config() -> ml_collections.ConfigDict:
    config = masked_lm.get_config("tiny")
    config.model.layers = 4
    config.train.batch_size = 64
    return config
