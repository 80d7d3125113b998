"""Messages that clients send, parsed where what is wrong with them can be said: `parsing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from xlarank.errors import RequestError
from xlarank_serving._proto.grpc_service_pb2 import ModelInferRequest
from xlarank_serving.config import LimitConfig
from xlarank_serving.limits import check_message, check_request

__all__ = ["parsing"]


def parsing(
    message: type[Message], method: Callable[[Any, Any], Any], limits: LimitConfig | None = None
) -> Callable[[bytes, grpc.ServicerContext], Any]:
    """Wraps an RPC method so that it takes a message's bytes.

    It stands in for a deserializer of gRPC's, which would answer a malformed message INTERNAL.

    Args:
      message: what the method takes.
      method: from a `message` and the call's context to the answer.
      limits: of ranking requests, the one message that takes far more memory parsed.

    Returns:
      The method from bytes; it raises RequestError for bytes that aren't such a message, or one
      beyond the limits.
    """
    bounds = limits if message is ModelInferRequest else None

    def parse_and_call(data: bytes, context: grpc.ServicerContext) -> Any:
        if bounds is not None:
            check_message(data, bounds)
        try:
            request = message.FromString(data)
        except DecodeError as error:
            name = message.DESCRIPTOR.name
            raise RequestError(f"expected a {name}, got {len(data)} bytes that aren't one: {error}") from None
        if bounds is not None:
            check_request(request, bounds)  # type: ignore[arg-type]
        return method(request, context)

    return parse_and_call
