"""Optimizers and learning-rate schedules, composed from optax by the keys of `config.optimizer`."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from pretraining.errors import UserError


def schedule(config, total_steps: int, duration: Callable[[Any], int] = int) -> optax.Schedule:
    """The learning rate of every step.

    With t the step, T the last one, W the warm-up and f = end_fraction, as shares of the peak:
      linear: t / W, then linearly over T - W to f (XLNet: f = .001).
      cosine: t / W, then half a cosine over T - W to f (Loshchilov & Hutter, 2017).
      constant: t / W, then 1.
      wsd: t / W, then 1, then linearly to f over the last `decay` (Hu et al., 2024).
      bert: t / W, then 1 - t / T, measured from step 0, so it drops to 1 - W / T at step W
        (google-research/bert, optimization.py).
      electra: the product of both (google-research/electra, model/optimization.py).
    In the last two the decay runs to f instead of 0 where f is given.

    Args:
      config: the section `optimizer`.
      total_steps: T, updates of the whole run.
      duration: config value -> steps, for configs whose durations are not integers yet.

    Returns:
      step -> float32 learning rate; step 0, the first update, has 0 if there is a warm-up.

    Raises:
      UserError: a value is out of range, or the phases are longer than the run.
    """
    _check(config)
    warmup, decay = duration(config.warmup), duration(config.decay)
    if config.schedule == "constant" and config.end_fraction:
        raise UserError(
            f"config.optimizer.end_fraction={config.end_fraction} contradicts "
            "config.optimizer.schedule='constant', which ends at the peak"
        )
    phases = {"warmup": warmup} | ({"decay": decay} if config.schedule == "wsd" else {})
    if min(phases.values()) < 0 or sum(phases.values()) > total_steps:
        named = " + ".join(f"config.optimizer.{key}={config[key]!r}" for key in phases)
        raise UserError(
            f"{named} is {' + '.join(map(str, phases.values()))} steps: "
            f"at least 0 and together at most the {total_steps} of the run"
        )
    return _SCHEDULES[config.schedule](config, total_steps, warmup, decay)


def create(config, learning_rate: optax.Schedule, parameters) -> optax.GradientTransformation:
    """The optimizer: clip the global norm, find a direction, add decay, multiply by -learning_rate.

      adamw: Adam with bias correction and decoupled decay.
      bert_adam: without bias correction, u = m / (sqrt(v) + epsilon) + weight_decay * theta
        (google-research/bert, optimization.py; also ELECTRA, ALBERT, and XLNet with decay).
      lamb: that u, times |theta| / |u| per array, 1 where either is 0; arrays that are not decayed
        are not rescaled either (google-research/albert, lamb_optimizer.py).
      muon: the kernels of attention and feed-forward get an orthogonalised Nesterov momentum of .95
        (Jordan, 2024), times .2 * sqrt(max(rows, columns)), so that the learning rate and the decay
        of AdamW fit (Liu et al., 2025, section 2.2); all else gets AdamW. The heads of a
        projection count as one matrix: [D, H, d] as [D, H d] and [H, d, D] as [H d, D].

    Args:
      config: the section `optimizer`.
      learning_rate: what `schedule` returned.
      parameters: tree of parameters, or of their shapes.

    Returns:
      The transformation; its updates are to be added to the parameters.

    Raises:
      UserError: a value is out of range, a regular expression is not one, or muon finds no matrix.
    """
    _check(config)
    decayed = _decayed(config, parameters)
    direction = _muon(config, parameters) if config.name == "muon" else _adam(config)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.masked(optax.scale_by_trust_ratio(), decayed)
        if config.name == "lamb"
        else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


# --------------------------------------------------------------------------------------- checking

_NAMES = ("adamw", "bert_adam", "lamb", "muon")

_RANGES = {
    "learning_rate": ("a number above 0", lambda value: 0 < value < math.inf),
    "end_fraction": ("a share from 0 to 1", lambda value: 0 <= value <= 1),
    "beta1": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "beta2": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "epsilon": ("a number above 0", lambda value: 0 < value < math.inf),
    "weight_decay": ("a number of at least 0", lambda value: 0 <= value < math.inf),
    "clip": ("a number of at least 0 (0 = off)", lambda value: 0 <= value < math.inf),
}


def _check(config) -> None:
    for key, allowed in (("name", _NAMES), ("schedule", tuple(_SCHEDULES))):
        if config[key] not in allowed:
            raise UserError(
                f"config.optimizer.{key}={config[key]!r} is unknown: {' | '.join(allowed)}"
            )
    for key, (allowed, is_valid) in _RANGES.items():
        if not is_valid(config[key]):
            raise UserError(f"config.optimizer.{key}={config[key]!r} is out of range: {allowed}")


# -------------------------------------------------------------------------------------- schedules


def _linear(config, total, warmup, decay) -> optax.Schedule:
    return _after_warmup(config, warmup, _decay(config, total - warmup))


def _cosine(config, total, warmup, decay) -> optax.Schedule:
    steps = max(total - warmup, 1)
    falling = optax.cosine_decay_schedule(config.learning_rate, steps, alpha=config.end_fraction)
    # optax compares the step with a float, which strict promotion refuses for an integer.
    return _after_warmup(config, warmup, lambda step: falling(jnp.asarray(step, jnp.float32)))


def _constant(config, total, warmup, decay) -> optax.Schedule:
    return _after_warmup(config, warmup, optax.constant_schedule(config.learning_rate))


def _wsd(config, total, warmup, decay) -> optax.Schedule:
    stable = _constant(config, total, warmup, decay)
    return optax.join_schedules([stable, _decay(config, decay)], [total - decay])


def _bert(config, total, warmup, decay) -> optax.Schedule:
    falling = _decay(config, total)
    return _after_warmup(config, warmup, lambda step: falling(step + warmup))


def _electra(config, total, warmup, decay) -> optax.Schedule:
    falling = _decay(config, total)
    if warmup == 0:
        return falling
    return lambda step: falling(step) * jnp.minimum(1.0, step / warmup)


_SCHEDULES = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
    "bert": _bert,
    "electra": _electra,
}


def _after_warmup(config, warmup, rest) -> optax.Schedule:
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, rest], [warmup])


def _decay(config, steps) -> optax.Schedule:
    peak = config.learning_rate
    return optax.linear_schedule(peak, peak * config.end_fraction, steps)


# ------------------------------------------------------------------------------------- directions


def _decayed(config, parameters):
    """Tree of bools: which parameters no regular expression of `decay_exclude` finds."""
    try:
        excluded = [re.compile(pattern) for pattern in config.decay_exclude]
    except re.error as error:
        raise UserError(
            f"config.optimizer.decay_exclude={config.decay_exclude!r}: {error.pattern!r} is not a "
            f"regular expression: {error}"
        ) from error
    return jax.tree.map_with_path(
        lambda path, _: not any(pattern.search(_name(path)) for pattern in excluded), parameters
    )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _adam(config) -> optax.GradientTransformation:
    if config.name in ("bert_adam", "lamb"):
        return _scale_by_uncorrected_adam(config.beta1, config.beta2, config.epsilon)
    return _promoting(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))


def _promoting(inner) -> optax.GradientTransformation:
    """`inner` under standard promotion: optax raises a float to the power of its integer count."""

    def update(gradients, state, parameters=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(gradients, state, parameters)

    return optax.GradientTransformation(inner.init, update)


class Moments(NamedTuple):
    """State of Adam without bias correction: running means of g and of g * g."""

    mu: Any
    nu: Any


def _scale_by_uncorrected_adam(beta1, beta2, epsilon) -> optax.GradientTransformation:
    def init(parameters):
        return Moments(optax.tree.zeros_like(parameters), optax.tree.zeros_like(parameters))

    def update(gradients, state, parameters=None):
        mu = optax.tree.update_moment(gradients, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, beta2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
        return updates, Moments(mu, nu)

    return optax.GradientTransformation(init, update)


_MATRIX = re.compile(r"/(attention|mlp)/(.*/)?kernel$")


def _muon(config, parameters) -> optax.GradientTransformation:
    axes = jax.tree.map_with_path(_matrix_axes, parameters)
    if not jax.tree.leaves(axes):
        raise UserError(
            "config.optimizer.name='muon', but the model has no kernel of attention or mlp"
        )

    def scale(updates, _):
        return jax.tree.map(lambda update, axes: update * _rms_factor(update, axes), updates, axes)

    labels = jax.tree.map_with_path(
        lambda path, _: "matrix" if _MATRIX.search(_name(path)) else "other", parameters
    )
    orthogonal = _promoting(scale_by_muon(weight_dimension_numbers=axes))
    matrix = optax.chain(orthogonal, optax.stateless(scale))
    return optax.partition({"matrix": matrix, "other": _adam(config)}, labels)


def _matrix_axes(path, leaf) -> MuonDimensionNumbers | optax.MaskedNode:
    """Which axes of a kernel are summed over and which are its outputs, if it is a matrix."""
    name, last = _name(path), len(leaf.shape) - 1
    if not _MATRIX.search(name):
        return optax.MaskedNode()
    inputs = last if name.endswith("/out/kernel") else 1
    return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, last + 1)))


def _rms_factor(update, axes) -> float:
    rows, columns = (math.prod(update.shape[axis] for axis in group) for group in axes)
    return 0.2 * math.sqrt(max(rows, columns))
