"""Requests refused for their size: before they are parsed, where parsing would multiply it."""

from __future__ import annotations

from xlarank.errors import RequestError
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.config import LimitConfig

__all__ = ["check_message", "check_request", "check_structure"]

_MIB = 2**20

_UNSCANNED_BYTES = _MIB
"""A message up to here takes at most 45 MiB parsed, whatever it holds (measured). Most are no larger."""

_FIELDS_AN_INPUT = 4
"""Outermost fields for each input that a request may have: its description, its contents, outputs."""

_LENGTH_DELIMITED = 2
_RAW_TAG = messages.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


def check_message(data: bytes, limits: LimitConfig) -> None:
    """Refuses a serialised ModelInferRequest that would take far more memory than its own bytes.

    Reads the tags and lengths of its outermost fields, half a microsecond each and no more of them than the
    limits allow. What isn't well formed is left to the parser.

    Raises:
      RequestError: for too many fields, or too much beside raw contents.
    """
    end = len(data)
    if end <= _UNSCANNED_BYTES:
        return
    max_fields = _FIELDS_AN_INPUT * limits.max_inputs
    position = num_fields = raw_bytes = 0
    while position < end - 1:
        num_fields += 1
        if num_fields > max_fields:
            raise RequestError(f"expected at most {max_fields} fields, got more")
        tag, size = data[position], data[position + 1]
        position += 2
        if tag & 0x87 != _LENGTH_DELIMITED or tag == _LENGTH_DELIMITED:
            # Every field of ours is of this kind and has a tag of one byte. Whatever else is there counts as
            # structure, up to the end.
            break
        if size >= 0x80:
            size, position = _varint(data, position - 1)
        if tag == _RAW_TAG and position + size <= end:
            raw_bytes += size
        position += size
    check_structure(end - raw_bytes, limits, "beside raw_input_contents")


def check_structure(num_bytes: int, limits: LimitConfig, where: str) -> None:
    """Refuses more of what takes far more memory parsed than sent; RequestError.

    Args:
      num_bytes: of it.
      limits: of ranking requests.
      where: which bytes these are, in words.
    """
    if num_bytes > limits.max_structure_mib * _MIB:
        raise RequestError(
            f"expected at most {limits.max_structure_mib} MiB {where}, got {num_bytes} bytes; tensors are "
            f"larger sent typed, or as JSON, than raw"
        )


def check_request(request: messages.ModelInferRequest, limits: LimitConfig) -> None:
    """Refuses a parsed request with too much in it; RequestError says what."""
    for what, count, most in (
        ("inputs", len(request.inputs), limits.max_inputs),
        ("outputs", len(request.outputs), limits.max_inputs),
        ("raw_input_contents", len(request.raw_input_contents), limits.max_inputs),
        ("parameters", len(request.parameters), limits.max_parameters),
    ):
        if count > most:
            raise RequestError(f"expected at most {most} {what}, got {count}")
    for name in ("id", "model_name", "model_version"):
        size = len(getattr(request, name).encode())
        if size > limits.max_id_bytes:
            raise RequestError(f"{name}: expected at most {limits.max_id_bytes} bytes, got {size}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A length and where it ends; past the end of `data` if it is cut short or too long."""
    value = shift = 0
    while position < len(data) and shift < 35:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(data)
