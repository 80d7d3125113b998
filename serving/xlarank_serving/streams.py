"""ModelStreamInfer, many requests over one call: `InferStreams`.

Answers come in the order of a stream's requests, as Triton's do. A stream has two threads of its own, none of
which ranks: one reads requests and hands them to the engine, one writes answers. So an idle stream holds up
nobody, and both the streams of a server and the requests under way on each are bounded: past the latter the
server reads on when the oldest is answered and written, and HTTP/2 makes the caller wait. Answers that wait
to be written count with all others that callers don't take. A stream without a request under way is ended,
and so is one whose caller doesn't take an answer: nobody keeps a place by doing nothing.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import threading
import weakref
from collections.abc import Iterator

import grpc

from xlarank.errors import DeadlineError, UnavailableError
from xlarank.runtime import Answer
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.arrival import arrival_of
from xlarank_serving.receiving import ReceiveWatch
from xlarank_serving.service import InferenceService, RankCall
from xlarank_serving.status import answering_stream, let_go, retry_after_ms, status_of
from xlarank_serving.threads import ServerThreads, on_threads
from xlarank_serving.unread import UnreadAnswers

__all__ = ["InferStreams"]

_MAX_IN_FLIGHT = 32
"""Requests of one stream that are read and not yet answered."""

_BUFFERED_BYTES = 64 * 2**10
"""What gRPC takes of a stream's answers before its caller does: it may hold them when the stream's threads
are through."""

_STOP_SECONDS = 1.0
"""What each answer has to be taken in while the server stops, which waits for streams."""

_FINAL = "triton_final_response"
"""Response parameter that Triton's clients look for: no more answers to this request."""

_WANTS_FINAL = "triton_enable_empty_final_response"


class InferStreams:
    """Answers ModelStreamInfer with an `InferenceService`. Any thread."""

    def __init__(
        self,
        service: InferenceService,
        threads: ServerThreads,
        unread: UnreadAnswers,
        watch: ReceiveWatch,
        *,
        max_idle_seconds: float = math.inf,
    ) -> None:
        """
        Args:
          service: ranks.
          threads: a thread of `streams` and one of `stream_readers` is held by each open stream.
          unread: bounds what streams hold unwritten.
          watch: of `streams`; ends those whose answers aren't taken.
          max_idle_seconds: longest that a stream is open without a request under way.
        """
        self._service = service
        self._threads = threads
        self._unread = unread
        self._watch = watch
        self._max_idle_seconds = max_idle_seconds
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
        """One answer a request, errors included; UNAVAILABLE ends the streams of a server that stops,
        DEADLINE_EXCEEDED one that nobody uses, CANCELLED one that nobody reads."""
        stream = _Stream(context, self._unread, self._max_idle_seconds)
        with self._lock:
            if self._is_stopping:
                raise UnavailableError("the server is stopping")
            self._open.add(stream)
        try:
            if not context.add_callback(stream.abandon):
                stream.abandon()
            self._threads.stream_readers.submit(self._read, requests, context, stream)
            while (call := stream.oldest()) is not None:
                response = self._finish(call) if isinstance(call, RankCall) else call
                with self._watch.awaiting(context):  # goes on when gRPC has room for the next
                    yield response
                stream.remove_oldest()
                del call, response  # an idle stream must not keep its engine
        finally:
            with self._lock:
                self._open.discard(stream)
            stream.leave()
        if stream.is_stopped:
            raise UnavailableError("the server is stopping")

    def stop(self) -> None:
        """Streams end as soon as what was read of them is answered, or isn't taken."""
        self._watch.hurry(_STOP_SECONDS)
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
                del data  # the next may be long in coming
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

    def __init__(
        self, context: grpc.ServicerContext, unread: UnreadAnswers, max_idle_seconds: float = math.inf
    ) -> None:
        self._context = weakref.ref(context)  # which has the stream, to tell that its call is over
        self._unread = unread
        self._max_idle_seconds = max_idle_seconds
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
        if isinstance(call, RankCall):
            if is_abandoned:
                call.cancel()
            # Weakly: a future keeps its callbacks.
            own = weakref.WeakMethod(self._hold)
            call.future.add_done_callback(lambda future: (hold := own()) and hold(future))

    def _hold(self, future: concurrent.futures.Future[Answer]) -> None:
        """An answer was made: it counts until it is written."""
        context = self._context()
        if context is None or future.cancelled() or future.exception() is not None:
            return
        size = sum(scores.nbytes for scores in future.result().scores.values())
        self._unread.hold(future, context, size)
        with self._changed:
            is_waiting = not self._is_abandoned and any(
                isinstance(call, RankCall) and call.future is future for call in self._calls
            )
        if not is_waiting:  # it has been written just now
            self._unread.release(future)

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
                self._unread.release(call.future)
        if (context := self._context()) is not None:
            self._unread.release(context)

    def leave(self) -> None:
        """All that was answered has been handed to gRPC."""
        context = self._context()
        if context is not None:
            self._unread.hold(context, context, _BUFFERED_BYTES)
            if self._is_abandoned:
                self._unread.release(context)

    def oldest(self) -> RankCall | messages.ModelStreamInferResponse | None:
        """Waits for the next one to answer; None at the end, DeadlineError if none comes for long."""
        seconds = None if self._max_idle_seconds == math.inf else self._max_idle_seconds
        with self._changed:
            while not self._changed.wait_for(self._has_news, seconds):
                if not self._is_expecting:
                    raise DeadlineError(
                        f"expected a request on the stream within {seconds:g} s, got none; open another"
                    )
            return self._calls[0] if self._calls else None

    def _has_news(self) -> bool:
        is_ended = self._is_read or self._is_abandoned or (self.is_stopped and not self._is_expecting)
        return bool(self._calls) or is_ended

    def remove_oldest(self) -> None:
        """It was answered and written."""
        with self._changed:
            call = self._calls.popleft()
            self._changed.notify_all()
        if isinstance(call, RankCall):
            self._unread.release(call.future)


def _failure(request: messages.ModelInferRequest, error: Exception) -> messages.ModelStreamInferResponse:
    code, details = status_of(error)
    response = messages.ModelStreamInferResponse(error_message=details)
    response.infer_response.id = request.id
    response.infer_response.parameters["xlarank_status"].string_param = code.name
    if (milliseconds := retry_after_ms(error)) is not None:
        response.infer_response.parameters["xlarank_retry_after_ms"].int64_param = milliseconds
    let_go(error)
    return response
