"""New rows for a table that serves: `checked_update`, `encode_update`."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np

from xlarank.errors import ConfigError, RequestError
from xlarank.host.row_codec import encode_rows
from xlarank.host.tables import HostTable, check_finite
from xlarank.spec import RowFormat, TableSpec

__all__ = ["checked_update", "encode_update"]


def encode_update(table: TableSpec, rows: np.ndarray, values: np.ndarray) -> HostTable:
    """Checks new rows of a table and encodes them in its format.

    Args:
      table: which.
      rows: [K] integers, row numbers in [0, R).
      values: [K, D] floats, finite.

    Returns:
      A table of K rows.

    Raises:
      RequestError: names the table, what was expected and what came.
    """
    where = f"table {table.name!r}"
    if not table.updatable:
        raise RequestError(f"{where} isn't updatable: state updatable = true in the config and compile anew")
    rows, values = checked_update(where, rows, values, table.dim)
    outside = (rows < 0) | (rows >= table.num_rows)
    if outside.any():
        raise RequestError(
            f"{where}: expected row numbers in [0, {table.num_rows}), got {rows[np.argmax(outside)]}"
        )
    if not len(rows):
        return HostTable(np.empty((0, table.dtype.row_bytes(table.dim)), np.uint8), table.dtype, table.dim)
    try:
        if table.dtype is RowFormat.FLOAT32:  # nothing to encode, while lookups wait for the GIL
            return HostTable.of_floats(values)
        return encode_rows(values, table.dtype, where=f"{where}, new rows")
    except ConfigError as error:  # here it is the caller's fault
        raise RequestError(str(error)) from None


def checked_update(
    where: str, rows: Any, values: Any, dim: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and new rows as arrays, after every check that takes no table.

    Args:
      where: begins messages.
      rows: [K] integers.
      values: [K, D] floats, finite.
      dim: D; None for any.

    Returns:
      [K] integers that int64 holds, and [K, D] float32.

    Raises:
      RequestError: says what was expected and what came.
    """
    numbers = _array(where, "row numbers as integers of shape [K]", rows)
    if numbers.ndim != 1 or not (np.issubdtype(numbers.dtype, np.integer) or not numbers.size):
        raise RequestError(
            f"{where}: expected row numbers as integers of shape [K], got {numbers.dtype} of shape "
            f"{list(numbers.shape)}"
        )
    if numbers.size and numbers.max() >= 2**63:
        raise RequestError(f"{where}: expected row numbers that int64 holds, got {numbers.max()}")
    expected = f"new rows as floats of shape [{len(numbers)}, {'D' if dim is None else dim}]"
    floats = _array(where, expected, values)
    is_rows = floats.ndim == 2 and len(floats) == len(numbers) and dim in (None, floats.shape[1])
    if not is_rows or not np.issubdtype(floats.dtype, np.floating):
        raise RequestError(f"{where}: expected {expected}, got {floats.dtype} of shape {list(floats.shape)}")
    with np.errstate(over="ignore"):
        floats = np.ascontiguousarray(floats, np.float32)
    if floats.size:
        try:
            check_finite(f"{where}, new rows", floats)
        except ConfigError as error:  # here it is the caller's fault
            raise RequestError(str(error)) from None
    return numbers, floats


def _array(where: str, expected: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{where}: expected {expected}, got {reprlib.repr(value)}") from None
