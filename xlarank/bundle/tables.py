"""Arrays of tables as `.npy`: written as a stream, mapped, or read into memory and checked as they are read.

The header is compared, never parsed. Beside each array lies a file with the digest of each of its chunks, so
that any part can be checked by itself: by several threads while a table is read, or a few chunks now and the
others later while it is used mapped.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import io
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xlarank.errors import BundleError, ConfigError
from xlarank.spec import RowFormat, TableSpec
from xlarank.spec.files import open_file, read_file

__all__ = ["ALIGNMENT", "ReadPace", "TableFile", "digests_file", "stored_form", "write_array"]

ALIGNMENT = 64
"""Bytes: a cache line, and what XLA and the native kernel ask of host arrays."""

ReadPace = Callable[[Callable[[], int]], int]
"""Has a part of a file read when there is time for it, and returns what that does: its bytes."""

_MAGIC = b"\x93NUMPY\x01\x00"
_CHUNK_BYTES = 4 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size

# NumPy has no name for bfloat16 in a file; int8 and int4 rows hold their scale and bias as bytes too.
_STORED = {
    RowFormat.FLOAT32: np.dtype("<f4"),
    RowFormat.FLOAT16: np.dtype("<f2"),
    RowFormat.BFLOAT16: np.dtype("<u2"),
    RowFormat.INT8: np.dtype(np.uint8),
    RowFormat.INT4: np.dtype(np.uint8),
}


def stored_form(table: TableSpec) -> tuple[np.dtype, tuple[int, int]]:
    """Dtype and shape of a table's array on the disk: its encoded rows as they lie in memory."""
    dtype = _STORED[table.dtype]
    return dtype, (table.num_rows, table.dtype.row_bytes(table.dim) // dtype.itemsize)


def digests_file(path: str) -> str:
    """Where the digests of an array's chunks lie: sha256 of each 4 MiB of its file, end to end."""
    return f"{path}.sha256"


def write_array(path: Path, array: np.ndarray) -> tuple[str, bytes]:
    """Writes an array in steps, so that no second copy of it is ever held.

    Args:
      path: file to write, in a folder that exists.
      array: [R, n] of any memory order; written little-endian.

    Returns:
      sha256 of the bytes that the file must hold, as hex digits, and the content of `digests_file`; taken of
      the memory and not of the file.
    """
    dtype = array.dtype.newbyteorder("<")
    num_rows, num_columns = array.shape
    rows_a_step = max(1, _CHUNK_BYTES // max(1, dtype.itemsize * num_columns))
    digests = _Digests()
    with open(path, "wb") as file:
        header = _header(dtype, array.shape)
        file.write(header)
        digests.update(memoryview(header))
        for begin in range(0, num_rows, rows_a_step):
            step = np.ascontiguousarray(array[begin : begin + rows_a_step], dtype)
            file.write(step.data)
            digests.update(step.data.cast("B"))
    return digests.whole.hexdigest(), digests.chunks()


class TableFile:
    """One array of a table on the disk. Threads may share it.

    Attributes:
      path: of the `.npy` file.
      dtype: of the array.
      shape: of the array, (R, n).
      num_bytes: of its values, the header not counted.
      num_chunks: pieces that can be checked by themselves, at least one.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, int]) -> None:
        """Looks at header and size.

        Args:
          path: file of `write_array`.
          dtype: that the manifest states.
          shape: likewise.

        Raises:
          BundleError: if the header isn't that of such an array, or the file is too short or too long for it.
        """
        self.path, self.dtype, self.shape = path, dtype, shape
        self._header = _header(dtype, shape)
        self.num_bytes = dtype.itemsize * shape[0] * shape[1]
        self._file_bytes = len(self._header) + self.num_bytes
        self.num_chunks = -(-self._file_bytes // _CHUNK_BYTES)
        with self._open() as file:
            found = file.read(len(self._header))
            if found != self._header:
                raise BundleError(
                    f"{path}: expected an npy file of {self}, {_text(self._header)}; got {_text(found)}"
                )
            self._check_size(file.seek(0, 2))

    def __str__(self) -> str:
        return f"{self.dtype.name} [{self.shape[0]}, {self.shape[1]}]"

    def map(self) -> np.ndarray:
        """The array, read-only, C-contiguous, 64-byte aligned; its pages are read as they are touched."""
        with self._open() as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        values = np.frombuffer(pages, self.dtype, self.shape[0] * self.shape[1], len(self._header))
        return values.reshape(self.shape)

    def read_into(
        self,
        memory: np.ndarray,
        *,
        num_threads: int = 1,
        pace: ReadPace = lambda read: read(),
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Reads the values, and checks every byte as it comes.

        Args:
          memory: [num_bytes] uint8, written.
          num_threads: threads that read and check; >= 1. With one it is the caller's.
          pace: what has that one read each 4 MiB, when there is time for it.
          on_bytes: told, in the caller's thread, the size of each part that is read and right.

        Raises:
          BundleError: if the file can't be read, is cut short, or a chunk's digest is wrong.
        """
        if memory.dtype != np.uint8 or memory.shape != (self.num_bytes,):
            raise ConfigError(
                f"{self.path}: expected memory of uint8 [{self.num_bytes}], got {memory.dtype} of shape "
                f"{list(memory.shape)}"
            )
        with self._open() as file:
            if num_threads == 1:
                for chunk in range(self.num_chunks):
                    on_bytes(pace(functools.partial(self._read_chunk, file.fileno(), chunk, memory)))
                return
            pool = concurrent.futures.ThreadPoolExecutor(num_threads)
            try:
                checks = [
                    pool.submit(self._read_chunk, file.fileno(), chunk, memory)
                    for chunk in range(self.num_chunks)
                ]
                for check in checks:
                    on_bytes(check.result())
            finally:
                pool.shutdown(cancel_futures=True)

    def check_size(self) -> None:
        """Asks for the file's size alone; a file that was removed is right, as who mapped it keeps it whole.

        Raises:
          BundleError: if the file is shorter or longer than it was written.
        """
        try:
            num_bytes = self.path.stat().st_size
        except OSError:
            return
        self._check_size(num_bytes)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes != self._file_bytes:
            raise BundleError(f"{self.path}: expected {self._file_bytes} bytes of {self}, got {num_bytes}")

    def check_chunk(self, chunk: int) -> int:
        """Reads and checks one chunk, without keeping or mapping it.

        Args:
          chunk: in [0, num_chunks).

        Returns:
          How many bytes of values it has.

        Raises:
          BundleError: as `read_into`.
        """
        with self._open() as file:
            return self._read_chunk(file.fileno(), chunk, None)

    def _read_chunk(self, file: int, chunk: int, memory: np.ndarray | None) -> int:
        begin, end = chunk * _CHUNK_BYTES, min(self._file_bytes, (chunk + 1) * _CHUNK_BYTES)
        values_begin = min(end, max(begin, len(self._header)))
        header = memoryview(bytearray(values_begin - begin))
        if memory is None:
            values = memoryview(bytearray(end - values_begin))
        else:
            values = memory[values_begin - len(self._header) : end - len(self._header)].data
        digest = hashlib.sha256()
        for part, offset in ((header, begin), (values, values_begin)):
            self._read_whole(file, part, offset)
            digest.update(part)
        expected = self._digests[chunk * _DIGEST_BYTES : (chunk + 1) * _DIGEST_BYTES]
        if digest.digest() != expected:
            raise BundleError(
                f"{self.path}: damaged: bytes {begin} to {end}: expected sha256 {expected.hex()}, got "
                f"{digest.hexdigest()}"
            )
        return len(values)

    def _read_whole(self, file: int, out: memoryview, offset: int) -> None:
        num_read = 0
        while num_read < len(out):
            try:
                count = os.preadv(file, [out[num_read:]], offset + num_read)
            except OSError as error:
                raise BundleError(f"{self.path}: can't be read: {error.strerror or error}") from error
            if count == 0:
                raise BundleError(
                    f"{self.path}: truncated: expected {self._file_bytes} bytes, got {offset + num_read}"
                )
            num_read += count

    @functools.cached_property
    def _digests(self) -> bytes:
        path = self.path.with_name(digests_file(self.path.name))
        try:
            digests = read_file(path)
        except OSError as error:
            raise BundleError(f"{path}: can't be read: {error.strerror or error}") from error
        if len(digests) != self.num_chunks * _DIGEST_BYTES:
            raise BundleError(
                f"{path}: expected {self.num_chunks} digests of {_DIGEST_BYTES} bytes each, got "
                f"{len(digests)} bytes"
            )
        return digests

    def _open(self) -> io.FileIO:
        try:
            return open_file(self.path)
        except OSError as error:
            raise BundleError(f"{self.path}: can't be read: {error.strerror or error}") from error


class _Digests:
    """sha256 of a stream, and of each of its chunks."""

    def __init__(self) -> None:
        self.whole = hashlib.sha256()
        self._done: list[bytes] = []
        self._chunk = hashlib.sha256()
        self._room = _CHUNK_BYTES  # bytes that the chunk still takes

    def update(self, data: memoryview) -> None:
        self.whole.update(data)
        while data:
            part, data = data[: self._room], data[self._room :]
            self._chunk.update(part)
            self._room -= len(part)
            if not self._room:
                self._end_chunk()

    def chunks(self) -> bytes:
        """Digests of all chunks, end to end; ends the stream."""
        if self._room < _CHUNK_BYTES:
            self._end_chunk()
        return b"".join(self._done)

    def _end_chunk(self) -> None:
        self._done.append(self._chunk.digest())
        self._chunk, self._room = hashlib.sha256(), _CHUNK_BYTES


def _header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
    """What numpy writes before such an array, padded so that the data begin at a multiple of 64 bytes."""
    descr = dtype.newbyteorder("<").str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}".encode()
    num_before = len(_MAGIC) + 2
    text += b" " * (-(num_before + len(text) + 1) % ALIGNMENT) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


def _text(header: bytes) -> str:
    """The readable part of a header."""
    if not header.startswith(_MAGIC):
        return f"bytes {header[:16]!r}"
    return header[len(_MAGIC) + 2 :].decode("latin-1").strip()
