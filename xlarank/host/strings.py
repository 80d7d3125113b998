"""BYTES tensors of the Open Inference Protocol to string columns."""

from __future__ import annotations

import struct

from xlarank.host._extension import native
from xlarank.spec import StringColumn

__all__ = ["split_bytes_tensor", "split_bytes_tensor_python"]


def split_bytes_tensor(raw: bytes | bytearray | memoryview) -> StringColumn:
    """Splits the raw contents of a BYTES tensor.

    Args:
      raw: for each element 4 bytes of length, little-endian unsigned, then that many bytes.

    Returns:
      One string an element, copied.

    Raises:
      ValueError: for an incomplete length, or an element that runs past the end.
    """
    if native is None:
        return split_bytes_tensor_python(raw)
    blob, offsets = native.split_bytes_tensor(raw)
    return StringColumn(blob, offsets)


def split_bytes_tensor_python(raw: bytes | bytearray | memoryview) -> StringColumn:
    """`split_bytes_tensor` in Python: the reference."""
    data = bytes(raw)
    parts: list[bytes] = []
    position = 0
    while position < len(data):
        left = len(data) - position
        if left < 4:
            raise ValueError(f"element {len(parts)}: expected 4 bytes of length, {left} are left")
        (size,) = struct.unpack_from("<I", data, position)
        position += 4
        if size > left - 4:
            raise ValueError(f"element {len(parts)}: expected {size} bytes, {left - 4} are left")
        parts.append(data[position : position + size])
        position += size
    return StringColumn.from_strings(parts)
