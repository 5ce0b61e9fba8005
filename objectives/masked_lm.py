"""Masked language modelling: predict the tokens that were hidden (Devlin et al. 2019, section 3.1).

Chosen tokens become [MASK], a random token, or stay; the loss is the cross-entropy at all of them,
over their number in the global batch. What an ablation turns is a key of `config.objective`: how
many tokens (`mask_rate`, `predict_rate`, `count`), which (`unit`), and what stands in their place.
RoBERTa (Liu et al. 2019) and "Should You Mask 15 %?" (Wettig et al. 2023) are settings of it.

Departures from bert/create_pretraining_data.py: masks are drawn anew at every step, as in RoBERTa;
one segment and no next-sentence prediction, as in RoBERTa and SpanBERT; the denominator of the loss
has no 1e-5 added (`smooth` adds it). Random tokens are drawn from the whole vocabulary as in BERT,
[MASK], padding and the original included; `random_tokens` has RoBERTa's and SpanBERT's ways too.
Departure from RoBERTa: special tokens are never chosen, though they count in the length.

Evaluation always corrupts `evaluation_mask_rate` (15 %) of the tokens, predicts all of them and
replaces 80/10/10, whatever training does, so that runs compare; the unit and the count rule stay
those of training.
"""

import functools
from collections.abc import Callable

from objectives import base, masking
from objectives.base import Objective, Term
from pretraining.models.heads import gather_positions
from pretraining.models.transformer import TransformerConfig


def build(config, vocabulary) -> Objective:
    """The objective; configs/masked_lm.py explains its keys, objectives/masking.py corrupts.

    Raises:
      UserError: a key is out of range or contradicts another, or the vocabulary has no [CLS], [SEP]
        or [MASK].
    """
    transformer = TransformerConfig.create(
        config.model, vocabulary.size, config.data.sequence_length
    )
    mask = masking.create(config, vocabulary)
    terms = make_terms(config, vocabulary)

    def loss(apply, params, example, knobs, key, train):
        call = functools.partial(apply, {"params": params})
        hidden = call(example, key if train else None, method="encode")
        return terms(functools.partial(call, method="project"), hidden, example)

    return Objective(
        model=base.LanguageModel(transformer, causal=False),
        schedule=mask.schedule,
        evaluation_knobs=mask.evaluation_knobs,
        corrupt=mask.corrupt,
        loss=loss,
        context="both",
        query=functools.partial(masking.query, config, vocabulary),
        log_probs=base.log_probs,
        encode=base.encode,
        describe=masking.describe,
        hugging_face={"": base.network(transformer, "BertForMaskedLM", "RobertaForMaskedLM")},
        summary=base.first_vector,
        family="masked",
        token_term="masked_lm",
    )


def make_terms(config, vocabulary, name: str = "masked_lm") -> Callable[..., dict[str, Term]]:
    """The terms of the loss: `(project, hidden [B, L, D], example) -> {name: Term, metrics}`.

    `project` maps hidden states [B, chunk, D] to logits [B, chunk, V]; the example is one of
    objectives/masking.py, or has its fields.

    Raises:
      UserError: `config.objective.smooth` is negative.
    """
    base.check_range(config, "smooth", 0)
    unigram_nll = base.unigram_nll(vocabulary)

    def terms(project, hidden, example):
        labels, weights = example.labels, example.weights
        states = gather_positions(hidden, example.positions)
        sums = base.cross_entropy(project, states, labels, weights, config.model.logits_chunk)
        found = base.prediction_terms(name, sums, labels, weights, unigram_nll)
        overflow = example.overflow.sum()
        return found | {
            name: found[name]._replace(smooth=config.objective.smooth),
            "overflow": Term(overflow, overflow + weights.sum(), scale=0.0),
        }

    return terms
