"""Named arrays in one safetensors file, written with proof: `write_arrays`, `read_arrays`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xlarank.errors import BundleError, ConfigError
from xlarank.spec.files import open_file

__all__ = ["read_arrays", "write_arrays"]

# Safetensors' names of the types that the format uses. Columns need the first four; weights may be of any.
_DTYPES = {
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "BOOL": np.bool_,
    "U32": np.uint32,
    "I8": np.int8,
}
_WRITABLE = {np.dtype(dtype) for dtype in _DTYPES.values()}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays and reads them back before the file takes its name.

    Args:
      path: file to write; replaced if there. Its folder exists.
      arrays: any shapes; dtypes as listed above, of any memory order, in native byte order.
      metadata: text kept in the file's header.

    Raises:
      ConfigError: for an array of another dtype.
      BundleError: if the file can't be written, or what was read back differs from what was given.
    """
    packed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.dtype not in _WRITABLE or not array.dtype.isnative:
            allowed = sorted(dtype.name for dtype in _WRITABLE)
            raise ConfigError(f"{path.name}: array {name!r}: expected one of {allowed}, got {array.dtype!r}")
        # Safetensors writes the memory as it lies: wrong values for anything that isn't C-contiguous.
        # Not ascontiguousarray, which makes [] into [1].
        packed[name] = np.asarray(array, order="C")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        save_file(packed, temporary, metadata=dict(metadata))
        written, _ = read_arrays(temporary)
        for name, array in arrays.items():
            if not _same_bits(array, written.get(name)):
                raise BundleError(f"{path}: array {name!r} reads back different from what was written")
        os.replace(temporary, path)
    except SafetensorError as error:  # a full disk or a missing folder, too
        raise BundleError(f"{path}: can't be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads what `write_arrays` wrote.

    Returns:
      The arrays by name, C-contiguous copies, and the header's metadata.

    Raises:
      BundleError: if the file is missing, truncated, not safetensors, or holds another dtype.
    """
    try:
        open_file(path).close()  # safetensors opens whatever is there
        with safe_open(path, framework="numpy") as file:
            arrays: dict[str, np.ndarray] = {}
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise BundleError(f"{path}: array {name!r}: expected one of {list(_DTYPES)}, got {dtype}")
                arrays[name] = file.get_tensor(name)
            return arrays, dict(file.metadata() or {})
    except SafetensorError as error:
        raise BundleError(f"{path}: not a whole safetensors file: {error}") from error
    except OSError as error:
        raise BundleError(f"{path}: can't be read: {error.strerror or error}") from error


def _same_bits(given: np.ndarray, read: np.ndarray | None) -> bool:
    """Equal shape, dtype and bits, so that NaN equals itself and 0.0 differs from -0.0."""
    if read is None or read.shape != given.shape or read.dtype != given.dtype:
        return False
    words = f"u{given.dtype.itemsize}"
    return np.array_equal(np.asarray(given, order="C").view(words), read.view(words))
