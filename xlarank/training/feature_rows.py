"""Candidate features from Parquet, a chunk of rows at a time: `read_feature_rows`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlarank.errors import ConfigError, FeatureError
from xlarank.host import checked_columns
from xlarank.spec import Column, FeatureSpec, ModelSpec, Ragged, StringColumn, ValueType, take

__all__ = ["read_feature_rows"]

_CHUNK_ROWS = 65536


def read_feature_rows(
    path: Path, id_column: str, rows_spec: ModelSpec, *, chunk_rows: int = _CHUNK_ROWS
) -> Iterator[tuple[np.ndarray, list[Column]]]:
    """Reads ids and candidate features; in memory is a chunk at a time.

    A dense feature is a column of numbers, or of lists of `width` numbers; an id of integers or strings; a
    list or sequence of lists of these. Booleans are the numbers 0 and 1. A null stands for the feature's
    default; a column of nothing else may have the type null.

    Args:
      path: a Parquet file, or a folder of ``*.parquet``, read by name.
      id_column: of integers.
      rows_spec: its features are what is read, of `FeatureSchema.rows_spec`.
      chunk_rows: most rows at a time.

    Yields:
      [n] int64 ids, and one checked column a feature, n rows each.

    Raises:
      ConfigError: for files that aren't there or aren't Parquet, columns that are missing or of another type,
        nulls without a default, and values that a request could not have; names file, column and row.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: expected Parquet files *.parquet in the folder, found none")
    for file in files:
        yield from _read_file(file, id_column, rows_spec, chunk_rows)


def _read_file(
    file: Path, id_column: str, rows_spec: ModelSpec, chunk_rows: int
) -> Iterator[tuple[np.ndarray, list[Column]]]:
    try:
        with pq.ParquetFile(file) as parquet:
            names = _columns_to_read(file, id_column, rows_spec, parquet.schema_arrow.names)
            first_row = 0
            for batch in parquet.iter_batches(batch_size=chunk_rows, columns=names):
                yield _read_chunk(_Place(file, first_row), id_column, rows_spec, batch)
                first_row += batch.num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{file}: can't be read as Parquet: {error}") from error


def _columns_to_read(file: Path, id_column: str, rows_spec: ModelSpec, there: list[str]) -> list[str]:
    if id_column not in there:
        raise ConfigError(f"{file}: expected a column {id_column!r} of ids; it has {there}")
    for feature in rows_spec.features:
        if feature.name not in there and feature.default is None:
            raise ConfigError(
                f"{file}: expected a column {feature.name!r}, as the feature has no default; it has {there}"
            )
    features = [feature.name for feature in rows_spec.features if feature.name in there]
    names = [id_column, *(name for name in features if name != id_column)]
    for name in names:
        if there.count(name) > 1:
            raise ConfigError(
                f"{file}: expected one column {name!r}, got {there.count(name)}; it has {there}"
            )
    return names


class _Place:
    """Where a chunk is, for messages."""

    def __init__(self, file: Path, first_row: int) -> None:
        self._file = file
        self._first_row = first_row

    def error(self, column: str, row: int | None, text: str) -> ConfigError:
        where = "" if row is None else f", row {self._first_row + row}"
        return ConfigError(f"{self._file}: column {column!r}{where}: {text}")

    def error_of(self, row: int, error: FeatureError) -> ConfigError:
        # Checked alone, a row is the first, and its values are the first.
        text = re.sub(r" (in row|at position) \d+", "", str(error))
        return ConfigError(f"{self._file}: row {self._first_row + row}: {text}")


def _read_chunk(
    place: _Place, id_column: str, rows_spec: ModelSpec, batch: pa.RecordBatch
) -> tuple[np.ndarray, list[Column]]:
    array = batch.column(id_column)
    if not pa.types.is_integer(array.type):
        raise place.error(id_column, None, f"expected ids of an integer type up to int64, got {array.type}")
    if array.null_count:
        raise place.error(id_column, _first(array.is_null()), "expected an id, got a null")
    features = {
        feature.name: _read_column(place, feature, batch.column(feature.name))
        for feature in rows_spec.features
        if feature.name in batch.schema.names
    }
    ids = _integers(place, id_column, array, None)
    try:
        return ids, checked_columns(rows_spec, ids, features)
    except FeatureError:
        raise place.error_of(*_first_bad_row(rows_spec, features, len(ids))) from None


def _first_bad_row(rows_spec: ModelSpec, features: dict[str, Any], num_rows: int) -> tuple[int, FeatureError]:
    """The first of rows that are not all good, and what is wrong with it."""

    def fault(begin: int, end: int) -> FeatureError | None:
        rows = np.arange(begin, end)
        try:
            checked_columns(rows_spec, rows, {name: take(column, rows) for name, column in features.items()})
        except FeatureError as error:
            return error
        return None

    begin, end = 0, num_rows
    while end - begin > 1:
        middle = (begin + end) // 2
        begin, end = (begin, middle) if fault(begin, middle) else (middle, end)
    error = fault(begin, end)
    assert error is not None
    return begin, error


