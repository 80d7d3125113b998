"""Metrics against scikit-learn and arithmetic."""

import math

import numpy as np
import pytest
import sklearn.metrics

from xlarank.spec.metrics import auc, grouped_auc, log_loss, normalised_entropy


@pytest.fixture(params=range(5))
def sample(request):
    """Labels, scores with ties, groups of very different sizes."""
    rng = np.random.default_rng(request.param)
    n = 400
    scores = np.round(rng.random(n), 1 + request.param).astype(np.float32)
    labels = (rng.random(n) < scores).astype(np.float32)
    return labels, scores, (30 * rng.random(n) ** 3).astype(np.int64)


def test_auc_is_scikit_learns_ties_included(sample):
    labels, scores, _ = sample
    assert auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_auc_of_equal_scores_is_one_half():
    assert auc(np.array([0, 1, 1]), np.ones(3)) == 0.5


def test_gauc_weighs_groups_with_both_classes_by_their_rows(sample):
    labels, scores, groups = sample
    total, weight = 0.0, 0
    for group in np.unique(groups):
        rows = groups == group
        if 0 < labels[rows].sum() < rows.sum():
            total += rows.sum() * sklearn.metrics.roc_auc_score(labels[rows], scores[rows])
            weight += rows.sum()
    assert grouped_auc(labels, scores, groups) == pytest.approx(total / weight, abs=1e-12)


def test_log_loss_is_scikit_learns(sample):
    labels, scores, _ = sample
    inside = np.clip(scores, 1e-6, 1 - 1e-6)
    expected = sklearn.metrics.log_loss(labels, inside.astype(np.float64))
    assert log_loss(labels, inside) == pytest.approx(expected, rel=1e-9)


def test_one_wrong_certainty_costs_a_finite_loss():
    assert log_loss(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


def test_normalised_entropy_is_one_for_the_share_of_positives():
    labels = np.array([1.0, 0, 0, 0])
    assert normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1)
    expected = (math.log(2)) / (-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert normalised_entropy(labels, np.full(4, 0.5)) == pytest.approx(expected)


def test_what_one_class_cannot_say_is_nan():
    one_class, scores = np.ones(3), np.arange(3.0)
    assert math.isnan(auc(one_class, scores))
    assert math.isnan(grouped_auc(np.array([1, 0]), np.arange(2.0), np.array([1, 2])))
    assert math.isnan(normalised_entropy(one_class, scores))
    assert math.isnan(auc(np.zeros(0), np.zeros(0)))
    assert math.isnan(log_loss(np.zeros(0), np.zeros(0)))
