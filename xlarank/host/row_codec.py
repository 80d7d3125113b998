"""Encodes and decodes the rows of a table in NumPy: what the native kernel must equal, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xlarank.errors import ConfigError
from xlarank.host.tables import HostTable, aligned_empty, check_finite, host_tables
from xlarank.spec import ModelSpec, RowFormat

__all__ = ["check_tables", "decode_rows", "encode_rows"]

_ROWS_A_STEP = 65536
_HEADER_BYTES = 8  # scale and bias
_LEVELS = {RowFormat.INT8: 255, RowFormat.INT4: 15}
_FLOAT_DTYPES = {
    RowFormat.FLOAT32: "float32",
    RowFormat.FLOAT16: "float16",
    RowFormat.BFLOAT16: "bfloat16",
}


def encode_rows(values: np.ndarray, row_format: RowFormat | str, *, where: str = "encode_rows") -> HostTable:
    """Encodes the rows of a table, a copy; `decode_rows` gives them back, rounded.

    float16 and bfloat16 round to the nearest, ties to even. int8 and int4 place q = 0 at the smallest value
    of a row and the largest q at its largest, and round to the nearest q: a value is off by half a scale at
    most, and a row of equal values decodes to them exactly.

    Args:
      values: [R, D] float32, R and D at least 1, finite.
      row_format: how.
      where: begins messages.

    Returns:
      The table, 64-byte aligned.

    Raises:
      ConfigError: for another shape or dtype, or a row that holds NaN, infinity or more than the format does.
    """
    row_format = RowFormat(row_format)
    if not isinstance(values, np.ndarray):
        raise ConfigError(f"{where}: expected a numpy array, got {type(values).__name__}")
    if values.dtype != np.float32 or values.ndim != 2 or not values.size:
        raise ConfigError(
            f"{where}: expected float32 of shape [R, D], neither of them 0, got {values.dtype} of shape "
            f"{list(values.shape)}"
        )
    num_rows, dim = values.shape
    table = HostTable(aligned_empty((num_rows, row_format.row_bytes(dim)), np.uint8), row_format, dim)
    for begin in range(0, num_rows, _ROWS_A_STEP):
        block = np.ascontiguousarray(values[begin : begin + _ROWS_A_STEP])
        check_finite(where, block, begin)
        out = table.rows[begin : begin + len(block)]
        with np.errstate(over="ignore"):
            out[...] = _affine(block, table) if row_format.is_affine else _floats(block, table)
            decoded = decode_rows(HostTable(out, row_format, dim))
        _check_fits(where, block, decoded, row_format, begin)
    return table


def decode_rows(table: HostTable) -> np.ndarray:
    """[R, D] float32, the rows of a table; NaN and infinity of a damaged one come through."""
    rows, dim = table.rows, table.dim
    if table.format is RowFormat.BFLOAT16:
        # By bits: a conversion would quiet NaN, and warn.
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if not table.format.is_affine:
        return rows.view(_FLOAT_DTYPES[table.format]).astype(np.float32)
    packed = rows[:, _HEADER_BYTES:]
    if table.format is RowFormat.INT4:
        packed = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(rows), 2 * packed.shape[1])
    header = rows[:, :_HEADER_BYTES].copy().view(np.float32)  # [R, 2]
    return packed[:, :dim].astype(np.float32) * header[:, :1] + header[:, 1:]


def check_tables(spec: ModelSpec, tables: Mapping[str, HostTable | np.ndarray]) -> None:
    """Refuses tables that aren't those of a spec. Reads every value once.

    Args:
      spec: the model, fitted.
      tables: as `host_tables` takes them, and finite.

    Raises:
      ConfigError: names the table, what was expected and what came.
    """
    for name, table in host_tables(spec, tables).items():
        for begin in range(0, table.num_rows, _ROWS_A_STEP):
            block = HostTable(table.rows[begin : begin + _ROWS_A_STEP], table.format, table.dim)
            with np.errstate(over="ignore", invalid="ignore"):
                values = decode_rows(block)
            check_finite(f"table {name!r}", values, begin)


def _floats(block: np.ndarray, table: HostTable) -> np.ndarray:
    """[n, row_bytes] uint8 of rows in a narrower float."""
    return block.astype(_FLOAT_DTYPES[table.format]).view(np.uint8)


def _affine(block: np.ndarray, table: HostTable) -> np.ndarray:
    """[n, row_bytes] uint8 of rows of int8 or int4."""
    levels = _LEVELS[table.format]
    low = block.min(axis=1, keepdims=True)
    wide = block.astype(np.float64) - low
    scale = (wide.max(axis=1, keepdims=True) / levels).astype(np.float32)  # [n, 1]; 0 where all are equal
    steps = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    q = np.minimum(np.rint(steps), levels).astype(np.uint8)
    if table.format is RowFormat.INT4:
        q = np.pad(q, [(0, 0), (0, table.dim % 2)])
        q = q[:, 0::2] | q[:, 1::2] << 4
    encoded = np.zeros((len(block), table.rows.shape[1]), np.uint8)
    encoded[:, :_HEADER_BYTES] = np.hstack([scale, low]).view(np.uint8)
    encoded[:, _HEADER_BYTES : _HEADER_BYTES + q.shape[1]] = q
    return encoded


def _check_fits(
    where: str, block: np.ndarray, decoded: np.ndarray, row_format: RowFormat, first_row: int
) -> None:
    fits = np.isfinite(decoded).all(axis=1)
    if not fits.all():
        at = int(np.argmin(fits))
        raise ConfigError(
            f"{where}: row {first_row + at} reaches from {block[at].min():g} to {block[at].max():g}, "
            f"more than {row_format} holds"
        )
