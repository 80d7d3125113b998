"""Requests refused for their size: before they are parsed, where parsing would multiply it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from xlarank.errors import RequestError
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.config import LimitConfig

__all__ = ["check_message", "check_request"]

_MIB = 2**20

_UNSCANNED_BYTES = 2**18
"""A message up to here takes at most 12 MiB parsed (measured: 45 times its size). Most are no larger."""

# Field numbers of ModelInferRequest.
_PARAMETERS = messages.ModelInferRequest.PARAMETERS_FIELD_NUMBER
_INPUTS = messages.ModelInferRequest.INPUTS_FIELD_NUMBER
_OUTPUTS = messages.ModelInferRequest.OUTPUTS_FIELD_NUMBER
_RAW = messages.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_message(data: bytes, limits: LimitConfig) -> None:
    """Refuses a serialised ModelInferRequest that would take far more memory than its own bytes.

    Reads the tags and lengths of its outermost fields, no more than the limits allow of them. What isn't well
    formed is left to the parser.

    Raises:
      RequestError: for too many inputs or parameters, or too much beside raw contents.
    """
    if len(data) <= _UNSCANNED_BYTES:
        return
    counts: Counter[int] = Counter()
    raw_bytes = 0
    for position, (number, size) in enumerate(_fields(data)):
        counts[number] += 1
        raw_bytes += size if number == _RAW else 0
        _check_counts(max(counts[_INPUTS], counts[_OUTPUTS]), counts[_RAW], counts[_PARAMETERS], limits)
        if position > 4 * limits.max_inputs:
            raise RequestError(f"expected at most {4 * limits.max_inputs} fields, got more")
    structure = len(data) - raw_bytes
    if structure > limits.max_structure_mib * _MIB:
        raise RequestError(
            f"expected at most {limits.max_structure_mib} MiB beside raw_input_contents, got {structure} "
            f"bytes; tensors are larger sent typed, in contents, than raw"
        )


def check_request(request: messages.ModelInferRequest, limits: LimitConfig) -> None:
    """Refuses a parsed request with too much in it; RequestError says what."""
    _check_counts(
        max(len(request.inputs), len(request.outputs)),
        len(request.raw_input_contents),
        len(request.parameters),
        limits,
    )
    for name in ("id", "model_name", "model_version"):
        size = len(getattr(request, name))
        if size > limits.max_id_bytes:
            raise RequestError(f"{name}: expected at most {limits.max_id_bytes} characters, got {size}")


def _check_counts(num_inputs: int, num_raw: int, num_parameters: int, limits: LimitConfig) -> None:
    if max(num_inputs, num_raw) > limits.max_inputs:
        raise RequestError(f"expected at most {limits.max_inputs} inputs, got more")
    if num_parameters > limits.max_parameters:
        raise RequestError(f"expected at most {limits.max_parameters} parameters, got more")


def _fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Number and size of each outermost field of a message, up to where it isn't one."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind == _VARINT:
            begin = position
            _, position = _varint(data, position)
            size, position = position - begin, begin
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:  # groups: ours has none
            return
        if position + size > end:
            return
        yield tag >> 3, size
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A value and where it ends; past the end of `data` if it is cut short or too long."""
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(data) + 1
