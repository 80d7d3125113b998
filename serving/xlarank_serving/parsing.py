"""Messages that clients send, parsed where what is wrong with them can be said: `parse`, `unary_handler`."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from xlarank.errors import RequestError
from xlarank_serving.config import LimitConfig
from xlarank_serving.limits import check_message
from xlarank_serving.status import answering
from xlarank_serving.threads import on_threads

__all__ = ["parse", "unary_handler"]

_Message = TypeVar("_Message", bound=Message)


def parse(message: type[_Message], data: bytes, limits: LimitConfig | None = None) -> _Message:
    """A message of its bytes.

    It stands in for a deserializer of gRPC's, which would answer a malformed message INTERNAL.

    Args:
      message: its type.
      data: serialised.
      limits: of ranking requests, the one message that takes far more memory parsed; None for others.

    Raises:
      RequestError: for bytes that aren't such a message, or one beyond the limits.
    """
    if limits is not None:
        check_message(data, limits)
    try:
        return message.FromString(data)
    except DecodeError as error:
        name = message.DESCRIPTOR.name
        raise RequestError(f"expected a {name}, got {len(data)} bytes that aren't one: {error}") from None


def unary_handler(
    messages: Any,
    name: str,
    method: Callable[[Any, Any], Any],
    pool: concurrent.futures.ThreadPoolExecutor | None = None,
    *,
    limits: LimitConfig | None = None,
    types: tuple[type[Message], type[Message]] | None = None,
) -> grpc.RpcMethodHandler:
    """gRPC's handler of an RPC with one request and one response; its exceptions become statuses.

    Args:
      messages: the module of the messages `<name>Request` and `<name>Response`.
      name: of the RPC.
      method: from a request and the call's context to the response.
      pool: threads that it runs on; the server's by default.
      limits: see `parse`.
      types: of request and response, where they aren't named after the RPC.
    """
    request_type, response_type = types or [
        getattr(messages, f"{name}{end}") for end in ("Request", "Response")
    ]

    def parse_and_call(data: bytes, context: grpc.ServicerContext) -> Any:
        return method(parse(request_type, data, limits), context)

    behavior = answering(parse_and_call)
    return grpc.unary_unary_rpc_method_handler(
        behavior if pool is None else on_threads(behavior, pool),
        response_serializer=response_type.SerializeToString,
    )
