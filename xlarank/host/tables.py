"""Embedding tables as host arrays: aligned memory, and the check that they fit a spec."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16, which leaves use
import numpy as np
import numpy.typing as npt

from xlarank.errors import ConfigError
from xlarank.spec import ModelSpec

__all__ = ["aligned_empty", "check_tables"]

_ROWS_A_STEP = 65536


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


def check_tables(spec: ModelSpec, tables: Mapping[str, np.ndarray]) -> None:
    """Refuses tables that aren't those of a spec. Reads every value once.

    Args:
      spec: the model, fitted.
      tables: by name, [R, D] float32, C-contiguous, finite.

    Raises:
      ConfigError: names the table, what was expected and what came.
    """
    if set(tables) != set(spec.table_by_name):
        raise ConfigError(
            f"model {spec.name!r}: expected tables {sorted(spec.table_by_name)}, got {sorted(tables)}"
        )
    for table in spec.tables:
        check_form(table.name, tables[table.name], (table.num_rows, table.dim))
        check_finite(table.name, tables[table.name])


def check_form(name: str, values: np.ndarray, shape: tuple[int, int]) -> None:
    """Raises ConfigError unless a table is a C-contiguous float32 array of `shape`."""
    if not isinstance(values, np.ndarray):
        raise ConfigError(f"table {name!r}: expected a numpy array, got {type(values).__name__}")
    if values.dtype != np.float32 or values.shape != shape:
        raise ConfigError(
            f"table {name!r}: expected float32 of shape {list(shape)}, got {values.dtype} of shape "
            f"{list(values.shape)}"
        )
    if not values.flags.c_contiguous:
        raise ConfigError(f"table {name!r}: expected a C-contiguous array, got strides {values.strides}")


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises ConfigError naming the first row of a table [R, D] that holds NaN or infinity."""
    for begin in range(0, len(values), _ROWS_A_STEP):
        finite = np.isfinite(values[begin : begin + _ROWS_A_STEP]).all(axis=1)
        if not finite.all():
            row = begin + int(np.argmin(finite))
            raise ConfigError(f"table {name!r}: expected finite floats, row {row} holds NaN or infinity")
