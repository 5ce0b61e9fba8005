"""Replaced token detection: a small generator fills in masked tokens, a discriminator tells for
every token whether it is the original (ELECTRA: Clark et al. 2020, section 2).

The generator is a masked language model. At each selected position, also at those left visible, a
token is drawn from it and put into the original row; the discriminator sees that row. Its label is
1 where the token was replaced, 0 where the draw equals the original. Its loss counts every token,
[CLS] and [SEP] too:

  loss = generator / n + discriminator_weight * discriminator / tokens

No gradient goes through the draws, so the discriminator's loss does not train the generator; the
embeddings that they share learn from both. What trains on is the discriminator: it is `encoder`.
Predictions (`query`, `log_probs`) are the generator's; `score` is the discriminator's: how sure it
is that a token is the original.

What the discriminator learns is a key: `all` is ELECTRA; the others are rows of the paper's table 5
(section 3.4). masked_only, "ELECTRA 15%": the same loss at the selected positions alone.
replace_mlm: predict the original tokens at the selected positions. all_tokens_mlm: at every
position, as a mixture of a copy of the input, of probability sigmoid(gate), and the prediction.
`discriminator_weight` is a factor of them all; the paper does not say whether it kept 50.
electric is Electric's (see objectives/detection.py), whose generator must be of two towers.

Departures from google-research/electra:
* Positions are selected without replacement. The original draws them with replacement (19 draws in
  128 positions: 17.7 distinct ones on average; 77 in 512: 71.5; 128 in 512: 113.3), as does
  with_replacement: a position drawn twice counts twice in the generator's loss, stays visible only
  if every draw leaves it so, and gets the floor of the mean of its samples' ids, a token that
  nobody drew. There too a row has no more draws than candidates, and int((p + .005) L) bounds
  nothing.
* Denominators have no 1e-6 added (`smooth` is the generator's), the noise no 1e-9.
* The kernels that were left to TensorFlow's default, those of `embeddings_project` and the last of
  the discriminator, are initialized like all others.
* With sharing="none" the generator's embeddings are as wide as the discriminator's, not as its own
  blocks.
* One segment; a row may hold several documents.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives import base, detection, electra, masked_lm, masking, sampling, selection
from objectives.base import Description, Objective
from pretraining.data.row import Row
from pretraining.errors import UserError
from pretraining.models.transformer import TransformerConfig, fold

# Generators that answer `query` alike; the uniform one compares with none.
_FAMILIES = {"masked_lm": "detection", "two_tower": "detection/two_tower", "uniform": ""}
_SAMPLING = 1 << 20  # folded into a row's key; masking splits a few keys off it


class Example(NamedTuple):
    """A masked row of objectives/masking.py, and what the generator's samples are drawn with.

    Attributes:
      tokens, length, document, corrupted, positions, labels, weights, overflow: as in
        masking.Example; `tokens` is what the generator sees.
      original: [L] int32, the row before it was masked.
      noise: [2] uint32, key data of the row's samples.
      temperature: [] float32, divides the generator's logits in sampling.
      mask_rate: [] float32, share of the tokens that is selected; Electric reads it.
    """

    tokens: Any
    length: Any
    document: Any
    corrupted: Any
    positions: Any
    labels: Any
    weights: Any
    overflow: Any
    original: Any
    noise: Any
    temperature: Any
    mask_rate: Any


def build(config, vocabulary) -> Objective:
    """The objective; configs/replaced_token_detection.py explains its keys.

    Raises:
      UserError: a key is out of range or contradicts another, or the vocabulary has no [CLS], [SEP]
        or [MASK].
    """
    _check(config)
    objective, chunk = config.objective, config.model.logits_chunk
    networks = _networks(config, vocabulary)
    mask = masking.create(config, vocabulary)
    generator_terms = masked_lm.make_terms(config, vocabulary, "generator")
    discriminator_terms = detection.KINDS[objective.discriminator]
    make_fake = functools.partial(
        sampling.make_fake, chunk=chunk, disallow_correct=objective.disallow_correct
    )

    def schedule(step):
        return mask.schedule(step) | {"temperature": jnp.float32(objective.temperature)}

    def loss(apply, params, example, knobs, key, train):
        call = functools.partial(apply, {"params": params})
        keys = [fold(key if train else None, network) for network in range(2)]
        hidden = call(example, keys[0], method="generate")
        predicted = _cloze(vocabulary, example) if networks.two_towers else example
        terms = generator_terms(functools.partial(call, method="project"), hidden, predicted)
        if networks.generator_config is None:  # all logits are equal, and nothing learns
            terms = {k: v for k, v in terms.items() if k not in ("accuracy", "unigram_loss")}
        fake = make_fake(apply, params, hidden, example)
        hidden = call(example._replace(tokens=fake.tokens), keys[1], method="encode")
        return terms | discriminator_terms(config, call, hidden, example, fake)

    def describe(apply, params, row, example):
        batch = jax.tree.map(lambda x: x[None], example)
        hidden = apply({"params": params}, batch, method="generate")
        fake = make_fake(apply, params, hidden, batch)
        fake = jax.tree.map(lambda x: x[0], fake)
        return _describe(apply, params, row, example, fake)

    fractions = {key: objective[key] for key in ("mask_fraction", "random_fraction")}
    return Objective(
        model=networks,
        schedule=schedule,
        evaluation_knobs=mask.evaluation_knobs | fractions | {"temperature": 1.0},
        corrupt=_make_corrupt(config, vocabulary, mask),
        loss=loss,
        context="both",
        query=functools.partial(_query, config, vocabulary),
        log_probs=base.log_probs,
        encode=base.encode,
        score=functools.partial(_score, config),
        describe=describe,
        hugging_face=electra.hugging_face(networks),
        summary=base.first_vector,
        family=_FAMILIES[objective.generator],
        score_kind=_score_kind(objective.discriminator),
        predictor="generator",
        token_term="" if networks.generator_config is None else "generator",
    )


def _score_kind(discriminator: str) -> str:
    """What `_score` gives: of a discriminator that predicts tokens, those that it has read."""
    if discriminator in detection.PREDICTING:
        return "reconstruction"
    return "energy" if discriminator == "electric" else "detection"


def _networks(config, vocabulary):
    objective = config.objective
    transformer = TransformerConfig.create(
        config.model, vocabulary.size, config.data.sequence_length
    )
    small = electra.shrink(transformer, objective.generator_size, objective.generator_layers)
    return electra.Networks(
        transformer,
        None if objective.generator == "uniform" else small,
        objective.sharing,
        two_towers=objective.generator == "two_tower",
        predicts_tokens=objective.discriminator in detection.PREDICTING,
        copies=objective.discriminator == "all_tokens_mlm",
    )


# ------------------------------------------------------------------------------------- corruption


def _make_corrupt(config, vocabulary, mask):
    replacing = functools.partial(_draw_with_replacement, config, vocabulary, mask.slots)
    choose = replacing if config.objective.with_replacement else mask.corrupt

    def corrupt(key: jax.Array, row: Row, knobs: dict[str, jax.Array]) -> Example:
        """Masks a row as masking.py does: what the generator sees; the rest happens in the loss.

        Example: L = 11, T = 8 payload tokens of which 7 are valid, mask_rate .3, so
        round(.3 x (7 + 2)) = 3 are selected: "old", "sat" and "mat", which stays visible. The
        generator happens to draw "old", "lay" and "hat".

          original     [CLS] the old    cat sat    on the mat [SEP] [PAD] [PAD]
          tokens       [CLS] the [MASK] cat [MASK] on the mat [SEP] [PAD] [PAD]
          positions              2          4             7
          weights                1          1             1
          then, in the loss
          samples                old        lay           hat
          tokens       [CLS] the old    cat lay    on the hat [SEP] [PAD] [PAD]
          replaced     0     0   0      0   1      0  0   1   0
        """
        noise = jax.random.fold_in(jax.random.fold_in(key, _SAMPLING), row.copy)
        return _seen(
            config, _complete(config, vocabulary, row, choose(key, row, knobs), noise, knobs)
        )

    return corrupt


def _seen(config, example):
    """The example as the generator reads it: two towers see all but the token itself, unmasked."""
    if config.objective.generator == "two_tower":
        return example._replace(tokens=example.original)
    return example


def _query(config, vocabulary, row, positions):
    """masking.query: the generator predicts, or the discriminator sees, the row."""
    masked = masking.query(config, vocabulary, row, positions)
    knobs = {"temperature": 1.0, "mask_rate": config.objective.evaluation_mask_rate}
    return _seen(config, _complete(config, vocabulary, row, masked, jax.random.key(0), knobs))


def _complete(config, vocabulary, row, masked, noise, knobs):
    return Example(
        **masked._asdict(),
        original=_intact(config, vocabulary, row).tokens,
        noise=jax.random.key_data(noise),
        temperature=jnp.asarray(knobs["temperature"], jnp.float32),
        mask_rate=jnp.asarray(knobs["mask_rate"], jnp.float32),
    )


def _intact(config, vocabulary, row):
    return masking.query(config, vocabulary, row, jnp.zeros(0, jnp.int32))


def _draw_with_replacement(config, vocabulary, slots, key, row, knobs):
    """masking.Example of the original code: draws of a token may repeat; [MASK] or itself."""
    count_key, place_key, choice_key = jax.random.split(key, 3)
    intact = _intact(config, vocabulary, row)
    size, length = row.tokens.shape[0], intact.tokens.shape[0]
    candidate = selection.find_words(row, vocabulary.special_ids).candidate
    rule, rate = config.objective.count, knobs["mask_rate"]
    count = selection.budgets(rule, count_key, candidate, row.length, rate, rate, 1)[0][0]
    number = jax.random.randint(place_key, (size,), 0, jnp.maximum(candidate.sum(), 1))[:slots]
    used = jnp.arange(slots) < count
    # Candidates in front, in their order; one more for [CLS].
    position = jnp.where(used, jnp.argsort(~candidate)[number] + 1, 0)
    hide = used & (jax.random.uniform(choice_key, (size,))[:slots] < knobs["mask_fraction"])
    at = lambda slot: (
        jnp.zeros(length, bool).at[jnp.where(slot, position, length)].set(True, mode="drop")
    )
    weights = used.astype(jnp.float32)
    return intact._replace(
        tokens=jnp.where(at(hide), vocabulary.mask, intact.tokens),
        corrupted=at(used),
        positions=position,
        labels=jnp.where(used, intact.tokens[position], base.padding(vocabulary)),
        weights=weights,
        overflow=count.astype(jnp.float32) - weights.sum(),
    )


# ------------------------------------------------------------------------------------------ losses


def _cloze(vocabulary, example):
    """Every token but the special ones as a prediction, as two towers make them (electra/
    run_pretraining.py, _get_cloze_outputs)."""
    tokens = example.original
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    special = jnp.isin(tokens, jnp.asarray(vocabulary.special_ids, jnp.int32))
    counts = (place < example.length[:, None]) & ~special
    return example._replace(positions=place, labels=tokens, weights=counts.astype(jnp.float32))


def _score(config, apply, params, example):
    """[B, T], higher where a token of the payload fits: log p(original); for Electric -energy.

    Of a discriminator that predicts tokens it is the probability of the very token that it reads.
    """
    kind = config.objective.discriminator
    if kind in detection.PREDICTING:
        call = functools.partial(apply, {"params": params})
        hidden = call(example, method="encode")
        return detection.token_log_probs(config, call, hidden, example.tokens)[:, 1:-2]
    logits = electra.detection_logits(apply, params, example)[:, 1:-2]
    return -logits if kind == "electric" else jax.nn.log_sigmoid(-logits)


# --------------------------------------------------------------------------------- what people see


def _describe(apply, params, row, example, fake):
    size, length = example.tokens.shape[0], example.length
    samples = base.at_positions(example.positions, fake.samples, example.weights, size)
    return Description(
        tokens={
            "original": base.blank(example.original, length),
            "generator sees": base.blank(example.tokens, length),
            "sample": samples,
            "discriminator sees": base.blank(fake.tokens, length),
        },
        numbers={"replaced": base.blank(fake.replaced.astype(jnp.int32), length)},
        sees=masking.describe(apply, params, row, example).sees,
    )


# ----------------------------------------------------------------------------------------- checks

_CHOICES = {
    "discriminator": tuple(detection.KINDS),
    "generator": ("masked_lm", "two_tower", "uniform"),
    "sharing": electra.SHARING,
}
_RANGES = {
    "discriminator_weight": (0,),
    "generator_size": (0, 1),
    "generator_layers": (0, 1),
    "temperature": (0.01,),
}


def _check(config) -> None:
    base.check(config, _CHOICES, _RANGES)
    objective = config.objective
    if objective.discriminator == "electric":
        _check_electric(objective)
    if objective.generator == "two_tower" and config.model.document_attention:
        raise UserError(
            "config.objective.generator='two_tower' reads a row from both ends, across documents; "
            "config.model.document_attention=True keeps them apart"
        )
    if objective.with_replacement:
        _check_replacement(config)


def _check_electric(objective) -> None:
    """Refuses rates whose odds are not those of being selected, or not finite."""
    if objective.generator != "two_tower":
        raise UserError(
            "config.objective.discriminator='electric' needs config.objective.generator="
            f"'two_tower', not {objective.generator!r}"
        )
    for key in ("mask_rate", "mask_rate_final", "evaluation_mask_rate"):
        if objective[key] == 1:
            raise UserError(
                f"config.objective.{key}=1 must be below 1 with config.objective.discriminator="
                "'electric'"
            )
    if objective.predict_rate:
        raise UserError(
            f"config.objective.predict_rate={objective.predict_rate} must be 0 with "
            "config.objective.discriminator='electric'"
        )


def _check_replacement(config) -> None:
    """Refuses what drawing with replacement, as the original does it, has no room for."""
    for key, value, only in (
        ("objective.unit", config.objective.unit, "token"),
        ("objective.predict_rate", config.objective.predict_rate, 0),
        ("objective.random_fraction", config.objective.random_fraction, 0),
        ("data.copies", config.data.copies, 1),
    ):
        if value != only:
            raise UserError(
                f"config.objective.with_replacement=True needs config.{key}={only!r}, not {value!r}"
            )
