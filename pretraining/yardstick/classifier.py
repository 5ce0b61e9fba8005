"""Multinomial logistic regression, as probes use it.

Letters: n examples, F features, C classes.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize

STRENGTHS = (1.0, 0.1, 0.01, 0.001)  # of the L2 penalty, tried from the strongest on
HELD_OUT = 0.2  # share of the training examples, the last ones, by which a strength is chosen
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


def train(features: np.ndarray, labels: np.ndarray, classes: int) -> Classifier:
    """Features [n, F] and labels [n] in 0..C-1 -> the classifier; nothing is drawn by lot.

    The strength is that of STRENGTHS with the highest likelihood of the last HELD_OUT of the
    examples, given the others; then all examples are used.
    """
    features = np.asarray(features, np.float64)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    inputs = _inputs(features, mean, scale)
    kept = max(1, round(len(labels) * (1 - HELD_OUT)))
    strength = _choose(inputs, labels, kept, classes)
    start = np.zeros((inputs.shape[1], classes))
    return Classifier(fit(inputs, labels, strength, start), mean, scale)


def predict(classifier: Classifier, features: np.ndarray) -> np.ndarray:
    """[n] classes of features [n, F]; of equal ones the first."""
    inputs = _inputs(np.asarray(features, np.float64), classifier.mean, classifier.scale)
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
    return result.x.reshape(start.shape)


def _choose(inputs, labels, kept, classes):
    if kept == len(labels):
        return STRENGTHS[0]
    weights, losses = np.zeros((inputs.shape[1], classes)), []
    for strength in STRENGTHS:
        weights = fit(inputs[:kept], labels[:kept], strength, weights)
        losses.append(_loss(weights, inputs[kept:], labels[kept:], 0.0, weights.shape)[0])
    return STRENGTHS[int(np.argmin(losses))]


def _loss(flat, inputs, labels, strength, shape):
    """The loss and its gradient, of weights that are flattened."""
    weights, each = flat.reshape(shape), np.arange(len(labels))
    penalised = weights * np.append(np.ones(shape[0] - 1), 0.0)[:, None]
    logits = inputs @ weights
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    total = probabilities.sum(axis=1)
    loss = np.mean(np.log(total) - logits[each, labels]) + strength / 2 * np.sum(penalised**2)
    error = probabilities / total[:, None]
    error[each, labels] -= 1
    return loss, (inputs.T @ error / len(labels) + strength * penalised).ravel()


def _inputs(features, mean, scale):
    return np.pad((features - mean) / scale, ((0, 0), (0, 1)), constant_values=1.0)
