"""Fits vocabularies, statistics, boundaries and table sizes to training data."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from xlarank.errors import ConfigError
from xlarank.host.preprocessing import to_dense
from xlarank.spec import (
    Bucketise,
    Column,
    FeatureKind,
    FeatureSpec,
    ModelSpec,
    Operation,
    Ragged,
    Standardise,
    StringColumn,
    TableSpec,
    Vocabulary,
    rows_needed,
)
from xlarank.training.data import RankingData

__all__ = ["fit_spec"]


def fit_spec(spec: ModelSpec, data: RankingData) -> ModelSpec:
    """Fits what a spec leaves open; what it states stays.

    Features with an open vocabulary that share a table get one vocabulary over the values of all of them,
    most frequent first, so that hot rows lie side by side. Statistics and quantiles are taken after the
    operations that come before them. A table has the rows that its features can address; for plain row
    numbers that is one more than the largest seen.

    Args:
      spec: the model.
      data: training data.

    Returns:
      The fitted spec.

    Raises:
      ConfigError: when features that share a table differ in min_count, a hashed table has no rows stated, a
        float is not finite without a default to stand in, or a vocabulary or column comes out empty.
    """
    columns = dict(zip((f.name for f in spec.features), data.columns(spec), strict=True))
    vocabularies = _fit_vocabularies(spec, columns)
    features = tuple(
        _fit_feature(feature, columns[feature.name], vocabularies.get(feature.table or ""))
        for feature in spec.features
    )
    tables = tuple(_fit_table(table, features, columns) for table in spec.tables)
    fitted = dataclasses.replace(spec, features=features, tables=tables)
    fitted.check_fitted()
    return fitted


def _fit_vocabularies(spec: ModelSpec, columns: dict[str, Column]) -> dict[str, tuple]:
    """Values by table name, for tables that an open vocabulary points at."""
    fitted: dict[str, tuple] = {}
    for table in spec.tables:
        users = [f for f in spec.features if f.table == table.name and f.vocabulary is not None]
        open_ones = [f for f in users if not f.is_fitted]
        if not open_ones:
            continue
        stated = {f.vocabulary.values for f in users if f.vocabulary is not None and f.is_fitted}
        if len(stated) > 1:
            raise ConfigError(f"table {table.name!r}: its features state different vocabularies")
        if stated:
            fitted[table.name] = stated.pop() or ()
            continue
        counts = {f.vocabulary.min_count for f in open_ones if f.vocabulary is not None}
        dtypes = {f.dtype.value for f in open_ones}
        if len(counts) > 1 or len(dtypes) > 1:
            raise ConfigError(
                f"table {table.name!r}: features {[f.name for f in open_ones]} share it and so share a "
                f"vocabulary; they must agree in dtype and min_count, which were {sorted(dtypes)} and "
                f"{sorted(counts)}"
            )
        fitted[table.name] = _frequent_values([columns[f.name] for f in open_ones], counts.pop())
        if not fitted[table.name]:
            raise ConfigError(
                f"table {table.name!r}: no value of features {[f.name for f in open_ones]} is frequent "
                f"enough for the vocabulary"
            )
    return fitted


def _frequent_values(columns: list[Column], min_count: int) -> tuple:
    """Values seen at least `min_count` times, most frequent first, ties in ascending order."""
    counter: collections.Counter = collections.Counter()
    for column in columns:
        values = column.values if isinstance(column, Ragged) else column
        if isinstance(values, StringColumn):
            counter.update(value.decode() for value in values.to_bytes())
        else:
            unique, counts = np.unique(values, return_counts=True)
            counter.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
    kept = [(value, count) for value, count in counter.items() if count >= min_count]
    return tuple(value for value, _ in sorted(kept, key=lambda item: (-item[1], item[0])))


def _fit_feature(feature: FeatureSpec, column: Column, vocabulary: tuple | None) -> FeatureSpec:
    """Fits operations from first to last: each is fitted to what those before it give."""
    for position, operation in enumerate(feature.preprocessing):
        if operation.is_fitted:
            continue
        before = feature.preprocessing[:position]
        if isinstance(operation, Vocabulary):
            fitted = dataclasses.replace(operation, values=vocabulary)
        else:
            assert isinstance(column, np.ndarray)
            values = to_dense(_floats_before(feature, before), column)
            if not values.size or not np.isfinite(values).all():
                what = "no rows" if not values.size else "values that aren't finite"
                raise ConfigError(f"feature {feature.name!r}: can't fit it to data with {what}")
            if isinstance(operation, Standardise):
                fitted = _standardise(values)
            else:
                assert isinstance(operation, Bucketise)
                fitted = _bucketise(operation, values)
        operations = (*before, fitted, *feature.preprocessing[position + 1 :])
        feature = dataclasses.replace(feature, preprocessing=operations)
    return feature


def _floats_before(feature: FeatureSpec, operations: tuple[Operation, ...]) -> FeatureSpec:
    """The feature as a dense one that ends with `operations`, also where it is a bucketised id."""
    return FeatureSpec(
        name=feature.name,
        kind=FeatureKind.DENSE,
        scope=feature.scope,
        width=feature.width,
        default=feature.default,
        preprocessing=operations,
    )


def _standardise(values: np.ndarray) -> Standardise:
    """Mean and standard deviation a column of [n, K_f]; a constant column is only centred."""
    columns = values.reshape(len(values), -1).astype(np.float64)
    std = columns.std(axis=0)
    # A constant column has a deviation of rounding errors.
    std = np.where(std > 1e-6 * np.maximum(1.0, np.abs(columns).max(axis=0)), std, 1.0)
    return Standardise(mean=tuple(columns.mean(axis=0).tolist()), std=tuple(std.tolist()))


def _bucketise(operation: Bucketise, values: np.ndarray) -> Bucketise:
    """Quantiles of [n] as boundaries; equal ones become one."""
    assert operation.num_buckets is not None
    quantiles = np.quantile(values, np.arange(1, operation.num_buckets) / operation.num_buckets)
    boundaries = np.unique(quantiles.astype(np.float32)).astype(np.float64)
    return dataclasses.replace(operation, boundaries=tuple(boundaries.tolist()))


def _fit_table(table: TableSpec, features: tuple[FeatureSpec, ...], columns: dict[str, Column]) -> TableSpec:
    if table.rows is not None:
        return table
    users = [feature for feature in features if feature.table == table.name]
    rows = 1
    for feature in users:
        if feature.hash is not None:
            raise ConfigError(
                f"table {table.name!r}: feature {feature.name!r} is hashed into it; state its rows"
            )
        rows = max(rows, rows_needed(feature))
        if not feature.preprocessing:
            column = columns[feature.name]
            values = column.values if isinstance(column, Ragged) else column
            assert isinstance(values, np.ndarray)
            defaults = feature.default if isinstance(feature.default, tuple) else (feature.default,)
            largest = max((int(id_) for id_ in defaults if id_ is not None), default=0)
            rows = max(rows, 1 + largest, 1 + int(values.max(initial=0)))
    return dataclasses.replace(table, rows=rows)
