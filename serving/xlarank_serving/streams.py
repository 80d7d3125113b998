"""ModelStreamInfer, many requests over one call: `InferStreams`.

Answers come in the order of a stream's requests, as Triton's do. A stream has two threads of its own, none of
which ranks: one reads requests and hands them to the engine, one writes answers. So an idle stream holds up
nobody, and both the streams of a server and the requests under way on each are bounded: past the latter the
server reads on when the oldest is answered and written, and HTTP/2 makes the caller wait.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator

import grpc

from xlarank.errors import UnavailableError
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.arrival import arrival_of
from xlarank_serving.service import InferenceService, RankCall
from xlarank_serving.status import answering_stream, let_go, retry_after_ms, status_of
from xlarank_serving.threads import ServerThreads, on_threads

__all__ = ["InferStreams"]

_MAX_IN_FLIGHT = 32
"""Requests of one stream that are read and not yet answered."""

_FINAL = "triton_final_response"
"""Response parameter that Triton's clients look for: no more answers to this request."""

_WANTS_FINAL = "triton_enable_empty_final_response"


class InferStreams:
    """Answers ModelStreamInfer with an `InferenceService`. Any thread."""

    def __init__(self, service: InferenceService, threads: ServerThreads) -> None:
        """
        Args:
          service: ranks.
          threads: a thread of `streams` and one of `stream_readers` is held by each open stream.
        """
        self._service = service
        self._threads = threads
        self._lock = threading.Lock()
        self._open: set[_Stream] = set()  # guarded by _lock
        self._is_stopping = False  # guarded by _lock; moves one way

    def handler(self) -> grpc.RpcMethodHandler:
        """For the method's name."""
        return grpc.stream_stream_rpc_method_handler(
            on_threads(answering_stream(self.model_stream_infer), self._threads.streams),
            response_serializer=messages.ModelStreamInferResponse.SerializeToString,
        )

    def model_stream_infer(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[messages.ModelStreamInferResponse]:
        """One answer a request, errors included; UNAVAILABLE ends the streams of a server that stops."""
        stream = _Stream()
        with self._lock:
            if self._is_stopping:
                raise UnavailableError("the server is stopping")
            self._open.add(stream)
        try:
            if not context.add_callback(stream.abandon):
                stream.abandon()
            self._threads.stream_readers.submit(self._read, requests, context, stream)
            while (call := stream.oldest()) is not None:
                yield self._finish(call) if isinstance(call, RankCall) else call
                stream.remove_oldest()
        finally:
            with self._lock:
                self._open.discard(stream)
        if stream.is_stopped:
            raise UnavailableError("the server is stopping")

    def stop(self) -> None:
        """Streams end as soon as what was read of them is answered."""
        with self._lock:
            self._is_stopping = True
            streams = list(self._open)
        for stream in streams:
            stream.stop()

    def _read(self, requests: Iterator[bytes], context: grpc.ServicerContext, stream: _Stream) -> None:
        try:
            while stream.wait_for_room():
                data = next(requests, None)
                if data is None:
                    break
                stream.expect()
                stream.add(self._begin(data, context))
        except grpc.RpcError as error:  # the caller left: the iterator's way to say so; `abandon` was called
            let_go(error)  # gRPC's state of the call keeps it
        finally:
            stream.end_requests()

    def _begin(
        self, data: bytes, context: grpc.ServicerContext
    ) -> RankCall | messages.ModelStreamInferResponse:
        arrival = arrival_of(context, is_traced=self._service.is_observed, is_now=True)
        request = messages.ModelInferRequest()
        try:
            message = self._service.read(data, arrival)
            request = message.request
            if self._service.is_stopping:
                raise UnavailableError("the server is stopping")
            return self._service.begin(message, arrival)
        except Exception as error:
            return _failure(request, error)

    def _finish(self, call: RankCall) -> messages.ModelStreamInferResponse:
        try:
            response = self._service.finish(call)
        except Exception as error:
            return _failure(call.request, error)
        if _WANTS_FINAL in call.request.parameters:
            response.parameters[_FINAL].bool_param = True
        return messages.ModelStreamInferResponse(infer_response=response)


class _Stream:
    """What was read of one stream and isn't answered yet. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All guarded by _changed; the flags move one way.
        self._calls: collections.deque[RankCall | messages.ModelStreamInferResponse] = collections.deque()
        self._is_expecting = False  # `add` will come
        self._is_read = False  # no more requests will come
        self._is_abandoned = False
        self.is_stopped = False

    def wait_for_room(self) -> bool:
        """Waits until one more may be read; False when none should be."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._calls) < _MAX_IN_FLIGHT or self._is_abandoned)
            return not self._is_abandoned

    def expect(self) -> None:
        """A request has come and is being read: a stop waits for it."""
        with self._changed:
            self._is_expecting = True

    def add(self, call: RankCall | messages.ModelStreamInferResponse) -> None:
        with self._changed:
            self._calls.append(call)
            self._is_expecting = False
            is_abandoned = self._is_abandoned
            self._changed.notify_all()
        if is_abandoned and isinstance(call, RankCall):
            call.cancel()

    def end_requests(self) -> None:
        with self._changed:
            self._is_read = True
            self._changed.notify_all()

    def stop(self) -> None:
        """What was read is answered, then `oldest` gives None."""
        with self._changed:
            self.is_stopped = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """The caller has left, or the call is over: what is under way is cancelled."""
        with self._changed:
            self._is_abandoned = True
            calls = list(self._calls)
            self._changed.notify_all()
        for call in calls:
            if isinstance(call, RankCall):
                call.cancel()

    def oldest(self) -> RankCall | messages.ModelStreamInferResponse | None:
        """Waits for the next one to answer; None at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._calls
                    or self._is_read
                    or self._is_abandoned
                    or (self.is_stopped and not self._is_expecting)
                )
            )
            return self._calls[0] if self._calls else None

    def remove_oldest(self) -> None:
        """It was answered and written."""
        with self._changed:
            self._calls.popleft()
            self._changed.notify_all()


def _failure(request: messages.ModelInferRequest, error: Exception) -> messages.ModelStreamInferResponse:
    code, details = status_of(error)
    response = messages.ModelStreamInferResponse(error_message=details)
    response.infer_response.id = request.id
    response.infer_response.parameters["xlarank_status"].string_param = code.name
    if (milliseconds := retry_after_ms(error)) is not None:
        response.infer_response.parameters["xlarank_retry_after_ms"].int64_param = milliseconds
    let_go(error)
    return response
