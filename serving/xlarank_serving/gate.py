"""Calls turned away before any thread is taken: `Gate`."""

from __future__ import annotations

from typing import Any

import grpc

from xlarank.errors import OverloadError, UnavailableError
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.service import InferenceService
from xlarank_serving.status import answering
from xlarank_serving.threads import ServerThreads, on_threads

__all__ = ["Gate"]

_UNARY = f"/{SERVICE_NAME}/ModelInfer"
_STREAM = f"/{SERVICE_NAME}/ModelStreamInfer"

_RETRY_STREAM_SECONDS = 1.0


class Gate(grpc.GenericRpcHandler):
    """The service of some handlers; it turns ranking requests away from the moment of the stop.

    gRPC itself would leave those that arrive during a stop without an answer, then cancel them, and clients
    retry on UNAVAILABLE only. Streams past the server's number of them are turned away too: each holds
    threads. It looks a method up when its call arrives.
    """

    def __init__(
        self, service: InferenceService, handlers: dict[str, grpc.RpcMethodHandler], threads: ServerThreads
    ) -> None:
        self._service = service
        self._threads = threads
        self._inner = grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)
        self._refuse_unary = grpc.unary_unary_rpc_method_handler(
            on_threads(answering(_say_stopping), threads.control)
        )
        self._refuse_stream = grpc.stream_stream_rpc_method_handler(
            on_threads(answering(self._say_why_no_stream), threads.control)
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """For gRPC; called on its one thread that hands calls out, so that the count of streams is exact."""
        method = handler_call_details.method
        if method == _UNARY and self._service.is_stopping:
            return self._refuse_unary
        if method == _STREAM and (
            self._service.is_stopping or self._threads.streams.num_open >= self._threads.max_streams
        ):
            return self._refuse_stream
        return self._inner.service(handler_call_details)

    def _say_why_no_stream(self, requests: Any, context: grpc.ServicerContext) -> Any:
        if self._service.is_stopping:
            _say_stopping(requests, context)
        raise OverloadError(
            f"the server has {self._threads.max_streams} open streams of ModelStreamInfer, its limit; send "
            f"more over one of them, or use ModelInfer",
            retry_after_seconds=_RETRY_STREAM_SECONDS,
        )


def _say_stopping(request: Any, context: grpc.ServicerContext) -> Any:
    raise UnavailableError("the server is stopping")
