"""What preprocessing means: raw values of a feature to floats or to row numbers of its table.

Training and the reference scores call this; the native kernel does the same while it gathers, and tests
hold the two together. Everything is float32; ``log1p`` is taken in double precision and rounded, so that
every implementation gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xlarank.errors import FeatureError
from xlarank.host.hashing import hash_int64, hash_strings
from xlarank.host.vocabulary import index_of
from xlarank.spec import (
    Clip,
    Column,
    FeatureKind,
    FeatureSpec,
    Log1p,
    ModelSpec,
    OutOfRange,
    Ragged,
    StringColumn,
    take,
)

__all__ = ["model_inputs", "to_dense", "to_rows", "truncate"]


def to_dense(feature: FeatureSpec, values: np.ndarray) -> np.ndarray:
    """Applies the default and the float operations of a feature.

    Args:
      feature: a dense or bucketised feature, fitted.
      values: [n, K_f] (or [n] for a bucketised id) float32; NaN reads as the default, if there is one.

    Returns:
      float32 of the same shape.
    """
    values = np.asarray(values, np.float32)
    # Constants beyond float32 become infinite, and may then give NaN: said here once, not by NumPy.
    with np.errstate(all="ignore"):
        if feature.default is not None:
            values = np.where(np.isnan(values), np.float32(feature.default), values)  # type: ignore[arg-type]
        for operation in feature.dense_operations:
            if isinstance(operation, Log1p):
                values = np.log1p(values.astype(np.float64)).astype(np.float32)
            elif isinstance(operation, Clip):
                values = np.clip(values, np.float32(operation.low), np.float32(operation.high))
            else:
                assert operation.mean is not None, f"feature {feature.name!r} is not fitted"
                mean = np.array(operation.mean, np.float32)
                std = np.array(operation.std, np.float32)
                values = (values - mean) / std
    return values


def to_rows(spec: ModelSpec, feature: FeatureSpec, values: np.ndarray | StringColumn) -> np.ndarray:
    """Turns raw ids into row numbers of the feature's table.

    Args:
      spec: the model, fitted.
      feature: one of its lookup features.
      values: [V] int64, V strings, or [V] float32 for a bucketised feature.

    Returns:
      [V] int64 in [-1, R); -1 reads as a row of zeros.

    Raises:
      FeatureError: for an id out of range under policy `error`.
    """
    table = spec.table_of(feature)
    num_rows = table.num_rows
    if feature.hash is not None:
        seed = feature.hash.seed
        strings = isinstance(values, StringColumn)
        hashes = hash_strings(values, seed) if strings else hash_int64(values, seed)
        return (hashes % np.uint64(num_rows)).astype(np.int64)
    if feature.vocabulary is not None:
        rows = index_of(feature.vocabulary).lookup(values)
    elif feature.bucketise is not None:
        assert isinstance(values, np.ndarray)
        with np.errstate(over="ignore"):
            boundaries = np.array(feature.bucketise.boundaries, np.float32)
        rows = np.searchsorted(boundaries, to_dense(feature, values), side="right").astype(np.int64)
    else:
        rows = np.asarray(values, np.int64)
    outside = (rows < 0) | (rows >= num_rows)
    if not outside.any():
        return rows
    if table.out_of_range is OutOfRange.ZERO:
        return np.where(outside, -1, rows)
    if table.out_of_range is OutOfRange.CLIP:
        return np.clip(rows, 0, num_rows - 1)
    if table.out_of_range is OutOfRange.HASH:
        hashed = (hash_int64(rows, 0) % np.uint64(num_rows)).astype(np.int64)
        return np.where(outside, hashed, rows)
    position = int(np.argmax(outside))
    raise FeatureError(
        f"feature {feature.name!r}: expected ids in [0, {num_rows}) of table {table.name!r}, "
        f"got {rows[position]} at position {position}"
    )


def truncate(feature: FeatureSpec, ragged: Ragged) -> Ragged:
    """Keeps the last ``max_length`` ids of each bag; all of them if the feature has no max_length.

    Args:
      feature: an id_list or sequence.
      ragged: n bags.

    Returns:
      n bags; `ragged` itself when none is longer.
    """
    limit = feature.max_length
    if limit is None or not len(ragged) or ragged.lengths.max() <= limit:
        return ragged
    ends = np.cumsum(ragged.lengths, dtype=np.int64)
    from_end = np.repeat(ends, ragged.lengths) - np.arange(ends[-1])
    values = take(ragged.values, np.flatnonzero(from_end <= limit))
    assert not isinstance(values, Ragged)
    return Ragged(values, np.minimum(ragged.lengths, limit).astype(np.int32))


def model_inputs(spec: ModelSpec, columns: Sequence[Column]) -> dict[str, np.ndarray]:
    """Preprocesses raw columns to what `EmbeddingCollection` takes, for training and reference scores.

    Args:
      spec: the model, fitted.
      columns: one a feature in the order of ``spec.features``, as `RankRequest.columns`; any number of
        rows n, the same for features that are used together.

    Returns:
      By name: a dense ``f`` float32 [n, K_f]; an id ``f`` int32 rows [n]; an id_list or sequence ``f``
      int32 rows [n, L], left-aligned, padded with -1, and ``f.lengths`` int32 [n]. L is max_length, or
      for an id_list without one the longest bag here, at least 1. A row of -1 reads as zeros.

    Raises:
      FeatureError: for an id out of range under policy `error`.
    """
    inputs: dict[str, np.ndarray] = {}
    for feature, column in zip(spec.features, columns, strict=True):
        if isinstance(column, Ragged):
            bags = truncate(feature, column)
            longest = int(bags.lengths.max()) if len(bags) else 0
            length = feature.max_length or max(1, longest)
            rows = np.full((len(bags), length), -1, np.int32)
            rows[np.arange(length) < bags.lengths[:, None]] = to_rows(spec, feature, bags.values)
            inputs[feature.name] = rows
            inputs[feature.name + ".lengths"] = bags.lengths.astype(np.int32)
        elif feature.kind is FeatureKind.DENSE:
            assert isinstance(column, np.ndarray)
            inputs[feature.name] = to_dense(feature, column)
        else:
            inputs[feature.name] = to_rows(spec, feature, column).astype(np.int32)
    return inputs
