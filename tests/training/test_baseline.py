"""The additive baseline against scikit-learn's ridge regression."""

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.preprocessing import OneHotEncoder

from xlarank.training.baseline import additive_scores


def test_it_is_ridge_regression_on_one_hot_users_and_items():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 6, 300), rng.integers(10, 18, 300)
    labels = (rng.random(300) < (users + items) / 30).astype(np.float32)
    keys = np.stack([users, items], axis=1)
    encoder = OneHotEncoder().fit(keys)
    ridge = Ridge(alpha=5, fit_intercept=False).fit(encoder.transform(keys), labels - labels.mean())
    expected = labels.mean() + ridge.predict(encoder.transform(keys[:50]))
    scores = additive_scores(users, items, labels, users[:50], items[:50], regularisation=5)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_users_and_items_never_seen_have_no_bias():
    users, items, labels = np.array([1, 1, 2]), np.array([5, 6, 5]), np.array([1.0, 0.0, 1.0])
    seen_item = additive_scores(users, items, labels, np.array([1, 9]), np.array([9, 9]))
    assert seen_item[1] == labels.mean()
    assert seen_item[0] != labels.mean()
