"""The additive baseline: how far a bias a user and a bias an item go."""

from __future__ import annotations

import numpy as np

__all__ = ["additive_scores"]

_NUM_SWEEPS = 10


def additive_scores(
    users: np.ndarray,
    items: np.ndarray,
    labels: np.ndarray,
    test_users: np.ndarray,
    test_items: np.ndarray,
    *,
    regularisation: float = 5.0,
) -> np.ndarray:
    """Scores test rows by ``mean + bias_user + bias_item``, fitted to training rows.

    Ridge regression by alternating exact steps (Koren, KDD 2008, section 2.1): each bias is the sum of its
    rows' residuals over their number plus `regularisation`. One never seen in training is 0.

    Args:
      users: [n] integer keys of training rows.
      items: [n] likewise.
      labels: [n] float.
      test_users: [m] keys of test rows.
      test_items: [m] likewise.
      regularisation: rows' worth of pull towards 0.

    Returns:
      [m] float64 in the labels' scale; not clipped to [0, 1].
    """
    user_keys, user = np.unique(users, return_inverse=True)
    item_keys, item = np.unique(items, return_inverse=True)
    mean = float(np.mean(labels))
    residual = np.asarray(labels, np.float64) - mean
    user_bias, item_bias = np.zeros(len(user_keys)), np.zeros(len(item_keys))
    user_weight = np.bincount(user) + regularisation
    item_weight = np.bincount(item) + regularisation
    for _ in range(_NUM_SWEEPS):
        item_bias = np.bincount(item, weights=residual - user_bias[user]) / item_weight
        user_bias = np.bincount(user, weights=residual - item_bias[item]) / user_weight
    return mean + _look_up(user_keys, user_bias, test_users) + _look_up(item_keys, item_bias, test_items)


def _look_up(keys: np.ndarray, biases: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Bias of each wanted key, 0 where it isn't among the sorted keys."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, biases[at], 0.0)
