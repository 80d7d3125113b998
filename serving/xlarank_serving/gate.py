"""Calls turned away before any thread is taken for them: `Gate`, `AdminGate`."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

import grpc

from xlarank.errors import OverloadError, UnavailableError, XlarankError
from xlarank_serving.arrival import stamp_arrival
from xlarank_serving.layout import INFER_METHOD, SERVICE_NAME, STREAM_METHOD
from xlarank_serving.parsing import refusal_handler
from xlarank_serving.receiving import ReceiveWatch
from xlarank_serving.service import InferenceService
from xlarank_serving.threads import AdminThreads, ServerThreads

__all__ = ["AdminGate", "Gate"]

_RETRY_STREAM_SECONDS = 1.0


class Gate(grpc.GenericRpcHandler):
    """The service of some handlers; it turns ranking requests away unread.

    - From the moment of the stop: gRPC itself would leave those that arrive then without an answer, then
      cancel them, and clients retry on UNAVAILABLE only.
    - While no queue has room. To read a request and refuse it then costs as much as to read one that is
      answered, and under overload most are refused: they would take the cores from those that aren't, and
      these would wait where nothing counts it, for a thread that reads them. So one that no queue would
      refuse is turned away too, without candidates or wrong: unread nobody knows, RESOURCE_EXHAUSTED says
      nothing of the request itself, and it is answered as what it is when it comes again.
    - While max_concurrent_rpcs of them are in progress or wait for a thread.
    - Streams past the server's number of them: each holds threads.
    """

    def __init__(
        self,
        service: InferenceService,
        handlers: dict[str, grpc.RpcMethodHandler],
        threads: ServerThreads,
        streams: ReceiveWatch,
    ) -> None:
        """
        Args:
          service: ranks.
          handlers: a handler a method, by name.
          threads: that they run on.
          streams: told of streams that are refused: who reads nothing makes room for who comes again.
        """
        self._service = service
        self._threads = threads
        self._streams = streams
        self._inner = grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """For gRPC, when a call's headers have come; called on its one thread that hands calls out, so that
        the count of streams is exact."""
        stamp_arrival()
        refusal = None
        if handler_call_details.method == INFER_METHOD:
            refusal = self._service.refusal()
        elif handler_call_details.method == STREAM_METHOD:
            refusal = self._refusal_of_stream()
        if refusal is not None:
            return refusal_handler(refusal, self._threads.refusals)
        return self._inner.service(handler_call_details)

    def _refusal_of_stream(self) -> XlarankError | None:
        if self._service.is_stopping:
            refusal: XlarankError = UnavailableError("the server is stopping")
        elif self._threads.streams.num_open < self._threads.max_streams:
            return None
        else:
            self._streams.count_refused()
            refusal = OverloadError(
                f"the server has {self._threads.max_streams} open streams of ModelStreamInfer, its limit; "
                f"send more over one of them, or use ModelInfer",
                retry_after_seconds=_RETRY_STREAM_SECONDS,
            )
        self._service.refusals.count(refusal)
        return refusal


class AdminGate(grpc.ServerInterceptor):
    """Turns administrative calls away while as many of their kind wait as may."""

    def __init__(self, threads: AdminThreads, refusals: concurrent.futures.ThreadPoolExecutor) -> None:
        """
        Args:
          threads: that such calls run on.
          refusals: threads that say no.
        """
        self._threads = threads
        self._refusals = refusals

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, or one that answers with the refusal."""
        refusal = self._threads.refusal(handler_call_details.method.rpartition("/")[2])
        if refusal is not None:
            return refusal_handler(refusal, self._refusals)
        return continuation(handler_call_details)
