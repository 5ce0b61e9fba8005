"""Causal language modelling: predict each token from those before it (GPT-2: Radford et al. 2019).

Every payload token is predicted once, the row's first one from [bos], the separators that end the
documents too. The loss is the mean cross-entropy of the batch; `label_smoothing` (Szegedy et al.
2016) and `z_loss` (PaLM: Chowdhery et al. 2022, section 5) belong to training alone, so `causal_lm`
is the plain cross-entropy at all times; with one of them the loss is the term `regularised`.

Departures from gpt-2/src/model.py: the model sees the row from [bos] on, L - 3 of its L positions
are used, so that every objective trains on the same tokens. With `config.model.document_attention`
a document's first token is predicted from the separator of the one before.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from objectives import base
from objectives.base import Description, Objective, Term
from pretraining.data.row import Row
from pretraining.models.attention import Attention
from pretraining.models.transformer import TransformerConfig


class Example(NamedTuple):
    """A row to predict from left to right; nothing is corrupted. K = T.

    Attributes:
      tokens: [L] int32, what the model sees.
      length: [] int32, valid positions, [bos] included.
      document: [L] int32, or None without `config.model.document_attention`.
      positions: [K] int32, positions of the model that predict: those before the labels' own.
      labels: [K] int32.
      weights: [K] float32, 1 or, in unused slots, 0.
    """

    tokens: Any
    length: Any
    document: Any
    positions: Any
    labels: Any
    weights: Any


def build(config, vocabulary) -> Objective:
    """The objective; see configs/causal_lm.py for its keys.

    Raises:
      UserError: a key is out of range, or the vocabulary has no [bos].
    """
    base.require(vocabulary, config.objective.name, "bos")
    base.check_range(config, "label_smoothing", 0, 1)
    base.check_range(config, "z_loss", 0)
    transformer = TransformerConfig.create(
        config.model, vocabulary.size, config.data.sequence_length
    )
    regularisation = {
        "label_smoothing": config.objective.label_smoothing,
        "z_loss": config.objective.z_loss,
    }
    unigram_nll = base.unigram_nll(vocabulary)
    bytes_per_id = np.asarray(vocabulary.bytes_per_id, np.float32)

    def corrupt(key, row: Row, knobs) -> Example:
        """Formats a row as [bos] payload padding; the labels are the payload itself.

        Example: L = 11, T = 8 payload tokens of which 7 are valid.

          row.tokens         the  cat  sat  on   the  old  mat  (pad)
          tokens      [bos]  the  cat  sat  on   the  old  mat  [PAD] [PAD] [PAD]
          length      8
          positions   0      1    2    3    4    5    6    7
          labels      the    cat  sat  on   the  old  mat  [PAD]
          weights     1      1    1    1    1    1    1    0
        """
        return query(row, jnp.arange(row.tokens.shape[0]))

    query = functools.partial(_query, config, vocabulary)

    def loss(apply, params, example, knobs, key, train):
        variables = {"params": params}
        hidden = apply(variables, example, key if train else None, method="encode")
        sums = base.cross_entropy(
            lambda chunk: apply(variables, chunk, method="project"),
            hidden[:, : example.labels.shape[1]],  # the positions are 0..T-1
            example.labels,
            example.weights,
            transformer.logits_chunk,
            **(regularisation if train else {}),
        )
        terms = base.prediction_terms(
            "causal_lm", sums, example.labels, example.weights, unigram_nll
        )
        label_bytes = jnp.sum(jnp.asarray(bytes_per_id)[example.labels] * example.weights)
        terms["bits_per_byte"] = Term(sums.nll / math.log(2), label_bytes, scale=0.0)
        return terms | _regularised(terms["causal_lm"], sums)

    return Objective(
        model=base.LanguageModel(transformer, causal=True),
        schedule=lambda step: {},
        evaluation_knobs={},
        corrupt=corrupt,
        loss=loss,
        context="left",
        query=query,
        log_probs=base.log_probs,
        encode=base.encode,
        describe=describe,
        hugging_face={"": base.network(transformer, "GPT2LMHeadModel", "BertLMHeadModel")},
        summary=base.last_vector,
        family="causal",
        token_term="causal_lm",
    )


def describe(apply, params, row: Row, example: Example) -> Description:
    """Input, what each position predicts, and who sees whom."""
    size = example.tokens.shape[0]
    targets = base.at_positions(example.positions, example.labels, example.weights, size)
    attention = Attention(True, example.length, example.document)
    return Description(
        tokens={"input": base.blank(example.tokens, example.length), "predicts": targets},
        numbers={},
        sees={"attention": base.see(attention, size)},
    )


def _query(config, vocabulary, row: Row, positions: jax.Array) -> Example:
    """Position p of the model has seen the payload before p, and predicts its token p."""
    size, fill = config.data.sequence_length, base.padding(vocabulary)
    known = positions < row.length
    return Example(
        tokens=base.frame(row.tokens, row.length, size, vocabulary.bos, fill, fill),
        length=row.length + 1,
        document=base.frame_document(row, size) if config.model.document_attention else None,
        positions=positions,
        labels=jnp.where(known, row.tokens[positions], fill),
        weights=known.astype(jnp.float32),
    )


def _regularised(plain: Term, sums: base.Sums) -> dict[str, Term]:
    """The terms that training has beside the plain cross-entropy, which is then a figure only."""
    regularisers = {"label_smoothing": sums.uniform, "z_loss": sums.squared_log_z}
    terms = {
        name: Term(value, plain.weight, scale=0.0)
        for name, value in regularisers.items()
        if value is not None
    }
    if not terms:
        return {}
    return terms | {"regularised": plain, "causal_lm": Term(sums.nll, plain.weight, scale=0.0)}
