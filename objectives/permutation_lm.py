"""Permutation language modelling: predict tokens in a random order (XLNet: Yang et al. 2019).

Some tokens are targets, about one in six; in the order of a random permutation each is predicted
from all tokens that are not targets and from the targets before it. Nothing is replaced: the
content stream holds the text itself, and the query stream guesses a target without having seen it.
The loss is the cross-entropy at the targets, over their number in the global batch.

Departures from xlnet/data_utils.py:
- Targets are drawn anew at every step, as permutations are; XLNet prepared them once.
- A row is one text: payload [SEP] [CLS], without XLNet's second segment, whose label its loss never
  read, and without the memory of the previous row.
- Every special token of the payload is functional, as [SEP] and [CLS] are, and none counts towards
  the number of targets, so that the number is met; XLNet's random fill might waste some on them,
  and its <eod> could be a target.
- An n-gram is n words; in the original it is n pieces, because its loop tests the first piece again
  and again (`ngram_unit` "pieces"). The last n-gram is cut where the number of targets is met.
- Rows are reversed one by one with probability `backward_fraction`, not in fixed halves of the
  batch.

Evaluation reads every row forwards; what is predicted, and how much, is as in training, so runs
with other targets are evaluated on other tasks.

The copies of a row (`data.copies`) draw targets and permutations of their own, which may overlap.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from objectives import base, permutation, selection
from objectives.base import Description, Objective
from pretraining.data.row import SPECIAL_POSITIONS, Row
from pretraining.models.attention import Attention, visible
from pretraining.models.config import TransformerConfig
from pretraining.models.heads import LanguageModelHead
from pretraining.models.transformer import fold
from pretraining.models.two_stream import TwoStream


class Example(NamedTuple):
    """A row to predict in the order of its ranks; K slots for what is predicted.

    Attributes:
      tokens: [L] int32, what the content stream sees.
      length: [] int32, valid positions, [SEP] and [CLS] included.
      document: [L] int32, or None without `config.model.document_attention`.
      segments: [L] int32, 2 at [CLS], else 0.
      rank: [L] int32: the content of a position sees ranks up to its own, a query lower ones.
      backward: [] bool, the payload stands in reverse order; None without
        `config.objective.backward_fraction`.
      positions: [K] int32, positions of the model that are predicted; 0 in unused slots.
      labels: [K] int32, the tokens at these positions; padding in unused slots.
      weights: [K] float32, 1 or, in unused slots, 0.
    """

    tokens: Any
    length: Any
    document: Any
    segments: Any
    rank: Any
    backward: Any
    positions: Any
    labels: Any
    weights: Any


class PermutationLM(nn.Module):
    """A two-stream encoder and a language-model head."""

    config: TransformerConfig

    def setup(self):
        self.encoder = TwoStream(self.config)
        self.head = LanguageModelHead(self.config)

    def __call__(self, example: Example, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, K, V] float32 of the query stream."""
        return self.project(self.guess(example, key))

    def guess(self, example: Example, key: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, K, D] of the query stream."""
        attention = Attention(False, example.length, example.document, example.rank)
        embedded = self.encoder.embeddings(example.tokens, key=fold(key, 0))
        streams = self.encoder.two_streams(
            embedded, attention, example.positions, example.segments, key, example.backward
        )
        return streams[1]

    def encode(self, example: Example, key: jax.Array | None = None, all_layers: bool = False):
        """Content [B, L, D], or that of the embeddings and of every block; all see each other."""
        attention = Attention(False, example.length, example.document)
        return self.encoder(
            example.tokens, attention, example.segments, key, all_layers, example.backward
        )

    def project(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return self.head(hidden, self.encoder.embeddings.table())


def build(config, vocabulary) -> Objective:
    """The objective; configs/permutation_lm.py explains its keys.

    Raises:
      UserError: a key is out of range or contradicts another, or the vocabulary has no [CLS] or
        [SEP].
    """
    base.require(vocabulary, config.objective.name, "cls", "sep")
    transformer = TransformerConfig.create(
        config.model, vocabulary.size, config.data.sequence_length
    )
    permutation.check(config)
    unigram_nll = base.unigram_nll(vocabulary)

    def corrupt(key: jax.Array, row: Row, knobs: dict[str, jax.Array]) -> Example:
        """Formats a row as payload [SEP] [CLS] padding, and orders what is predicted.

        Example: L = 11, T = 8 payload tokens of which 7 are valid, predict_fraction 1/4, so that
        round(9 / 4) = 2 are predicted; here K = 2. The n-gram "old mat" was chosen, and the
        permutation puts [SEP] before "mat", "mat" before [CLS], and "old" last.

          row.tokens   the    cat    sat    on     the    old    mat    (pad)
          tokens       the    cat    sat    on     the    old    mat    [SEP]  [CLS]  [PAD]  [PAD]
          segments     0      0      0      0      0      0      0      0      2      0      0
          rank         -1     -1     -1     -1     -1     8      3      0      5      2      10
          length       9
          positions    5 6,  labels  old mat,  weights  1 1

        A backward row would begin with "mat" and end with "the" [SEP] [CLS].
        """
        backward_key, order_key = jax.random.split(jax.random.fold_in(key, row.copy))
        backward = None  # no row can be: distances need no sign
        if config.objective.backward_fraction:
            backward = jax.random.uniform(backward_key) < knobs["backward_fraction"]
        frame = _frame(config, vocabulary, row, row.length, backward)
        starts, candidate = _words(vocabulary, row, backward)
        target, rank = permutation.draw(
            config, order_key, starts, candidate, frame["length"], backward
        )
        slots = permutation.largest_goal(config)
        positions = jnp.nonzero(target, size=slots, fill_value=0)[0].astype(jnp.int32)
        used = jnp.arange(slots) < target.sum()
        return Example(
            **frame,
            rank=rank,
            positions=positions,
            labels=jnp.where(used, frame["tokens"][positions], base.padding(vocabulary)),
            weights=used.astype(jnp.float32),
        )

    def loss(apply, params, example, knobs, key, train):
        variables = {"params": params}
        sums = base.cross_entropy(
            lambda chunk: apply(variables, chunk, method="project"),
            apply(variables, example, key if train else None, method="guess"),
            example.labels,
            example.weights,
            transformer.logits_chunk,
        )
        return base.prediction_terms(
            "permutation_lm", sums, example.labels, example.weights, unigram_nll
        )

    knobs = {"backward_fraction": config.objective.backward_fraction}
    network = base.network(transformer, "XLNetLMHeadModel")
    return Objective(
        model=PermutationLM(transformer),
        schedule=lambda step: jax.tree.map(jnp.float32, knobs),
        evaluation_knobs={"backward_fraction": 0.0},
        corrupt=corrupt,
        loss=loss,
        context="both",
        query=functools.partial(_query, config, vocabulary),
        log_probs=base.log_probs,
        encode=encode,
        describe=describe,
        hugging_face={"": network._replace(logits=content_logits)},
        summary=base.last_vector,
        family="permutation",
        token_term="permutation_lm",
    )


def encode(apply, params, example: Example) -> tuple[jax.Array, ...]:
    """Every layer's content [B, T, D] of the payload, which stands first."""
    layers = apply({"params": params}, example, all_layers=True, method="encode")
    return tuple(layer[:, : layer.shape[1] - SPECIAL_POSITIONS] for layer in layers)


