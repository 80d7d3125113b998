"""Embedding tables as `.npy`: written as a stream, mapped when read. The header is compared, never parsed."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

import numpy as np

from xlarank.errors import BundleError, ConfigError

__all__ = ["ALIGNMENT", "map_table", "write_table"]

ALIGNMENT = 64
"""Bytes: a cache line, and what XLA and the native kernel ask of host arrays."""

_MAGIC = b"\x93NUMPY\x01\x00"
_CHUNK_BYTES = 16 << 20


def write_table(path: Path, table: np.ndarray) -> str:
    """Writes a table in chunks, so that no second copy of it is ever held.

    Args:
      path: file to write, in a folder that exists.
      table: [R, D] float32 of any memory order.

    Returns:
      sha256 of the bytes that the file must hold, taken of the memory and not of the file.

    Raises:
      ConfigError: for another rank or dtype.
    """
    if table.ndim != 2 or table.dtype != np.float32:
        raise ConfigError(
            f"{path.name}: expected float32 of shape [R, D], got {table.dtype} of shape {list(table.shape)}"
        )
    num_rows, dim = table.shape
    chunk_rows = max(1, _CHUNK_BYTES // max(1, 4 * dim))
    header = _header(num_rows, dim)
    digest = hashlib.sha256(header)
    with open(path, "wb") as file:
        file.write(header)
        for begin in range(0, num_rows, chunk_rows):
            chunk = np.ascontiguousarray(table[begin : begin + chunk_rows], dtype="<f4")
            file.write(chunk.data)
            digest.update(chunk.data)
    return digest.hexdigest()


def map_table(path: Path, num_rows: int, dim: int) -> np.ndarray:
    """Maps a table into memory; its pages are read as they are touched.

    Args:
      path: file of `write_table`.
      num_rows: R that the spec states.
      dim: D that the spec states.

    Returns:
      [R, D] float32, read-only, C-contiguous, 64-byte aligned.

    Raises:
      BundleError: if the header isn't that of such an array, or the file is too short or too long for it.
    """
    header = _header(num_rows, dim)
    expected_bytes = len(header) + 4 * num_rows * dim
    try:
        with open(path, "rb") as file:
            found = file.read(len(header))
            if found != header:
                raise BundleError(
                    f"{path}: expected an npy file of float32 [{num_rows}, {dim}], {_text(header)}; "
                    f"got {_text(found)}"
                )
            num_bytes = file.seek(0, 2)
            if num_bytes != expected_bytes:
                raise BundleError(
                    f"{path}: expected {expected_bytes} bytes of float32 [{num_rows}, {dim}], got {num_bytes}"
                )
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BundleError(f"{path}: can't be read: {error.strerror or error}") from error
    return np.frombuffer(pages, np.float32, num_rows * dim, len(header)).reshape(num_rows, dim)


def _header(num_rows: int, dim: int) -> bytes:
    """What numpy writes before such an array, padded so that the data begin at a multiple of 64 bytes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({num_rows}, {dim}), }}".encode()
    num_before = len(_MAGIC) + 2
    text += b" " * (-(num_before + len(text) + 1) % ALIGNMENT) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


def _text(header: bytes) -> str:
    """The readable part of a header."""
    if not header.startswith(_MAGIC):
        return f"bytes {header[:16]!r}"
    return header[len(_MAGIC) + 2 :].decode("latin-1").strip()
