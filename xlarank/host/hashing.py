"""The hash of ids: XXH64, exactly as published.

https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. A string is hashed as its bytes, an int64
as its 8 bytes, little-endian. Native where the kernel is built; the NumPy form beside it is the reference
and gives the same bits.
"""

from __future__ import annotations

import numpy as np

from xlarank.host._extension import native
from xlarank.spec import StringColumn

__all__ = ["hash_int64", "hash_int64_numpy", "hash_strings", "hash_strings_numpy"]

_PRIME_1 = 0x9E3779B185EBCA87
_PRIME_2 = 0xC2B2AE3D27D4EB4F
_PRIME_3 = 0x165667B19E3779F9
_PRIME_4 = 0x85EBCA77C2B2AE63
_PRIME_5 = 0x27D4EB2F165667C5
_MASK = 2**64 - 1


def hash_int64(values: np.ndarray, seed: int) -> np.ndarray:
    """Hashes integers.

    Args:
      values: [V] int64.
      seed: in [0, 2**64).

    Returns:
      [V] uint64.
    """
    if native is None:
        return hash_int64_numpy(values, seed)
    return native.hash_int64(np.ascontiguousarray(values, np.int64), seed)


def hash_strings(column: StringColumn, seed: int) -> np.ndarray:
    """Hashes strings, without a Python loop over them.

    Args:
      column: V strings.
      seed: in [0, 2**64).

    Returns:
      [V] uint64.

    Raises:
      ValueError: if the offsets don't rise from 0 to the number of bytes.
    """
    if native is None:
        return hash_strings_numpy(column, seed)
    blob = np.ascontiguousarray(column.blob, np.uint8)
    return native.hash_strings(blob, np.ascontiguousarray(column.offsets, np.int64), seed)


def hash_int64_numpy(values: np.ndarray, seed: int) -> np.ndarray:
    """`hash_int64` in NumPy: the reference."""
    data = np.ascontiguousarray(values, "<i8").reshape(-1, 1).view(np.uint8)
    return _xxh64(data, seed)


def hash_strings_numpy(column: StringColumn, seed: int) -> np.ndarray:
    """`hash_strings` in NumPy: the reference. One pass for each distinct length."""
    sizes = np.diff(column.offsets)
    if sizes.size and (sizes.min() < 0 or column.offsets[0] != 0 or column.offsets[-1] != len(column.blob)):
        raise ValueError(f"expected string offsets that rise from 0 to {len(column.blob)}")
    hashes = np.empty(len(sizes), np.uint64)
    if not len(sizes):
        return hashes
    order = np.argsort(sizes, kind="stable")
    lengths, begins = np.unique(sizes[order], return_index=True)
    for length, members in zip(lengths, np.split(order, begins[1:]), strict=True):
        indices = column.offsets[:-1][members][:, None] + np.arange(length)
        hashes[members] = _xxh64(column.blob[indices], seed)
    return hashes


def _xxh64(data: np.ndarray, seed: int) -> np.ndarray:
    """XXH64 of each row of `data`, [n, bytes] uint8 → [n] uint64."""
    num, length = data.shape
    position = 0
    if length >= 32:
        starts = (seed + _PRIME_1 + _PRIME_2, seed + _PRIME_2, seed, seed - _PRIME_1)
        lanes = [np.full(num, start & _MASK, np.uint64) for start in starts]
        while position + 32 <= length:
            for i in range(4):
                lanes[i] = _round(lanes[i], _word(data, position + 8 * i, 8))
            position += 32
        a, b, c, d = lanes
        state = _rotl(a, 1) + _rotl(b, 7) + _rotl(c, 12) + _rotl(d, 18)
        for lane in lanes:
            state = (state ^ _round(np.zeros_like(lane), lane)) * np.uint64(_PRIME_1) + np.uint64(_PRIME_4)
    else:
        state = np.full(num, (seed + _PRIME_5) & _MASK, np.uint64)
    state = state + np.uint64(length)
    while position + 8 <= length:
        state = state ^ _round(np.zeros_like(state), _word(data, position, 8))
        state = _rotl(state, 27) * np.uint64(_PRIME_1) + np.uint64(_PRIME_4)
        position += 8
    if position + 4 <= length:
        state = state ^ (_word(data, position, 4) * np.uint64(_PRIME_1))
        state = _rotl(state, 23) * np.uint64(_PRIME_2) + np.uint64(_PRIME_3)
        position += 4
    for i in range(position, length):
        state = state ^ (data[:, i].astype(np.uint64) * np.uint64(_PRIME_5))
        state = _rotl(state, 11) * np.uint64(_PRIME_1)
    state = (state ^ (state >> np.uint64(33))) * np.uint64(_PRIME_2)
    state = (state ^ (state >> np.uint64(29))) * np.uint64(_PRIME_3)
    return state ^ (state >> np.uint64(32))


def _word(data: np.ndarray, position: int, size: int) -> np.ndarray:
    """Little-endian unsigned word of `size` bytes at a byte position of each row: [n] uint64."""
    word = np.ascontiguousarray(data[:, position : position + size]).view(f"<u{size}")
    return word[:, 0].astype(np.uint64)


def _rotl(values: np.ndarray, by: int) -> np.ndarray:
    return (values << np.uint64(by)) | (values >> np.uint64(64 - by))


def _round(lane: np.ndarray, word: np.ndarray) -> np.ndarray:
    return _rotl(lane + word * np.uint64(_PRIME_2), 31) * np.uint64(_PRIME_1)
