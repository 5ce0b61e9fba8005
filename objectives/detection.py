"""What ELECTRA's discriminator learns: `config.objective.discriminator` names one of KINDS.

Each is a function `(config, call, hidden [B, L, D], example, fake) -> {name: Term}`: `call` applies
a method of `electra.Networks`, `hidden` is what its `encode` returned for `fake.tokens`, see
objectives/sampling.py. The term of the loss is `discriminator`, the others are metrics.
"""

import functools

import jax
import jax.numpy as jnp

from objectives import base, sampling
from objectives.base import Term
from pretraining.models.heads import gather_positions


def detection(config, call, hidden, example, fake):
    """True or replaced, of every token."""
    logits = call(hidden, method="discriminate")
    return _binary_terms(config, logits, fake.replaced, fake.valid, majority=~fake.replaced)


def masked_detection(config, call, hidden, example, fake):
    """The same of the selected tokens alone."""
    logits = call(gather_positions(hidden, example.positions), method="discriminate")
    label = jnp.take_along_axis(fake.replaced, example.positions, axis=1)
    return _binary_terms(config, logits, label, example.weights, majority=label)


def electric(config, call, hidden, example, fake):
    """Selected or not: the discriminator's own logit is an energy, -log p(token | the others).

    Noise-contrastive estimation (Clark et al. 2020b, "Pre-Training Transformers as Energy-Based
    Cloze Models"): logit = energy + log q(token | the others) + log(rate / (1 - rate)), q being the
    generator, whose gradient stops here. [CLS] and [SEP] count too, though their q means nothing,
    as in electra/run_pretraining.py. Departure: the rate is the current one, there a constant.
    """
    project = functools.partial(call, method="project")
    chunk = config.model.logits_chunk
    log_q = sampling.label_log_probs(project, fake.generator_hidden, fake.tokens, chunk)
    odds = jnp.log(example.mask_rate) - jnp.log1p(-example.mask_rate)
    energy = call(hidden, method="discriminate")
    logits = energy + jax.lax.stop_gradient(log_q) + odds[:, None]
    return _binary_terms(config, logits, fake.selected, fake.valid, majority=~fake.selected)


def _binary_terms(config, logits, label, weights, majority):
    """The cross-entropy, and what makes it readable; label, majority: [B, ...] bool.

    `replaced` is the share of label 1; `majority_accuracy` is what one answer for all reaches:
    label 0, or at the selected positions alone label 1. Recall is true_positives / replaced,
    precision true_positives / (true_positives + false_positives).
    """
    called = logits > 0
    figures = {
        "discriminator": jax.nn.softplus(logits) - jnp.where(label, logits, 0.0),
        "discriminator_accuracy": called == label,
        "majority_accuracy": majority,
        "replaced": label,
        "true_positives": called & label,
        "false_positives": called & ~label,
    }
    return _weigh({name: _mean(values, weights) for name, values in figures.items()}, config)


def masked_prediction(config, call, hidden, example, fake):
    """The original tokens at the selected positions."""
    labels, weights = example.labels, example.weights
    sums = base.cross_entropy(
        functools.partial(call, method="discriminate"),
        gather_positions(hidden, example.positions),
        labels,
        weights,
        config.model.logits_chunk,
    )
    terms = {
        "discriminator": Term(sums.loss, weights.sum()),
        "discriminator_accuracy": Term(sums.correct, weights.sum(), scale=0.0),
        "replaced": _mean(fake.replaced, fake.valid),
    }
    return _weigh(terms, config)


def copying_prediction(config, call, hidden, example, fake):
    """The original tokens everywhere: p = g [input is the label] + (1 - g) softmax, g = gate."""
    log_prob = _copying_log_probs(config, call, hidden, example.original, ~fake.replaced)
    terms = {
        "discriminator": _mean(-log_prob, fake.valid),
        "replaced": _mean(fake.replaced, fake.valid),
    }
    return _weigh(terms, config)


def token_log_probs(config, call, hidden, tokens):
    """[B, L]: log-probability of each token that is read, of a kind in PREDICTING."""
    if config.objective.discriminator == "all_tokens_mlm":
        return _copying_log_probs(config, call, hidden, tokens, jnp.ones(tokens.shape, bool))
    return _predicted_log_probs(config, call, hidden, tokens)


def _copying_log_probs(config, call, hidden, labels, copied):
    """[B, L] log-probabilities of labels that are, or are not, what stands in the input."""
    gate = call(hidden, method="gate")
    copy = jnp.where(copied, jax.nn.log_sigmoid(gate), -jnp.inf)
    predicted = _predicted_log_probs(config, call, hidden, labels)
    return jnp.logaddexp(copy, jax.nn.log_sigmoid(-gate) + predicted)


def _predicted_log_probs(config, call, hidden, labels):
    project = functools.partial(call, method="discriminate")
    return sampling.label_log_probs(project, hidden, labels, config.model.logits_chunk)


KINDS = {
    "all": detection,
    "masked_only": masked_detection,
    "replace_mlm": masked_prediction,
    "all_tokens_mlm": copying_prediction,
    "electric": electric,
}
PREDICTING = ("replace_mlm", "all_tokens_mlm")  # tokens, not true or replaced


def _mean(values, weights):
    values, weights = values.astype(jnp.float32), weights.astype(jnp.float32)
    return Term(jnp.sum(values * weights), weights.sum(), scale=0.0)


def _weigh(terms, config):
    weight = config.objective.discriminator_weight
    return terms | {"discriminator": terms["discriminator"]._replace(scale=weight)}
