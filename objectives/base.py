"""The contract of an objective, and what at least two objectives share.

An objective is one file, `objectives/<name>.py`, with one function `build(config, vocabulary) ->
Objective`. Everything in it is pure and stateless. `config` is the run's whole config; an objective
reads `config.objective`, `config.model`, `config.data.sequence_length`, `config.data.copies` and
`config.train.steps` (for schedules; the loop resolves durations to ints first), nothing else.

Letters: B rows of a batch, L positions of the model, T = L - 3 payload tokens of a row, K predicted
positions of a row (static), V vocabulary, D width.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pretraining.errors import UserError
from pretraining.models.attention import Attention, visible
from pretraining.models.heads import LanguageModelHead, gather_positions
from pretraining.models.transformer import Transformer, TransformerConfig


class Term(NamedTuple):
    """One term of a loss, never a mean: the loop divides by the weight of the whole global batch.

    The loss is the sum over terms of scale * sum / (weight + smooth), where 0 / 0 = 0.

    Attributes:
      sum: [] float32, summed over everything that counts.
      weight: [] float32, how much counted; depends on the example alone, not on the parameters.
      scale: factor in the loss; 0 = a metric only.
      smooth: added to the weight (SpanBERT divides by n + 1).
    """

    sum: jax.Array
    weight: jax.Array
    scale: float = 1.0
    smooth: float = 0.0


class Description(NamedTuple):
    """What an objective does to ONE row, for people to see: `python -m pretraining.show`.

    Every line has an entry for each of the L positions; -1 leaves a place empty.

    Attributes:
      tokens: {title: [L] int32 token ids}; the first line is the input before corruption.
      numbers: {title: [L] int32}: labels, ranks, numbers of spans, boundaries.
      sees: {title: [L, L] bool}: may the position (first axis) see the other one?
    """

    tokens: dict[str, Any]
    numbers: dict[str, Any]
    sees: dict[str, Any]


class Network(NamedTuple):
    """A network of an objective in the layout of `transformers`: pretraining/export.py.

    Attributes:
      architectures: classes, tried in order: the first that can hold the network is taken.
      config: its sizes.
      take: params -> {"encoder": ..., "head": ...}, the network's parameters alone.
      put: (params, such a network) -> params with the network's in their place.
      logits: (apply, params, example) -> the `logits` of the class at every position of
        `query(row, [])`, [B, L, V] or [B, L].
      left_out: the part of the objective that the class has no place for; "" = none.
    """

    architectures: tuple[str, ...]
    config: TransformerConfig
    take: Callable[[Any], dict[str, Any]]
    put: Callable[[Any, dict[str, Any]], Any]
    logits: Callable[..., jax.Array]
    left_out: str = ""


class Objective(NamedTuple):
    """What the loop trains.

    Attributes:
      model: one Linen module, called as `model.apply({"params": params}, example, key)` with a
        batch of examples; key None = no dropout. Its submodule `encoder` owns the embeddings.
      schedule: step -> knobs, a dict of traced scalars that may change during training.
      evaluation_knobs: the knobs of every evaluation.
      corrupt: (key, row, knobs) -> example, for ONE row, static shapes. Validity (`length`),
        corruption and loss masks are three different fields of the example.
      loss: (apply, params, example, knobs, key, train) -> {name: Term} for a batch of examples;
        `key` serves dropout only, `train` False switches dropout off.
      context: what a queried position sees: "left" (then `generate` works) or "both" (`fill_mask`).
      query: (row, positions [Q] of the payload) -> example for ONE row: predict the tokens at those
        payload positions (position `row.length` = the next token), masking them where the
        objective masks. None where it has no meaning.
      log_probs: (apply, params, example) -> [B, Q, V] log-probabilities at the queried positions.
      encode: (apply, params, example) -> N + 1 arrays [B, T, D]: vectors of the payload's tokens,
        those of the embeddings and of every block.
      score: (apply, params, example) -> [B, T]: a value for each token of the payload of
        `query(row, [])`, higher where the text is likelier. None: log-likelihoods by `log_probs`.
      describe: (apply, params, row, example) -> Description of ONE row; reads the example that the
        loss reads.
      hugging_face: {subfolder, "" = the folder itself: Network}, what `export` writes and
        `config.init_from` reads.
      summary: (apply, params, example) -> [B, D]: the last block's vector that stands for the whole
        text of `query(row, [])`.
      family: objectives of one family answer `query` alike, so that their log-probabilities
        compare; "" = with nobody's.
      score_kind: what `score` is, in a word; "" where there is none.
      predictor: the network that `log_probs` are of, where it is not `encoder`.
      token_term: the term of the loss that is a mean over tokens and that `unigram_loss` is the
        baseline of; "" where there is none.
    """

    model: nn.Module
    schedule: Callable[[jax.Array], dict[str, jax.Array]]
    evaluation_knobs: dict[str, Any]
    corrupt: Callable[..., Any]
    loss: Callable[..., dict[str, Term]]
    context: Literal["left", "both"]
    query: Callable[..., Any] | None = None
    log_probs: Callable[..., jax.Array] | None = None
    encode: Callable[..., tuple[jax.Array, ...]] | None = None
    score: Callable[..., jax.Array] | None = None
    describe: Callable[..., Description] | None = None
    hugging_face: dict[str, Network] | None = None
    summary: Callable[..., jax.Array] | None = None
    family: str = ""
    score_kind: str = ""
    predictor: str = ""
    token_term: str = ""


# ------------------------------------------------------------------------------------ the network


class LanguageModel(nn.Module):
    """An encoder and a language-model head.

    An example has `tokens [B, L]`, `length [B]`, `document [B, L]` or None, and `positions [B, K]`,
    the positions of the model whose output is read.
    """

    config: TransformerConfig
    causal: bool

    def setup(self):
        self.encoder = Transformer(self.config)
        self.head = LanguageModelHead(self.config)

    def __call__(self, example, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, K, V] float32 at the positions of the example."""
        return self.project(gather_positions(self.encode(example, key), example.positions))

    def encode(self, example, key: jax.Array | None = None, all_layers: bool = False) -> Any:
        """Hidden states [B, L, D], or those of the embeddings and of every block."""
        attention = Attention(causal=self.causal, length=example.length, document=example.document)
        return self.encoder(example.tokens, attention, key=key, all_layers=all_layers)

    def project(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return self.head(hidden, self.encoder.embeddings.table())


def log_probs(apply: Callable, params: Any, example: Any) -> jax.Array:
    """Log-probabilities [B, K, V] at the positions of a `LanguageModel`'s example, no dropout."""
    return jax.nn.log_softmax(apply({"params": params}, example))


def encode(apply: Callable, params: Any, example: Any) -> tuple[jax.Array, ...]:
    """Every layer's vectors [B, T, D] of the payload, which one token precedes in a `frame`."""
    layers = apply({"params": params}, example, all_layers=True, method="encode")
    return tuple(layer[:, 1 : layer.shape[1] - 2] for layer in layers)


def first_vector(apply: Callable, params: Any, example: Any) -> jax.Array:
    """The `summary` [B, D] at the first position, the [CLS] of a `frame` (BERT)."""
    return apply({"params": params}, example, method="encode")[:, 0]


def last_vector(apply: Callable, params: Any, example: Any) -> jax.Array:
    """The `summary` [B, D] at the last valid position, XLNet's [CLS] or a text's last token."""
    hidden = apply({"params": params}, example, method="encode")
    return gather_positions(hidden, example.length[:, None] - 1)[:, 0]


def logits(apply: Callable, params: Any, example: Any) -> jax.Array:
    """Logits [B, L, V] of a `LanguageModel` at every position of the example, no dropout."""
    everywhere = jnp.broadcast_to(jnp.arange(example.tokens.shape[1]), example.tokens.shape)
    return apply({"params": params}, example._replace(positions=everywhere))


def network(config: TransformerConfig, *architectures: str, left_out: str = "") -> Network:
    """The `hugging_face` part of an objective whose encoder and head are a `LanguageModel`'s."""
    return Network(
        architectures,
        config,
        # GPT-2's head has no parameters.
        take=lambda params: {part: params[part] for part in ("encoder", "head") if part in params},
        put=lambda params, network: {**params, **network},
        logits=logits,
        left_out=left_out,
    )


# --------------------------------------------------------------------------------------- the loss


class Sums(NamedTuple):
    """Weighted sums over positions of what one pass over the logits gives; all [] float32.

    Attributes:
      loss: (1 - e) nll + e uniform + z squared_log_z, with e and z from the call. It alone has a
        gradient, and nll where that is the same; the others are figures.
      nll: -log p(label).
      correct: 1 where no logit is higher than the label's.
      uniform: -log p averaged over the vocabulary: cross-entropy against the uniform distribution.
        None where e = 0.
      squared_log_z: the square of the logarithm of the softmax's denominator; None where z = 0.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    uniform: jax.Array | None = None
    squared_log_z: jax.Array | None = None


def cross_entropy(
    project: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Cross-entropy in float32, with logits of at most `chunk` positions of a row at once.

    No array of more than B x chunk x V elements exists, forward or backward, and no logits are
    computed twice: the gradient is that of a sum, so it is made along with the sum, while the
    logits are there, and the backward pass multiplies it by one number. In 16 bits that is a
    second rounding of the gradient.

    Args:
      project: hidden [B, chunk, D] -> logits [B, chunk, V]; may close over parameters.
      hidden: [B, K, D].
      labels: [B, K] int32.
      weights: [B, K] float32; no gradient flows into them.
      chunk: `config.model.logits_chunk`; need not divide K.
      label_smoothing: e, share of the label that is spread over the vocabulary (Szegedy et al.
        2016, section 7).
      z_loss: z, factor of the squared logarithm of the softmax's denominator (PaLM: Chowdhery et
        al. 2022, section 5).
    """
    length = labels.shape[1]
    chunk = max(1, min(chunk, length))
    count = max(1, math.ceil(length / chunk))

    def chunks(x):
        """[B, K, ...] -> [count, B, chunk, ...]; what is filled up has weight 0."""
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, count * chunk - length)
        x = jnp.pad(x, widths)
        return x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    parts = (chunks(hidden), chunks(labels), chunks(weights))
    project, constants = jax.closure_convert(project, parts[0][0])
    return _sum_chunks(project, label_smoothing, z_loss, constants, *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum_chunks(project, smoothing, z_loss, constants, hidden, labels, weights) -> Sums:
    """The sums over the chunks [N, B, chunk, ...]."""

    def visit(part):
        hidden, labels, weights = part
        return _values(project(hidden, *constants), labels, weights, smoothing, z_loss), None

    return _add_up(visit, (hidden, labels, weights))[0]


def _sums_and_gradients(project, smoothing, z_loss, constants, hidden, labels, weights):
    def visit(part):
        hidden, labels, weights = part
        logits, pull = jax.vjp(project, hidden, *constants)
        slopes = _slopes(logits, labels, weights, smoothing, z_loss)
        of_hidden, *of_constants = pull(slopes.astype(logits.dtype))
        sums = _values(logits, labels, weights, smoothing, z_loss)
        return (sums, of_constants), of_hidden

    (sums, of_constants), of_hidden = _add_up(visit, (hidden, labels, weights))
    return sums, (of_constants, of_hidden)


def _scaled_gradients(project, smoothing, z_loss, gradients, slopes: Sums):
    """The gradients of every argument, times the one that comes from above."""
    del project
    slope = slopes.loss if smoothing or z_loss else slopes.loss + slopes.nll
    scale = lambda x: (slope * x.astype(jnp.float32)).astype(x.dtype)
    return *jax.tree.map(scale, gradients), None, None


_sum_chunks.defvjp(_sums_and_gradients, _scaled_gradients)


def _add_up(visit, parts):
    """`visit` of every part: the first of its results added up, the second side by side."""
    if len(parts[0]) == 1:
        total, kept = visit(jax.tree.map(lambda x: x[0], parts))
        return total, jax.tree.map(lambda x: x[None], kept)
    like = jax.eval_shape(visit, jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def add(total, part):
        more, kept = visit(part)
        return jax.tree.map(jnp.add, total, more), kept

    return jax.lax.scan(add, zeros, parts)


def _values(logits, labels, weights, smoothing, z_loss) -> Sums:
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = log_z - label_logit
    # Not argmax, which takes as long as a third of all else on a CPU.
    values = {"nll": nll, "correct": (label_logit >= logits.max(axis=-1)).astype(jnp.float32)}
    loss = nll
    if smoothing:
        values["uniform"] = log_z - logits.mean(axis=-1)
        loss = (1 - smoothing) * nll + smoothing * values["uniform"]
    if z_loss:
        values["squared_log_z"] = jnp.square(log_z)
        loss = loss + z_loss * values["squared_log_z"]
    return Sums(**{name: jnp.sum(x * weights) for name, x in ({"loss": loss} | values).items()})


def _slopes(logits, labels, weights, smoothing, z_loss) -> jax.Array:
    """The derivative [B, chunk, V] float32 of the sum `loss` by the logits."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    share = jnp.exp(logits - log_z) * (1 + 2 * z_loss * log_z)
    is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == labels[..., None]
    smoothed = jnp.where(is_label, 1 - smoothing, 0.0) + smoothing / logits.shape[-1]
    return (share - smoothed) * weights[..., None]


def prediction_terms(name: str, sums: Sums, labels, weights, unigram_nll) -> dict[str, Term]:
    """The loss term `name`, and the metrics that make it readable.

    `accuracy`, and `unigram_loss`: the cross-entropy of the same labels under their frequencies in
    the training split, what a model without context reaches.

    Args:
      labels, weights: [B, K].
      unigram_nll: [V], see `unigram_nll`.
    """
    total = weights.sum()
    unigram = jnp.sum(jnp.asarray(unigram_nll)[labels] * weights)
    return {
        name: Term(sums.loss, total),
        "accuracy": Term(sums.correct, total, scale=0.0),
        "unigram_loss": Term(unigram, total, scale=0.0),
    }


def unigram_nll(vocabulary) -> np.ndarray:
    """[V] float32: -log of each token's share of the training split, add-one smoothed."""
    counts = np.asarray(vocabulary.unigram_counts, np.float64) + 1
    return -np.log(counts / counts.sum()).astype(np.float32)


# ------------------------------------------------------------------------------------- description


def see(attention: Attention, size: int) -> jax.Array:
    """[L, L] bool: who (first) sees whom, by the description of ONE row; padding does neither."""
    attention = jax.tree.map(lambda x: x[None], attention)
    mask = visible(attention, size)
    mask = jnp.ones((size, size), bool) if mask is None else mask[0, 0]
    mask = jnp.broadcast_to(mask, (size, size))
    if attention.length is None:
        return mask
    return mask & (jnp.arange(size) < attention.length)[:, None]


def blank(values, length) -> jax.Array:
    """values [L] int32 up to `length`, -1 from there on."""
    return jnp.where(jnp.arange(values.shape[0]) < length, values, -1)


def at_positions(positions, values, weights, size: int) -> jax.Array:
    """[size] int32: values [K] at positions [K], -1 elsewhere and where the weight is 0."""
    place = jnp.where(weights > 0, positions, size)
    return jnp.full(size, -1, jnp.int32).at[place].set(values, mode="drop")


# -------------------------------------------------------------------------------------- the format


def frame(tokens, length, size: int, first: int, last: int, fill: int) -> jax.Array:
    """[first] tokens [last], filled up to `size`: [size] int32.

    Args:
      tokens: [T], T <= size - 2.
      length: [] int32, valid tokens.
    """
    position = jnp.arange(size)
    inner = jnp.pad(tokens, (1, size - 1 - tokens.shape[0]))
    outer = jnp.where(position == length + 1, last, fill)
    framed = jnp.where(position <= length, inner, outer).at[0].set(first)
    return framed.astype(jnp.int32)


def frame_document(row, size: int) -> jax.Array:
    """The documents of a framed row, [size] int32.

    The token before the payload shares the first document, what follows it the last.
    """
    inner = jnp.clip(jnp.arange(size) - 1, 0, jnp.maximum(row.length - 1, 0))
    return row.document[inner]


def padding(vocabulary) -> int:
    """The id that fills up: pad, or any id where there is none, since nothing reads it."""
    return 0 if vocabulary.pad is None else vocabulary.pad


# ------------------------------------------------------------------------------------- the config


def require(vocabulary, objective: str, *names: str) -> None:
    """Raises UserError unless the vocabulary has these special tokens."""
    for name in names:
        if getattr(vocabulary, name) is None:
            raise UserError(
                f"config.objective.name={objective!r} needs a {name!r} token, "
                "which the vocabulary lacks"
            )


def check(config, choices: dict[str, Iterable[str]], ranges: dict[str, tuple]) -> None:
    """`check_choice` and `check_range` of several keys, {key: allowed} and {key: (low, [high])}."""
    for key, allowed in choices.items():
        check_choice(config, key, allowed)
    for key, limits in ranges.items():
        check_range(config, key, *limits)


def check_choice(config, key: str, allowed: Iterable[str]) -> None:
    """Raises UserError unless `config.objective.<key>` is one of `allowed`."""
    if config.objective[key] not in allowed:
        raise UserError(
            f"config.objective.{key}={config.objective[key]!r} is not one of {', '.join(allowed)}"
        )


def check_range(config, key: str, low: float, high: float = math.inf) -> None:
    """Raises UserError unless `config.objective.<key>` is in [low, high]."""
    if not low <= config.objective[key] <= high:
        allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise UserError(
            f"config.objective.{key}={config.objective[key]!r} is out of range: {allowed}"
        )
