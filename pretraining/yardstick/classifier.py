"""Multinomial logistic regression, as probes use it.

Letters: n examples, F features, C classes.
"""

import sys
from typing import NamedTuple

import numpy as np
import scipy.optimize

STRENGTHS = (1.0, 0.1, 0.01, 0.001)  # of the L2 penalty, tried from the strongest on
HELD_OUT = 0.2  # share of the training groups, the last ones, by which a strength is chosen
_TOLERANCE = 1e-4  # of the largest entry of the gradient
_ITERATIONS = 1000  # at most


class Classifier(NamedTuple):
    """A linear classifier of standardised features.

    Attributes:
      weights: [F + 1, C], the last row is the bias.
      mean, scale: [F], subtracted and divided by.
    """

    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray


def train(
    features: np.ndarray, labels: np.ndarray, classes: int, groups: np.ndarray | None = None
) -> Classifier:
    """Features [n, F] and labels [n] in 0..C-1 -> the classifier; nothing is drawn by lot.

    The strength is that of STRENGTHS with the highest likelihood of the last HELD_OUT of the
    groups, given the others; then all examples are used. Examples that share a text without being
    of one group make it too weak: phrases of one sentence of SST-2, whose files don't tell.

    Args:
      groups: [n], ascending: of the words of one sentence all or none are held out. None = every
        example is one.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    _, order = np.unique(groups, return_inverse=True)
    kept = int(np.sum(order < max(1, round((order[-1] + 1) * (1 - HELD_OUT)))))
    strength = _choose(features, labels, kept, classes)
    mean, scale = _scales(features)
    inputs = _inputs(features, mean, scale)
    return Classifier(fit(inputs, labels, strength, _start(inputs, classes)), mean, scale)


def predict(classifier: Classifier, features: np.ndarray) -> np.ndarray:
    """[n] classes of features [n, F]; of equal ones the first."""
    inputs = _inputs(features, classifier.mean, classifier.scale)
    return np.argmax(inputs @ classifier.weights, axis=1)


def fit(inputs: np.ndarray, labels: np.ndarray, strength: float, start: np.ndarray) -> np.ndarray:
    """The weights [F + 1, C] with the least mean NLL + strength / 2 x their squares, bias apart.

    The problem is convex, so that `start` changes the time alone.

    Args:
      inputs: [n, F + 1], the last column is 1.
      start: [F + 1, C].
    """
    result = scipy.optimize.minimize(
        _loss,
        start.ravel(),
        (inputs, labels, strength, start.shape),
        method="L-BFGS-B",
        jac=True,
        options={"maxiter": _ITERATIONS, "gtol": _TOLERANCE, "ftol": 0.0},
    )
    if not result.success:
        print(f"probe: not converged: {result.message}", file=sys.stderr)
    return result.x.reshape(start.shape)


def _choose(features, labels, kept, classes):
    """The strength by which the first `kept` examples tell most of the others."""
    if kept == len(labels):
        return STRENGTHS[0]
    inputs = _inputs(features, *_scales(features[:kept]))
    weights, losses = _start(inputs, classes), []
    for strength in STRENGTHS:
        weights = fit(inputs[:kept], labels[:kept], strength, weights)
        losses.append(_loss(weights, inputs[kept:], labels[kept:], 0.0, weights.shape)[0])
    return STRENGTHS[int(np.argmin(losses))]


def _loss(flat, inputs, labels, strength, shape):
    """The loss and its gradient, of weights that are flattened."""
    weights, each = flat.reshape(shape), np.arange(len(labels))
    penalised = weights * np.append(np.ones(shape[0] - 1), 0.0)[:, None]
    logits = inputs @ weights.astype(inputs.dtype)
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    total = probabilities.sum(axis=1)
    loss = np.mean(np.log(total) - logits[each, labels], dtype=np.float64)
    loss += strength / 2 * np.sum(penalised**2)
    error = probabilities / total[:, None]
    error[each, labels] -= 1
    return loss, (inputs.T @ error / len(labels) + strength * penalised).ravel()


def _scales(features):
    """Mean and standard deviation [F] float64, of a constant feature 1."""
    scale = features.std(axis=0, dtype=np.float64)
    return features.mean(axis=0, dtype=np.float64), np.where(scale > 0, scale, 1.0)


def _start(inputs, classes):
    return np.zeros((inputs.shape[1], classes))


def _inputs(features, mean, scale):
    inputs = np.ones((len(features), len(mean) + 1), np.float32)
    np.subtract(features, mean, out=inputs[:, :-1], casting="same_kind")
    inputs[:, :-1] /= scale
    return inputs
