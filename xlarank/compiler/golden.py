"""Golden requests made from the spec alone, for a model that comes without data."""

from __future__ import annotations

from typing import Any

import numpy as np

from xlarank.spec import (
    FeatureSpec,
    ModelSpec,
    Ragged,
    RankRequest,
    Scope,
    StringColumn,
    ValueType,
)

__all__ = ["random_requests"]

_MAX_BAG = 20


def random_requests(
    spec: ModelSpec, num_requests: int = 64, *, num_candidates: int = 24, seed: int = 0
) -> list[RankRequest]:
    """Valid requests with random values over each feature's whole range.

    Args:
      spec: fitted.
      num_requests: how many.
      num_candidates: N of each.
      seed: same seed, same requests.
    """
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(num_requests):
        features = {
            feature.name: _random_column(
                spec, feature, 1 if feature.scope is Scope.CONTEXT else num_candidates, rng
            )
            for feature in spec.features
        }
        requests.append(RankRequest(spec, features))
    return requests


def _random_column(spec: ModelSpec, feature: FeatureSpec, num_rows: int, rng: np.random.Generator) -> Any:
    if feature.dtype is ValueType.FLOAT32:
        shape = (num_rows,) if feature.is_lookup else (num_rows, feature.width)
        return _random_floats(feature, shape, rng)
    if not feature.is_ragged:
        return _random_ids(spec, feature, num_rows, rng)
    longest = min(feature.max_length or _MAX_BAG, _MAX_BAG)
    lengths = rng.integers(0, longest + 1, num_rows).astype(np.int32)
    return Ragged(_random_ids(spec, feature, int(lengths.sum()), rng), lengths)


def _random_floats(feature: FeatureSpec, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape)
    standardise = next((op for op in feature.dense_operations if hasattr(op, "mean")), None)
    names = [type(op).__name__ for op in feature.dense_operations]
    if standardise is not None and "Log1p" not in names:
        return (values * standardise.std + standardise.mean).astype(np.float32)  # type: ignore[attr-defined]
    if "Log1p" in names:  # counts: non-negative and skewed
        return np.expm1(np.abs(values) * 2).astype(np.float32)
    if feature.bucketise is not None and feature.bucketise.boundaries:
        low, high = feature.bucketise.boundaries[0], feature.bucketise.boundaries[-1]
        return rng.uniform(low - 1, high + 1, shape).astype(np.float32)
    return values.astype(np.float32)


def _random_ids(
    spec: ModelSpec, feature: FeatureSpec, num_values: int, rng: np.random.Generator
) -> np.ndarray | StringColumn:
    vocabulary = feature.vocabulary
    if vocabulary is not None and vocabulary.values:
        picks = rng.integers(0, len(vocabulary.values), num_values)
        values = [vocabulary.values[i] for i in picks]
        if feature.dtype is ValueType.STRING:
            return StringColumn.from_strings([str(v) for v in values])
        return np.array(values, np.int64)
    if feature.dtype is ValueType.STRING:
        return StringColumn.from_strings([f"value {v}" for v in rng.integers(0, 2**40, num_values)])
    if feature.hash is not None:
        return rng.integers(-(2**62), 2**62, num_values)
    return rng.integers(0, spec.table_of(feature).num_rows, num_values)
