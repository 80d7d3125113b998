"""Answers that their callers don't take: `UnreadAnswers`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc

__all__ = ["UnreadAnswers"]

_log = logging.getLogger(__name__)

_MAX_BYTES = 256 * 2**20

_CALL_BYTES = 32 * 2**10
"""What a call takes beside its answer, as measured."""


class UnreadAnswers:
    """Bounds the memory of unary answers on their way to callers. Any thread.

    A call's thread is free as soon as its answer is made, but gRPC holds the answer until HTTP/2 lets it go:
    for ever, if the caller says that it has no room for it. Past the bound the oldest calls are cancelled,
    so that who doesn't read keeps nobody else away.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        """
        Args:
          max_bytes: of all answers together, with 32 KiB a call; one alone may be larger.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Both guarded by _lock: calls whose answer isn't taken, the oldest first, and what they hold.
        self._sizes: dict[grpc.ServicerContext, int] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return self._num_bytes

    def watched(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """A method whose answers count; one that answers a stream writes the next when one is taken, and
        stays as it is."""
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
            self._add(context, _CALL_BYTES + response.ByteSize())
            return response

        return answer

    def _add(self, context: grpc.ServicerContext, size: int) -> None:
        with self._lock:
            self._sizes[context] = size
            self._num_bytes += size
            dropped = []
            while self._num_bytes > self._max_bytes and len(self._sizes) > 1:
                dropped.append(oldest := next(iter(self._sizes)))
                self._forget(oldest)
        if not context.add_callback(lambda: self._remove(context)):  # it is over
            self._remove(context)
        for each in dropped:
            each.cancel()
        if dropped:
            _log.warning(
                "%d calls cancelled: their callers didn't take the answers, and %d bytes of such are held at "
                "most",
                len(dropped),
                self._max_bytes,
            )

    def _remove(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            if context in self._sizes:
                self._forget(context)

    def _forget(self, context: grpc.ServicerContext) -> None:
        self._num_bytes -= self._sizes.pop(context)
