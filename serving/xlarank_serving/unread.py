"""Answers that their callers don't take: `UnreadAnswers`."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import grpc

__all__ = ["UnreadAnswers"]

_log = logging.getLogger(__name__)

_MAX_BYTES = 256 * 2**20

_CALL_BYTES = 32 * 2**10
"""What a call takes beside its answer, as measured."""


class Call(Protocol):
    """Of gRPC or a connection of HTTP; hashable."""

    def cancel(self) -> Any:
        """Ends it. Any thread."""
        ...


class UnreadAnswers:
    """Bounds the memory of answers on their way to callers. Any thread.

    A unary call's thread is free as soon as its answer is made, but gRPC holds the answer until HTTP/2 lets
    it go: for ever, if the caller says that it has no room for it. A stream's answers wait for the one before
    them. Past the bound the calls of the oldest answers are cancelled, so that who doesn't read keeps nobody
    else away. HTTP's connections count with what is written to them and not sent.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        """
        Args:
          max_bytes: of all answers together, with 32 KiB a call; one alone may be larger.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Both guarded by _lock: answers that aren't taken, the oldest first, with their calls and what they
        # hold, by the call if it is unary; and what they hold together.
        self._held: dict[Any, tuple[Call, int]] = {}
        self._num_bytes = 0
        # Guarded by _lock: those cancelled. gRPC tells of that some time later, and what they answer until
        # then must push nobody out.
        self._cancelled: weakref.WeakSet[Call] = weakref.WeakSet()

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return self._num_bytes

    def watched(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """A method whose answers count; one that answers a stream stays as it is: what such a one has made
        ahead it counts by itself."""
        if handler.response_streaming:
            return handler
        make, method = (
            (grpc.stream_unary_rpc_method_handler, handler.stream_unary)
            if handler.request_streaming
            else (grpc.unary_unary_rpc_method_handler, handler.unary_unary)
        )
        return make(self._counting(method), handler.request_deserializer, handler.response_serializer)

    def _counting(self, method: Any) -> Callable[[Any, grpc.ServicerContext], Any]:
        @functools.wraps(method)  # the pool that it runs on is an attribute of it
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            response = method(request, context)
            self.hold(context, context, response.ByteSize())
            if not context.add_callback(lambda: self.release(context)):  # it is over
                self.release(context)
            return response

        return answer

    def hold(self, answer: Any, context: Call, size: int) -> None:
        """Counts an answer until `release`; one of a call that was cancelled isn't counted.

        Args:
          answer: any name of it, hashable.
          context: of its call; any thread may cancel it.
          size: in bytes.
        """
        size += _CALL_BYTES
        dropped: dict[Call, None] = {}
        with self._lock:
            if context in self._cancelled:
                return
            self._held[answer] = context, size
            self._num_bytes += size
            while self._num_bytes > self._max_bytes and len(self._held) > 1:
                oldest = next(iter(self._held))
                dropped[self._held[oldest][0]] = None
                self._forget(oldest)
            self._cancelled.update(dropped)
        for each in dropped:
            each.cancel()
        if dropped:
            _log.warning(
                "%d calls cancelled: their callers didn't take the answers, and %d bytes of such are held at "
                "most",
                len(dropped),
                self._max_bytes,
            )

    def release(self, answer: Any) -> None:
        """It was taken, or its call is over. Idempotent."""
        with self._lock:
            if answer in self._held:
                self._forget(answer)

    def _forget(self, answer: Any) -> None:
        self._num_bytes -= self._held.pop(answer)[1]
