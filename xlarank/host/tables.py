"""Embedding tables in host memory: `HostTable`, aligned memory, and the check that they fit a spec."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16, which leaves use
import numpy as np
import numpy.typing as npt

from xlarank.errors import ConfigError
from xlarank.spec import ModelSpec, RowFormat, TableSpec

__all__ = ["HostTable", "aligned_empty", "check_finite", "check_writable", "host_tables"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class HostTable:
    """Encoded rows of one embedding table. The array is shared, not copied, and may be read-only."""

    rows: np.ndarray
    """[R, row_bytes] uint8, C-contiguous, best 64-byte aligned; see `RowFormat.row_bytes`."""

    format: RowFormat
    """How a row is encoded."""

    dim: int
    """D, values a row."""

    def __post_init__(self) -> None:
        rows, width = self.rows, self.format.row_bytes(self.dim)
        if not isinstance(rows, np.ndarray):
            raise ConfigError(f"HostTable: expected rows in a numpy array, got {type(rows).__name__}")
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != width:
            raise ConfigError(
                f"HostTable: expected uint8 of shape [R, {width}] for rows of {self.dim} {self.format} "
                f"values, got {rows.dtype} of shape {list(rows.shape)}"
            )
        if not rows.flags.c_contiguous:
            raise ConfigError(f"HostTable: expected C-contiguous rows, got strides {rows.strides}")

    @classmethod
    def of_floats(cls, values: np.ndarray) -> HostTable:
        """The table that is a C-contiguous array [R, D] of float32; shares its memory."""
        return cls(values.view(np.uint8), RowFormat.FLOAT32, values.shape[1])

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.rows)

    def take(self, rows: np.ndarray) -> HostTable:
        """The table of those rows; [V] row numbers in [0, R)."""
        return HostTable(self.rows[rows], self.format, self.dim)


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike, alignment: int = 64) -> np.ndarray:
    """An uninitialised C-contiguous array whose first byte lies at a multiple of `alignment`.

    Args:
      shape: any shape.
      dtype: any fixed-size numpy dtype or its name, "bfloat16" among them.
      alignment: bytes, a power of two.

    Raises:
      ConfigError: if alignment is not a power of two.
    """
    if alignment < 1 or alignment & (alignment - 1):
        raise ConfigError(f"alignment must be a power of two; was {alignment}")
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + alignment, np.uint8)
    begin = -memory.ctypes.data % alignment
    return memory[begin : begin + num_bytes].view(dtype).reshape(shape)


def host_tables(spec: ModelSpec, tables: Mapping[str, HostTable | np.ndarray]) -> dict[str, HostTable]:
    """The tables of a spec by name; arrays are wrapped, nothing is copied and no value is read.

    Args:
      spec: the model, fitted.
      tables: by name, in the format of its TableSpec. A float32 one may also be a C-contiguous array [R, D].

    Raises:
      ConfigError: names the table, what was expected and what came.
    """
    if set(tables) != set(spec.table_by_name):
        raise ConfigError(
            f"model {spec.name!r}: expected tables {sorted(spec.table_by_name)}, got {sorted(tables)}"
        )
    return {table.name: _host_table(table, tables[table.name]) for table in spec.tables}


def check_writable(spec: ModelSpec, tables: Mapping[str, HostTable]) -> None:
    """Raises ConfigError for an updatable table whose rows are in read-only memory."""
    for table in spec.tables:
        if table.updatable and not tables[table.name].rows.flags.writeable:
            raise ConfigError(
                f"table {table.name!r} is updatable: expected rows in writable memory, got read-only ones, "
                f"as files are mapped"
            )


def _host_table(spec: TableSpec, table: HostTable | np.ndarray) -> HostTable:
    where, shape = f"table {spec.name!r}", [spec.num_rows, spec.dim]
    if isinstance(table, HostTable):
        got = [table.num_rows, table.dim]
        if table.format is not spec.dtype or got != shape:
            raise ConfigError(
                f"{where}: expected {spec.dtype} of shape {shape}, got {table.format} of shape {got}"
            )
        return table
    if not isinstance(table, np.ndarray):
        raise ConfigError(f"{where}: expected a HostTable or a numpy array, got {type(table).__name__}")
    if spec.dtype is not RowFormat.FLOAT32:
        raise ConfigError(
            f"{where}: expected {spec.dtype} rows, got an array of {table.dtype}; encode_rows makes such "
            f"rows of float32 values"
        )
    if table.dtype != np.float32 or list(table.shape) != shape:
        raise ConfigError(
            f"{where}: expected float32 of shape {shape}, got {table.dtype} of shape {list(table.shape)}"
        )
    if not table.flags.c_contiguous:
        raise ConfigError(f"{where}: expected a C-contiguous array, got strides {table.strides}")
    return HostTable.of_floats(table)


def check_finite(where: str, values: np.ndarray, first_row: int = 0) -> None:
    """Raises ConfigError naming the first row of values [n, D] that holds NaN or infinity.

    Args:
      where: begins the message.
      values: floats.
      first_row: number of the first row.
    """
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise ConfigError(f"{where}: expected finite floats, row {row} holds NaN or infinity")
