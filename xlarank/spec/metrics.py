"""Metrics of binary tasks: AUC, AUC within groups, log loss, normalised entropy. Plain NumPy."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["auc", "grouped_auc", "log_loss", "normalised_entropy"]

_SMALLEST = 1e-7
"""Probabilities are kept this far from 0 and 1, so that one wrong row can't make a loss infinite."""


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Chance that a positive row scores above a negative one; ties count one half.

    Args:
      labels: [n], 0 or 1.
      scores: [n] finite, in any scale.

    Returns:
      In [0, 1]; NaN unless both classes are there.
    """
    return grouped_auc(labels, scores, np.zeros(len(labels), np.int64))


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """gAUC: the mean of each group's AUC, weighted by its rows, over groups that hold both classes.

    Args:
      labels: [n], 0 or 1.
      scores: [n] finite, in any scale.
      groups: [n] integers, such as the user of each row.

    Returns:
      In [0, 1]; NaN when no group holds both classes.
    """
    if not len(labels):
        return math.nan
    _, group = np.unique(groups, return_inverse=True)
    positive = np.asarray(labels) > 0.5
    order = np.lexsort((scores, group))
    group, positive, scores = group[order], positive[order], np.asarray(scores)[order]
    ranks = _mid_ranks(group, scores)
    num_rows = np.bincount(group)
    num_positive = np.bincount(group, weights=positive)
    num_negative = num_rows - num_positive
    rank_sum = np.bincount(group, weights=ranks * positive)
    pairs = num_positive * num_negative
    mixed = pairs > 0
    if not mixed.any():
        return math.nan
    # Mann-Whitney U of the positives over the number of pairs.
    wins = rank_sum[mixed] - num_positive[mixed] * (num_positive[mixed] + 1) / 2
    return float(np.average(wins / pairs[mixed], weights=num_rows[mixed]))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean of ``-y log p - (1 - y) log(1 - p)`` in nats; p is clipped to [1e-7, 1 - 1e-7].

    Args:
      labels: [n], 0 or 1.
      probabilities: [n] in [0, 1].

    Returns:
      At least 0; NaN without rows.
    """
    if not len(labels):
        return math.nan
    labels = np.asarray(labels, np.float64)
    p = np.clip(np.asarray(probabilities, np.float64), _SMALLEST, 1 - _SMALLEST)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def normalised_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Log loss over that of always answering the share of positives (He et al., ADKDD 2014).

    Below 1 is better than knowing the share alone.

    Args:
      labels: [n], 0 or 1.
      probabilities: [n] in [0, 1].

    Returns:
      At least 0; NaN unless both classes are there.
    """
    if not len(labels) or not 0 < np.mean(labels) < 1:
        return math.nan
    share = np.full(len(labels), np.mean(labels, dtype=np.float64))
    return log_loss(labels, probabilities) / log_loss(labels, share)


def _mid_ranks(group: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Rank from 1 of each row within its group, ties sharing their mean; rows sorted by group and score."""
    n = len(group)
    new_group = np.diff(group, prepend=group[0] - 1) != 0
    new_value = new_group.copy()
    new_value[1:] |= scores[1:] != scores[:-1]
    begins = np.flatnonzero(new_value)
    ends = np.append(begins[1:], n)
    tie = np.cumsum(new_value) - 1  # which run of equal scores a row is in
    group_begin = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    return (begins[tie] + ends[tie] - 1) / 2 + 1 - group_begin
