"""The published hyperparameters of the recipes, typed from the papers and the original code."""

import importlib

import pytest

from pretraining.config import flatten

# Devlin et al. 2019, appendix A.2; Joshi et al. 2020 and SpanBERT's README; Clark et al. 2020,
# table 6; Yang et al. 2019, table 7, and xlnet/train.py.
BERT_ADAM = {
    "optimizer.name": "bert_adam",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip": 1.0,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "data.sequence_length": 512,
}
ELECTRA = BERT_ADAM | {
    "optimizer.schedule": "electra",
    "optimizer.learning_rate": 2e-4,
    "optimizer.warmup": 10_000,
    "objective.discriminator_weight": 50.0,
    "objective.mask_fraction": 0.85,
    "objective.random_fraction": 0.0,
    "model.activation": "gelu_erf",
}
XLNET = BERT_ADAM | {
    "optimizer.schedule": "linear",
    "optimizer.end_fraction": 0.001,
    "objective.predict_fraction": 1 / 6,
    "objective.mask_alpha": 6,
    "objective.mask_beta": 1,
    "objective.ngram_longest": 5,
    "objective.permutation_size": 256,
    "objective.backward_fraction": 0.5,
    "model.activation": "gelu_tanh",
}
SPANBERT = BERT_ADAM | {
    "optimizer.name": "adamw",
    "optimizer.schedule": "linear",
    "optimizer.epsilon": 1e-8,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup": 10_000,
    "optimizer.decay_exclude": (),
    "train.steps": 2_400_000,
    "train.batch_size": 256,
    "objective.mask_rate": 0.15,
    "objective.span_probability": 0.2,
    "objective.span_longest": 10,
    "objective.boundary_longest": 15,
    "objective.boundary_width": 200,
    "objective.boundary_smooth": 1.0,
    "model.activation": "gelu_erf",
}
BERT = BERT_ADAM | {
    "optimizer.schedule": "bert",
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup": 10_000,
    "train.steps": 1_000_000,
    "train.batch_size": 256,
    "model.activation": "gelu_tanh",
}
RECIPES = {
    "masked_lm:base": BERT,
    "masked_lm:large": BERT | {"model.layers": 24, "model.width": 1024},
    "span_boundary:base": SPANBERT | {"model.layers": 12, "model.width": 768},
    "span_boundary:large": SPANBERT | {"model.layers": 24, "model.width": 1024},
    "replaced_token_detection:base": ELECTRA
    | {
        "objective.generator_size": 1 / 3,
        "objective.mask_rate": 0.15,
        "train.steps": 766_000,
        "train.batch_size": 256,
    },
    "replaced_token_detection:large": ELECTRA
    | {
        "objective.generator_size": 0.25,
        "objective.mask_rate": 0.25,
        "train.steps": 400_000,
        "train.batch_size": 2048,
    },
    "permutation_lm:large": XLNET
    | {
        "optimizer.learning_rate": 4e-4,
        "optimizer.warmup": 40_000,
        "train.steps": 500_000,
        "train.batch_size": 8192,
        "model.layers": 24,
        "model.heads": 16,
    },
    "permutation_lm:base": XLNET | {"model.layers": 12, "model.heads": 12},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_hyperparameters(recipe):
    name, size = recipe.split(":")
    found = flatten(importlib.import_module(f"configs.{name}").get_config(size))
    expected = RECIPES[recipe]
    assert {key: found[key] for key in expected} == expected