def content_logits(apply, params, example: Example) -> jax.Array:
    """Logits [B, L, V] of the content stream: `logits` of `XLNetLMHeadModel` without a mask."""
    variables = {"params": params}
    return apply(variables, apply(variables, example, method="encode"), method="project")


def describe(apply, params, row: Row, example: Example) -> Description:
    """The row as it is read, what is predicted in which order, and who sees whom."""
    size = example.tokens.shape[0]
    read = permutation.reverse(size, example.length - 2, example.backward)
    predicted = base.at_positions(example.positions, example.labels, example.weights, size)
    attention = Attention(False, example.length, example.document, example.rank)
    one = jax.tree.map(lambda x: x[None], attention)
    query = visible(one, size, jnp.arange(size)[None])[0, 0]
    return Description(
        tokens={
            "original": base.blank(example.tokens[read], example.length),
            "input": base.blank(example.tokens, example.length),
            "predicted": predicted,
        },
        numbers={"order": _order(example)},
        sees={
            "content stream": base.see(attention, size),
            "query stream": query & (predicted >= 0)[:, None],
        },
    )


def _order(example):
    """[L]: the ranks without gaps; -1 for what is known from the beginning, and padding."""
    rank, valid = example.rank, jnp.arange(example.rank.shape[0]) < example.length
    earlier = valid[None] & (rank[None] < rank[:, None])
    repeated = jnp.tril(valid[None] & (rank[None] == rank[:, None]), -1).any(axis=1)
    order = jnp.sum(earlier & ~repeated[None], axis=1, dtype=jnp.int32)
    return jnp.where(valid & (rank >= 0), order, -1)


def _query(config, vocabulary, row: Row, positions: jax.Array) -> Example:
    """The tokens at the queried positions [Q] are hidden from all others; K = Q.

    Position `row.length` makes the payload one token longer.
    """
    asked = jnp.arange(config.data.sequence_length)[:, None] == positions[None]
    asked = jnp.any(asked, axis=1)
    length = row.length + asked[row.length].astype(jnp.int32)
    known = positions < row.length
    frame = _frame(config, vocabulary, row, length, None)
    return Example(
        **frame,
        rank=jnp.where(asked, 0, -1),
        positions=positions,
        labels=jnp.where(known, frame["tokens"][positions], base.padding(vocabulary)),
        weights=known.astype(jnp.float32),
    )


# -------------------------------------------------------------------------------------- the format


def _frame(config, vocabulary, row, length, backward):
    """The fields of an example that do not depend on the order; `length` of the payload."""
    size, fill = config.data.sequence_length, base.padding(vocabulary)
    place, read = jnp.arange(size), permutation.reverse(size, length, backward)
    payload = jnp.where(place < row.length, jnp.pad(row.tokens, (0, SPECIAL_POSITIONS)), fill)
    return {
        "tokens": jnp.select(
            [place < length, place == length, place == length + 1],
            [payload[read], vocabulary.sep, vocabulary.cls],
            fill,
        ),
        "length": length + 2,
        "document": _document(row, read, length) if config.model.document_attention else None,
        "segments": jnp.where(place == length + 1, 2, 0),
        "backward": backward,
    }


def _document(row, read, length):
    """What follows the payload shares the document of the token before it."""
    inner = jnp.minimum(jnp.arange(read.shape[0]), jnp.maximum(length - 1, 0))
    return row.document[jnp.clip(read[inner], 0, jnp.maximum(row.length - 1, 0))]


def _words(vocabulary, row, backward):
    """Two [L] bool: begins a word (functional tokens are words), and may be a target."""
    words = selection.find_words(row, vocabulary.special_ids)
    starts = ~words.candidate | words.start
    read = permutation.reverse(row.tokens.shape[0], row.length, backward)
    pad = lambda x, value: jnp.pad(x[read], (0, SPECIAL_POSITIONS), constant_values=value)
    return pad(starts, True), pad(words.candidate, False)
