"""New rows for a table that serves: `encode_update`."""

from __future__ import annotations

import numpy as np

from xlarank.errors import ConfigError, RequestError
from xlarank.host.row_codec import encode_rows
from xlarank.host.tables import HostTable, check_finite
from xlarank.spec import RowFormat, TableSpec

__all__ = ["encode_update"]


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
    rows, values = np.asarray(rows), np.asarray(values)
    if rows.ndim != 1 or not (np.issubdtype(rows.dtype, np.integer) or not rows.size):
        raise RequestError(
            f"{where}: expected row numbers as integers of shape [K], got {rows.dtype} of shape "
            f"{list(rows.shape)}"
        )
    if values.shape != (len(rows), table.dim) or not np.issubdtype(values.dtype, np.floating):
        raise RequestError(
            f"{where}: expected new rows as floats of shape [{len(rows)}, {table.dim}], got {values.dtype} "
            f"of shape {list(values.shape)}"
        )
    outside = (rows < 0) | (rows >= table.num_rows)
    if outside.any():
        raise RequestError(
            f"{where}: expected row numbers in [0, {table.num_rows}), got {rows[np.argmax(outside)]}"
        )
    if not len(rows):
        return HostTable(np.empty((0, table.dtype.row_bytes(table.dim)), np.uint8), table.dtype, table.dim)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, np.float32)
    try:
        check_finite(f"{where}, new rows", values)
        if table.dtype is RowFormat.FLOAT32:  # nothing to encode, while lookups wait for the GIL
            return HostTable.of_floats(values)
        return encode_rows(values, table.dtype)
    except ConfigError as error:  # here it is the caller's fault
        raise RequestError(str(error)) from None
