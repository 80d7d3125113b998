"""Messages that clients send, parsed where what is wrong with them can be said: `parsing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from xlarank.errors import RequestError

__all__ = ["parsing"]


def parsing(
    message: type[Message], method: Callable[[Any, Any], Any]
) -> Callable[[bytes, grpc.ServicerContext], Any]:
    """Wraps an RPC method so that it takes a message's bytes.

    It stands in for a deserializer of gRPC's, which would answer a malformed message INTERNAL.

    Args:
      message: what the method takes.
      method: from a `message` and the call's context to the answer.

    Returns:
      The method from bytes; it raises RequestError for bytes that aren't such a message.
    """

    def parse_and_call(data: bytes, context: grpc.ServicerContext) -> Any:
        try:
            request = message.FromString(data)
        except DecodeError as error:
            name = message.DESCRIPTOR.name
            raise RequestError(f"expected a {name}, got {len(data)} bytes that aren't one: {error}") from None
        return method(request, context)

    return parse_and_call
