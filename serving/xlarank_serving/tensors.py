"""One tensor of a ModelInfer message to a numpy array or a string column: `from_raw`, `from_typed`.

Every datatype of the protocol that holds the input's values without loss is taken, BF16 included:

    input     takes                                       and refuses
    FP32      FP32, FP64, FP16, BF16, BOOL                integers
    INT64     INT8 to INT64, UINT8 to UINT64, BOOL        floats; a UINT64 of 2**63 or more
    lengths   INT8 to INT64, UINT8 to UINT64              floats, BOOL; what int32 doesn't hold
    BYTES     BYTES                                       everything else

FP64 is rounded to float32. FP16 and BF16 have no field of typed contents and travel raw. Every declared size
is compared with what came before anything is allocated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from xlarank.errors import FeatureError
from xlarank.host import split_bytes_tensor
from xlarank.spec import StringColumn
from xlarank_serving.layout import WireInput

__all__ = ["DTYPES", "from_raw", "from_typed"]

DTYPES = {
    "BOOL": np.dtype("u1"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Raw contents by datatype, BYTES aside."""

_SIGNED, _UNSIGNED = ("int_contents", np.dtype(np.int32)), ("uint_contents", np.dtype(np.uint32))

# The field of typed contents and the type that it holds.
_TYPED_FIELDS = {
    "BOOL": ("bool_contents", np.dtype(np.uint8)),
    "UINT8": _UNSIGNED,
    "UINT16": _UNSIGNED,
    "UINT32": _UNSIGNED,
    "UINT64": ("uint64_contents", np.dtype(np.uint64)),
    "INT8": _SIGNED,
    "INT16": _SIGNED,
    "INT32": _SIGNED,
    "INT64": ("int64_contents", np.dtype(np.int64)),
    "FP32": ("fp32_contents", np.dtype(np.float32)),
    "FP64": ("fp64_contents", np.dtype(np.float64)),
}

_BYTES_FIELD = "bytes_contents"

_FIELD_DATATYPES = {
    "bool_contents": "BOOL",
    "int_contents": "INT32",
    "int64_contents": "INT64",
    "uint_contents": "UINT32",
    "uint64_contents": "UINT64",
    "fp32_contents": "FP32",
    "fp64_contents": "FP64",
    _BYTES_FIELD: "BYTES",
}


def from_raw(wire: WireInput, datatype: str, shape: tuple[int, ...], raw: bytes) -> Any:
    """Reads an entry of raw_input_contents.

    Args:
      wire: the input.
      datatype: one of `wire.accepted`.
      shape: one that `wire` allows.
      raw: little-endian, row-major.

    Returns:
      An array of `wire.datatype`, a view of the bytes if that is `datatype`; a StringColumn for BYTES.

    Raises:
      FeatureError: if the size isn't that of the shape, or a value doesn't fit.
    """
    num_elements = math.prod(shape)  # Python ints: a hostile shape can't overflow
    if datatype == "BYTES":
        try:
            column = split_bytes_tensor(raw)
        except ValueError as error:
            raise FeatureError(
                f"{wire.where}: expected strings, each 4 bytes of length and its bytes; {error}"
            ) from None
        return _checked_strings(wire, column, num_elements)
    dtype = DTYPES[datatype]
    if len(raw) != num_elements * dtype.itemsize:
        raise FeatureError(
            f"{wire.where}: input byte size mismatch: expected {num_elements * dtype.itemsize} bytes for "
            f"{datatype} of shape {list(shape)}, got {len(raw)}"
        )
    array = np.frombuffer(raw, dtype)
    if datatype != wire.datatype:
        array = _converted(wire, datatype, array)
    return array if len(shape) == 1 else array.reshape(shape)


def from_typed(wire: WireInput, datatype: str, shape: tuple[int, ...], contents: Any) -> Any:
    """Reads typed contents, an InferTensorContents; see `from_raw`. The result is a copy.

    Raises:
      FeatureError: if the values are in a field of another datatype, fewer or more than the shape has, or
        don't fit into the datatype or the input.
    """
    is_strings = datatype == "BYTES"
    field_name, field_type = (_BYTES_FIELD, None) if is_strings else _TYPED_FIELDS.get(datatype, ("", None))
    if not field_name:
        raise FeatureError(
            f"{wire.where}: expected {datatype} in raw_input_contents, got typed contents; the protocol has "
            f"no field for {datatype}"
        )
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field_name:
            raise FeatureError(
                f"{wire.where}: unexpected explicit tensor data for input tensor {wire.name!r} of type "
                f"{_FIELD_DATATYPES[descriptor.name]!r}, expected datatype {datatype!r}"
            )
    values = getattr(contents, field_name)
    num_elements = math.prod(shape)
    if num_elements and not values:
        raise FeatureError(
            f"{wire.where}: unable to find data for input tensor {wire.name!r}: expected {num_elements} "
            f"elements in contents or raw_input_contents, got none"
        )
    if is_strings:
        return _checked_strings(wire, StringColumn.from_strings(values), num_elements)
    if len(values) != num_elements:
        raise FeatureError(
            f"{wire.where}: expected {num_elements} elements for {datatype} of shape {list(shape)}, "
            f"got {len(values)}"
        )
    assert field_type is not None
    array = np.fromiter(values, field_type, count=len(values))
    own_type = DTYPES[datatype]
    if field_type.itemsize > own_type.itemsize:
        limits = np.iinfo(own_type)
        _check_range(wire, array, int(limits.min), int(limits.max), f"{datatype} values")
        array = array.astype(own_type)
    if datatype != wire.datatype:
        array = _converted(wire, datatype, array)
    return array.reshape(shape)


def _converted(wire: WireInput, datatype: str, array: np.ndarray) -> np.ndarray:
    """An array of the input's own datatype, [n] as `array` is."""
    if datatype == "BOOL":
        _check_range(wire, array, 0, 1, "BOOL values of 0 or 1")
    elif datatype == "UINT64":
        _check_range(wire, array, 0, 2**63 - 1, "integers that INT64 holds")
    elif datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if wire.datatype == "INT32":
        _check_range(wire, array, -(2**31), 2**31 - 1, "lengths that INT32 holds")
    with np.errstate(over="ignore"):  # beyond float32: infinite, which the check of contents refuses
        return array.astype(DTYPES[wire.datatype])


def _check_range(wire: WireInput, array: np.ndarray, low: int, high: int, expected: str) -> None:
    if not array.size or (int(array.min()) >= low and int(array.max()) <= high):
        return
    position = int(np.argmax((array < low) | (array > high)))
    raise FeatureError(f"{wire.where}: expected {expected}, got {array[position]} at position {position}")


def _checked_strings(wire: WireInput, column: StringColumn, num_elements: int) -> StringColumn:
    if len(column) != num_elements:
        raise FeatureError(
            f"{wire.where}: unexpected number of string elements: expected {num_elements}, got {len(column)}"
        )
    return column
