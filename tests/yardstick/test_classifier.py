"""The logistic regression, against a closed form and another optimizer."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from pretraining.yardstick import classifier


def test_two_points_have_a_closed_form():
    """x = -1, 1 of the classes 0, 1. By symmetry the weights are -a and a, the biases 0, and the
    loss log(1 + e^(-2 a)) + strength a^2 is least where strength a = 1 / (1 + e^(2 a))."""
    inputs, labels = np.array([[-1.0, 1.0], [1.0, 1.0]]), np.array([0, 1])
    for strength in (1.0, 0.1, 0.01):
        a = scipy.optimize.brentq(lambda a, s=strength: s * a - 1 / (1 + np.exp(2 * a)), 0, 10)
        weights = classifier.fit(inputs, labels, strength, np.zeros((2, 2)))
        np.testing.assert_allclose(weights, [[-a, a], [0, 0]], rtol=1e-2, atol=1e-4)


def test_three_classes_against_an_optimizer_without_gradients():
    rng = np.random.default_rng(0)
    inputs = np.append(rng.normal(size=(40, 3)), np.ones((40, 1)), axis=1)
    labels = np.argmax(inputs[:, :3] + rng.normal(size=(40, 3)) + [0.5, 0, 0], axis=1)

    def loss(flat):
        weights = flat.reshape(4, 3)
        log_p = scipy.special.log_softmax(inputs @ weights, axis=1)
        return -np.mean(log_p[range(40), labels]) + 0.05 * np.sum(weights[:3] ** 2)

    theirs = scipy.optimize.minimize(loss, np.zeros(12), method="BFGS", tol=1e-7).x
    ours = classifier.fit(inputs, labels, 0.1, np.ones((4, 3)))
    # Adding the same to all biases changes nothing.
    centred = lambda x: x.reshape(4, 3) - x.reshape(4, 3).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred(ours), centred(theirs), atol=2e-3)
    assert abs(loss(ours.ravel()) - loss(theirs)) < 1e-6


def test_features_are_standardised():
    """Scales, offsets and a constant feature change no prediction."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 3))
    labels = (features[:, 0] + 0.3 * features[:, 1] > 0).astype(int)
    plain = classifier.predict(classifier.train(features[:40], labels[:40], 2), features)
    changed = np.append(features * [1e3, 1e-3, 1] + [5, -7, 0], np.full((60, 1), 4.0), axis=1)
    scaled = classifier.train(changed[:40], labels[:40], 2)
    np.testing.assert_array_equal(classifier.predict(scaled, changed), plain)
    assert (plain == labels)[40:].mean() >= 0.9


def test_all_words_of_a_sentence_are_held_out_or_none(monkeypatch):
    """10 groups of sizes 1 to 10: the last two, 19 of 55 examples, choose the strength; their
    features have no say in the scales."""
    groups = np.repeat(np.arange(10), np.arange(1, 11))
    features = np.random.default_rng(3).normal(size=(55, 2))
    features[36:] += 1e3
    used = []
    fit = classifier.fit

    def record(inputs, labels, strength, start):
        used.append(inputs)
        return fit(inputs, labels, strength, start)

    monkeypatch.setattr(classifier, "fit", record)
    classifier.train(features, np.arange(55) % 2, 2, groups)
    assert [len(inputs) for inputs in used] == [36, 36, 36, 36, 55]
    for inputs in used:
        np.testing.assert_allclose(inputs[:, :2].mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(inputs[:, :2].std(axis=0), 1, atol=1e-4)


def test_what_does_not_converge_is_told(monkeypatch, capsys):
    monkeypatch.setattr(classifier, "_ITERATIONS", 1)
    inputs = np.random.default_rng(4).normal(size=(30, 4))
    classifier.fit(inputs, np.arange(30) % 2, 0.001, np.zeros((4, 2)))
    assert "probe: not converged" in capsys.readouterr().err


@pytest.mark.parametrize("signal, chosen", [(True, min), (False, max)])
def test_the_strength_is_chosen_on_the_last_fifth(signal, chosen, monkeypatch):
    """Where noise is all there is the strongest penalty wins, where there is none the weakest."""
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(100, 20)), np.arange(100) % 2
    if signal:
        features[:, 0] = labels * 2 - 1
    used = []
    fit = classifier.fit

    def record(inputs, labels, strength, start):
        used.append((len(inputs), strength))
        return fit(inputs, labels, strength, start)

    monkeypatch.setattr(classifier, "fit", record)
    classifier.train(features, labels, 2)
    assert used[:-1] == [(80, strength) for strength in classifier.STRENGTHS]
    assert used[-1] == (100, chosen(classifier.STRENGTHS))