def _read_column(place: _Place, feature: FeatureSpec, array: Any) -> Any:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    array = _typed(feature, array)
    is_list = _is_list(array.type)
    values_type = array.type.value_type if is_list else array.type
    if is_list != (feature.is_ragged or feature.width > 1) or not _fits(feature, values_type):
        raise place.error(feature.name, None, f"expected {_expected(feature)}, got {array.type}")
    array = _filled(place, feature, array)
    if not is_list:
        return _values(place, feature, array, None)
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    flat = array.flatten()
    if flat.null_count:
        position = _first(flat.is_null())
        row = _row_of(position, lengths)
        raise place.error(feature.name, row, "expected a list without nulls, got one with a null")
    if feature.is_ragged:
        return Ragged(_values(place, feature, flat, lengths), lengths.astype(np.int32))
    if (lengths != feature.width).any():
        row = int(np.argmax(lengths != feature.width))
        raise place.error(feature.name, row, f"expected {feature.width} numbers, got {lengths[row]}")
    numbers = _values(place, feature, flat, lengths)
    assert isinstance(numbers, np.ndarray)
    return numbers.reshape(-1, feature.width)


def _typed(feature: FeatureSpec, array: Any) -> Any:
    """The array with the feature's type where its own is null, or a list of null."""
    values_type = {
        ValueType.FLOAT32: pa.float32(),
        ValueType.INT64: pa.int64(),
        ValueType.STRING: pa.large_string(),
    }[feature.dtype]
    if pa.types.is_null(array.type):
        is_list = feature.is_ragged or feature.width > 1
        return pa.nulls(len(array), pa.list_(values_type) if is_list else values_type)
    if _is_list(array.type) and pa.types.is_null(array.type.value_type):
        return array.cast(pa.list_(values_type))
    return array


def _filled(place: _Place, feature: FeatureSpec, array: Any) -> Any:
    """The array with the feature's default in place of nulls; NaN for floats, which stands for it."""
    if not array.null_count:
        return array
    if feature.default is None:
        raise place.error(feature.name, _first(array.is_null()), "got a null, and the feature has no default")
    default: Any = feature.default
    if feature.is_ragged:
        default = list(default)
    elif feature.width > 1:
        default = [float("nan")] * feature.width
    elif feature.dtype is ValueType.FLOAT32:
        return pc.fill_null(array.cast(pa.float64()), float("nan"))  # type: ignore[attr-defined]
    return pa.array([default if value is None else value for value in array.to_pylist()], array.type)


def _values(
    place: _Place, feature: FeatureSpec, array: Any, lengths: np.ndarray | None
) -> np.ndarray | StringColumn:
    if feature.dtype is ValueType.STRING:
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        return _strings(array.cast(pa.large_binary()))
    if feature.dtype is ValueType.INT64:
        return _integers(place, feature.name, array, lengths)
    values = array.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # infinite then, which the check refuses
        return values.astype(np.float32)


def _integers(place: _Place, column: str, array: Any, lengths: np.ndarray | None) -> np.ndarray:
    """int64 of an array without nulls; `lengths` are of the lists that it is the values of."""
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype == np.uint64 and values.size and values.max() >= 2**63:
        position = int(np.argmax(values >= 2**63))
        row = position if lengths is None else _row_of(position, lengths)
        raise place.error(column, row, f"expected integers up to int64, got {values[position]}")
    return values.astype(np.int64)


def _row_of(position: int, lengths: np.ndarray) -> int:
    """The list that a value is in."""
    return int(np.searchsorted(np.cumsum(lengths), position, side="right"))


def _strings(array: Any) -> StringColumn:
    _, offsets_buffer, data = array.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    if not len(array):
        return StringColumn(np.zeros(0, np.uint8), np.zeros(1, np.int64))
    blob = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return StringColumn(blob[offsets[0] : offsets[-1]], offsets - offsets[0])


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def _fits(feature: FeatureSpec, type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type  # type: ignore[attr-defined]
    if feature.dtype is ValueType.STRING:
        return any(
            check(type_)
            for check in (
                pa.types.is_string,
                pa.types.is_large_string,
                pa.types.is_binary,
                pa.types.is_large_binary,
            )
        )
    if pa.types.is_integer(type_):
        return True
    is_number = pa.types.is_floating(type_) or pa.types.is_boolean(type_)
    return feature.dtype is ValueType.FLOAT32 and is_number


def _expected(feature: FeatureSpec) -> str:
    values = {
        ValueType.FLOAT32: "numbers",
        ValueType.INT64: "integers up to int64",
        ValueType.STRING: "strings",
    }[feature.dtype]
    if feature.is_ragged:
        return f"lists of {values}"
    return f"lists of {feature.width} {values}" if feature.width > 1 else values


def _first(mask: Any) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))
