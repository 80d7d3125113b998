"""Strict JAX for every test of the models: nothing may lean on dtype or rank promotion."""

import jax
import numpy as np
import pytest

from xlarank.spec import ModelSpec


@pytest.fixture(autouse=True)
def _strict_jax():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def spec():
    """A feature of every kind and both scopes; two tasks."""
    return ModelSpec.from_dict(
        {
            "name": "tiny",
            "features": [
                {"name": "age", "kind": "dense", "scope": "context", "width": 3},
                {"name": "user", "kind": "id", "scope": "context", "table": "users"},
                {
                    "name": "history",
                    "kind": "sequence",
                    "scope": "context",
                    "table": "items",
                    "max_length": 5,
                },
                {"name": "item", "kind": "id", "scope": "candidate", "table": "items"},
                {
                    "name": "tags",
                    "kind": "id_list",
                    "scope": "candidate",
                    "table": "items",
                    "combiner": "mean",
                },
            ],
            "tables": [{"name": "users", "dim": 8, "rows": 7}, {"name": "items", "dim": 8, "rows": 11}],
            "tasks": [{"name": "finish"}, {"name": "share"}],
        }
    )


@pytest.fixture
def inputs():
    """Preprocessed inputs of 6 rows for `spec`: empty, short and full bags."""
    rng = np.random.default_rng(0)
    return {
        "age": rng.normal(size=(6, 3)).astype(np.float32),
        "user": rng.integers(0, 7, 6).astype(np.int32),
        "history": rng.integers(-1, 11, (6, 5)).astype(np.int32),
        "history.lengths": np.array([0, 1, 2, 3, 4, 5], np.int32),
        "item": rng.integers(0, 11, 6).astype(np.int32),
        "tags": rng.integers(0, 11, (6, 4)).astype(np.int32),
        "tags.lengths": np.array([4, 0, 1, 2, 3, 4], np.int32),
    }
