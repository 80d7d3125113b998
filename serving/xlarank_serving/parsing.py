"""Messages that clients send, parsed where what is wrong with them can be said: `parse`, `unary_handler`,
`refusal_handler`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from xlarank.errors import RequestError
from xlarank.host import RawMessage
from xlarank_serving._proto.grpc_service_pb2 import ModelInferRequest
from xlarank_serving.config import LimitConfig
from xlarank_serving.limits import check_message
from xlarank_serving.status import answering
from xlarank_serving.threads import on_threads

__all__ = ["InferMessage", "parse", "read_infer_message", "refusal_handler", "unary_handler"]

_Message = TypeVar("_Message", bound=Message)


@dataclasses.dataclass(frozen=True, slots=True)
class InferMessage:
    """A ranking request as far as it was parsed."""

    request: ModelInferRequest
    """All of it, or all but its tensors."""

    raw: RawMessage | None = None
    """Where the tensors are that `request` hasn't."""

    def parsed(self) -> ModelInferRequest:
        """All of it, parsed."""
        return self.request if self.raw is None else parse(ModelInferRequest, self.raw.data)

    def without_tensors(self) -> ModelInferRequest:
        """What an answer takes of it: names, id and parameters.

        A copy if tensors were parsed: fields that are cleared keep their memory.
        """
        if self.raw is not None:
            return self.request
        request = ModelInferRequest(
            model_name=self.request.model_name, model_version=self.request.model_version, id=self.request.id
        )
        for name, parameter in self.request.parameters.items():
            request.parameters[name].CopyFrom(parameter)
        return request


def parse(message: type[_Message], data: bytes) -> _Message:
    """A message of its bytes.

    It stands in for a deserializer of gRPC's, which would answer a malformed message INTERNAL.

    Args:
      message: its type.
      data: serialised.

    Raises:
      RequestError: for bytes that aren't such a message.
    """
    try:
        return message.FromString(data)
    except DecodeError as error:
        name = message.DESCRIPTOR.name
        raise RequestError(f"expected a {name}, got {len(data)} bytes that aren't one: {error}") from None


def read_infer_message(data: bytes, limits: LimitConfig) -> InferMessage:
    """A ranking request of its bytes; its tensors aren't parsed if they can be read in place.

    Raises:
      RequestError: as `parse`, and for one that would take far more memory parsed than it has bytes.
    """
    check_message(data, limits)
    raw = RawMessage.read(data)
    if raw is not None and raw.num_inputs <= limits.max_inputs:
        with contextlib.suppress(DecodeError):  # the parser of the whole has the words for it
            return InferMessage(ModelInferRequest.FromString(raw.rest), raw)
    return InferMessage(parse(ModelInferRequest, data))


def unary_handler(
    messages: Any,
    name: str,
    method: Callable[[Any, Any], Any],
    pool: concurrent.futures.ThreadPoolExecutor | None = None,
    *,
    read: Callable[[bytes], Any] | None = None,
    types: tuple[type[Message], type[Message]] | None = None,
) -> grpc.RpcMethodHandler:
    """gRPC's handler of an RPC with one request and one response; its exceptions become statuses.

    Args:
      messages: the module of the messages `<name>Request` and `<name>Response`.
      name: of the RPC.
      method: from a request and the call's context to the response.
      pool: threads that it runs on; the server's by default.
      read: makes the request of its bytes; `parse` by default.
      types: of request and response, where they aren't named after the RPC.
    """
    request_type, response_type = types or [
        getattr(messages, f"{name}{end}") for end in ("Request", "Response")
    ]

    read_request = read or functools.partial(parse, request_type)

    def parse_and_call(data: bytes, context: grpc.ServicerContext) -> Any:
        return method(read_request(data), context)

    behavior = answering(parse_and_call)
    return grpc.unary_unary_rpc_method_handler(
        behavior if pool is None else on_threads(behavior, pool),
        response_serializer=response_type.SerializeToString,
    )


def refusal_handler(error: Exception, pool: concurrent.futures.ThreadPoolExecutor) -> grpc.RpcMethodHandler:
    """gRPC's handler that answers a call of any kind with an error, without reading a message of it.

    Args:
      error: becomes the status.
      pool: threads that say so.
    """

    def refuse(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterable[bytes]:
        raise error

    # Of streams: it is called before a message is there, and answers any kind of method.
    return grpc.stream_stream_rpc_method_handler(on_threads(answering(refuse), pool))
