"""Span boundary objective: masked spans, predicted in place and from the two tokens around them
(SpanBERT, Joshi et al. 2020, sections 3.1 and 3.2).

The spans are those of objectives/masking.py with the keys of configs/span_boundary.py: lengths in
words from a truncated geometric law, 15 % of the tokens rounded up, one draw of 80/10/10 for each
merged span, random tokens by frequency. Overlapping and adjacent spans are one span, so what stands
right before and right after it, its boundaries, was not corrupted. A second head predicts each
token of a span from the two boundaries and the token's place in the span. Its cross-entropy is
divided by the number of these predictions + 1 (spanbert_loss.py) and added to the masked LM's:

  loss = masked_lm / n + boundary_weight * span_boundary / (pairs + boundary_smooth)

A span has predictions of the second head where both boundaries are tokens of the text, not [CLS],
[SEP] or the separator of two documents; of a longer span, the first `boundary_longest` tokens.

Departures. From the code: n and pairs are counted over the global batch, not over a worker's; rows
are those of every objective, with several documents in one row, where SpanBERT's blocks are whole
sentences of one document; an unknown token is special here, hence no boundary either. From the
paper: section 3.2 sums both losses of every masked token, so that n would divide both; the code,
followed here, counts the pairs apart (99 % of n in 510 tokens). No key gives the paper's sum;
boundary_smooth=0 takes away what the code adds.

Queries, log-probabilities and vectors are those of the masked LM: the second head is for training.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from objectives import base, masked_lm, masking, selection
from objectives.base import Description, Objective, Term
from pretraining.data.row import SPECIAL_POSITIONS, Row
from pretraining.models.heads import LanguageModelHead, gather_positions
from pretraining.models.linear import Table
from pretraining.models.transformer import (
    ACTIVATIONS,
    TransformerConfig,
    dense,
    norm,
    normalize,
)


class Example(NamedTuple):
    """A corrupted row of objectives/masking.py, and the boundaries of its K predicted tokens.

    Attributes:
      tokens, length, document, corrupted, positions, labels, weights, overflow: as in
        masking.Example.
      left: [K] int32, position of the model right before the span of the predicted token.
      right: [K] int32, the one right after it.
      offset: [K] int32, place of the token in the span, the first is 0.
      boundary_weights: [K] float32, 1 where the second head predicts the token too; where it is 0,
        the three above are 0.
    """

    tokens: Any
    length: Any
    document: Any
    corrupted: Any
    positions: Any
    labels: Any
    weights: Any
    overflow: Any
    left: Any
    right: Any
    offset: Any
    boundary_weights: Any


def build(config, vocabulary) -> Objective:
    """The objective; configs/span_boundary.py explains its keys.

    Raises:
      UserError: a key is out of range or contradicts another, or the vocabulary has no [CLS], [SEP]
        or [MASK], or no counts of tokens.
    """
    transformer = TransformerConfig.create(
        config.model, vocabulary.size, config.data.sequence_length
    )
    mask = masking.create(config, vocabulary)
    base.check(config, {}, _RANGES)
    objective = config.objective
    weight, smooth = objective.boundary_weight, objective.boundary_smooth
    masked_lm_terms = masked_lm.make_terms(config, vocabulary)

    def corrupt(key: jax.Array, row: Row, knobs: dict[str, jax.Array]) -> Example:
        """Corrupts a row as masking.py does, and finds the boundaries of its spans.

        Example: L = 11, T = 8 valid payload tokens, mask_rate .5, so ceil(.5 x 8) = 4 are masked:
        "the" as a span of its own, which has no boundary on its left, and "on the old".

          row.tokens          the    cat    sat    on     the    old    mat    now
          tokens       [CLS]  [MASK] cat    sat    [MASK] [MASK] [MASK] mat    now    [SEP]  [PAD]
          positions           1                    4      5      6
          left                0                    3      3      3
          right               0                    7      7      7
          offset              0                    0      1      2
          boundary_weights    0                    1      1      1
        """
        text = selection.find_words(row, vocabulary.special_ids).candidate
        text = jnp.pad(text, (1, SPECIAL_POSITIONS - 1))
        return add_boundaries(mask.corrupt(key, row, knobs), text, objective.boundary_longest)

    def query(row: Row, positions: jax.Array) -> Example:
        example = masking.query(config, vocabulary, row, positions)
        nowhere = jnp.zeros_like(example.corrupted)  # no token is a boundary, no span has one
        return add_boundaries(example, nowhere, objective.boundary_longest)

    def loss(apply, params, example, knobs, key, train):
        call = functools.partial(apply, {"params": params})
        hidden = call(example, key if train else None, method="encode")
        terms = masked_lm_terms(functools.partial(call, method="project"), hidden, example)
        sums = base.cross_entropy(
            functools.partial(call, method="project_boundaries"),
            call(hidden, example, method="combine_boundaries"),
            example.labels,
            example.boundary_weights,
            transformer.logits_chunk,
        )
        pairs = example.boundary_weights.sum()
        return terms | {
            "span_boundary": Term(sums.loss, pairs, weight, smooth),
            "boundary_accuracy": Term(sums.correct, pairs, scale=0.0),
        }

    return Objective(
        model=SpanBoundaryModel(
            transformer,
            causal=False,
            longest=objective.boundary_longest,
            position_width=objective.boundary_width,
        ),
        schedule=mask.schedule,
        evaluation_knobs=mask.evaluation_knobs,
        corrupt=corrupt,
        loss=loss,
        context="both",
        query=query,
        log_probs=base.log_probs,
        encode=base.encode,
        describe=describe,
        hugging_face={
            "": base.network(
                transformer,
                "BertForMaskedLM",
                "RobertaForMaskedLM",
                left_out="the span boundary head",
            )
        },
        summary=base.first_vector,
        family="masked",
        token_term="masked_lm",
    )


def add_boundaries(example: masking.Example, text: jax.Array, longest: int) -> Example:
    """Finds the boundaries of the predicted tokens of ONE row (masking.py, span_masking).

    Args:
      text: [L] bool, the positions that may be boundaries.
      longest: tokens of a span that the second head predicts, from its first.
    """
    backwards = selection.run_starts(example.corrupted[::-1])[::-1]
    start = selection.run_starts(example.corrupted)[example.positions]
    end = text.shape[0] - 1 - backwards[example.positions]
    left, right, offset = start - 1, end + 1, example.positions - start
    predicted = (example.weights > 0) & text[left] & text[right] & (offset < longest)
    return Example(
        **example._asdict(),
        left=jnp.where(predicted, left, 0),
        right=jnp.where(predicted, right, 0),
        offset=jnp.where(predicted, offset, 0),
        boundary_weights=predicted.astype(jnp.float32),
    )


def describe(apply, params, row: Row, example: Example) -> Description:
    """As in masking.py, and the merged spans, numbered, with the boundaries of their tokens."""
    size = example.tokens.shape[0]
    first = selection.run_starts(example.corrupted) == jnp.arange(size)
    span = jnp.cumsum(first & example.corrupted) - 1
    shown = functools.partial(
        base.at_positions, example.positions, weights=example.boundary_weights, size=size
    )
    numbers = {
        "span": jnp.where(example.corrupted, span, -1),
        "left boundary": shown(values=example.left),
        "right boundary": shown(values=example.right),
        "place in span": shown(values=example.offset),
    }
    return masking.describe(apply, params, row, example)._replace(numbers=numbers)


_RANGES = {
    "boundary_longest": (1,),
    "boundary_width": (1,),
    "boundary_weight": (0,),
    "boundary_smooth": (0,),
}


# ------------------------------------------------------------------------------------ the network


class SpanBoundaryModel(base.LanguageModel):
    """A masked language model with a second head.

    Attributes:
      longest: places in a span, `config.objective.boundary_longest`.
      position_width: width of their embeddings, `config.objective.boundary_width`.
    """

    longest: int
    position_width: int

    def setup(self):
        super().setup()
        self.boundary_head = SpanBoundaryHead(
            # Its second layer is part of the objective, whatever the first head has.
            dataclasses.replace(self.config, head_transform=True),
            self.longest,
            self.position_width,
        )

    def __call__(self, example: Example, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, K, V] float32 of the masked LM at the positions of the example."""
        hidden = self.encode(example, key)
        if self.is_initializing():  # a head has parameters once it has been called
            self.project_boundaries(self.combine_boundaries(hidden, example))
        return self.project(gather_positions(hidden, example.positions))

    def combine_boundaries(self, hidden: jax.Array, example: Example) -> jax.Array:
        """[B, K, D] of the hidden states [B, L, D]; see SpanBoundaryHead.combine."""
        left, right = (gather_positions(hidden, at) for at in (example.left, example.right))
        return self.boundary_head.combine(left, right, example.offset)

    def project_boundaries(self, combined: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of the second head, of what `combine_boundaries` gave."""
        return self.boundary_head(combined, self.encoder.embeddings.table())


class SpanBoundaryHead(LanguageModelHead):
    """Two layers of dense, activation and norm, then the token embeddings and a bias of its own
    (pair_bert.py, BertPairTargetPredictionHead).

    The second layer and what follows are a LanguageModelHead: `transform`, `norm`, `bias`.
    Departure: initialized as all else is here, by a normal cut at 2 sd.
    """

    longest: int
    position_width: int

    def setup(self):
        super().setup()
        initializer = nn.initializers.truncated_normal(self.config.init_std)
        self.position = Table(self.longest, self.position_width, embedding_init=initializer)
        self.combine_dense = dense(self.config, self.config.width)
        self.combine_norm = norm(self.config)

    def combine(self, left: jax.Array, right: jax.Array, offset: jax.Array) -> jax.Array:
        """The first layer, of the boundaries' hidden states [..., D] and the offset [...]."""
        place = self.position(offset).astype(left.dtype)
        combined = self.combine_dense(jnp.concatenate([left, right, place], axis=-1))
        return normalize(self.combine_norm, ACTIVATIONS[self.config.activation](combined))
