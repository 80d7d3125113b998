"""Requests that are long in coming, and answers in leaving: `ReceiveWatch`."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any, NoReturn

import grpc

from xlarank.errors import RequestError
from xlarank_serving.refusals import Refusals
from xlarank_serving.status import answering
from xlarank_serving.threads import CountingThreadPool

__all__ = ["ReceiveWatch"]

_log = logging.getLogger(__name__)

_HURRY_SECONDS = 0.25
"""What the oldest requests get to arrive in, and answers to be taken, while half of the threads wait like
theirs, and calls for one."""

_REFUSED_SECONDS = 1.0
"""How long a call that was refused for want of a thread wants one: about when it comes again."""

_LOOK_SECONDS = 0.05

_STALLED_SECONDS = 0.05
"""A request that takes longer to arrive isn't expected soon: it must not be counted as one that is, or some
that are never sent would keep all others away."""


class ReceiveWatch:
    """Ends calls whose request doesn't arrive, or whose answer isn't taken, where a thread waits for that.

    gRPC waits for a request's bytes on the thread that is to answer it, so as many requests as a pool has
    threads, sent by half, would end all service of that pool. Here a request has `max_receive_seconds` to
    arrive. While that is what the threads are short for, as many of the oldest as calls wait for a thread
    have far less. The caller of one that is ended sees CANCELLED. A stream's answers are sent on a thread
    too, and wait there until the caller has room for them: each has as long as a request, from when it is
    sent, so that who reads slowly keeps its stream.
    """

    def __init__(
        self,
        max_receive_seconds: float,
        threads: CountingThreadPool,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_seconds = max_receive_seconds
        self._threads = threads
        self._refusals = refusals
        self._clock = clock
        # Calls whose caller is awaited on a thread, and since when, the oldest first. Single operations of a
        # dict need no lock.
        self._since: dict[grpc.ServicerContext, float] = {}
        # Those of them that were ended and still hold their thread; of who looks for late ones alone.
        self._ending: set[grpc.ServicerContext] = set()
        # When calls were refused as the threads are all taken, where none may wait for one, the oldest first:
        # added by who refuses, taken by who looks for late ones.
        self._refused_at: collections.deque[float] = collections.deque(maxlen=threads.num_threads)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="grpc-receive-watch", daemon=True)
        self._thread.start()

    def watched(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """A method of one request, of the same pool, that waits for it here, where the call can be ended.

        If it answers a stream, it is one that gRPC calls non-blocking: it is given a function that sends.
        """
        make, method = (
            (grpc.stream_stream_rpc_method_handler, handler.unary_stream)
            if handler.response_streaming
            else (grpc.stream_unary_rpc_method_handler, handler.unary_unary)
        )
        assert method is not None

        @functools.wraps(method)  # what it runs on and how are attributes of it
        def receive_and_call(requests: Iterator[Any], context: grpc.ServicerContext, *send: Any) -> Any:
            request = self.receive(requests, context)
            if request is None:
                return _refuse(request, context)
            return method(request, context, *send)

        return make(receive_and_call, handler.request_deserializer, handler.response_serializer)

    def receive(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The next request of a call; None at their end."""
        with self.awaiting(context):
            return next(requests, None)

    @contextlib.contextmanager
    def awaiting(self, context: grpc.ServicerContext) -> Iterator[None]:
        """While a thread waits for what a call's caller has to send, or to take."""
        self._since[context] = self._clock()
        try:
            yield
        finally:
            self._since.pop(context, None)

    def count_refused(self) -> None:
        """A call was refused as the threads are all taken: it is one more that wants a thread."""
        self._refused_at.append(self._clock())

    def hurry(self, max_seconds: float) -> None:
        """From now on callers are awaited for so long at most: the server stops."""
        self._max_seconds = min(self._max_seconds, max_seconds)

    @property
    def num_stalled(self) -> int:
        """Calls whose caller has been awaited for so long that nothing may come."""
        before = self._clock() - _STALLED_SECONDS
        return sum(since < before for since in list(self._since.values()))

    def end_late_calls(self) -> int:
        """Cancels the calls that have waited too long; returns how many."""
        since = dict(self._since)
        self._ending &= since.keys()
        now = self._clock()
        ages = {context: now - began for context, began in since.items() if context not in self._ending}
        late = [context for context, age in ages.items() if age > self._max_seconds]
        if 2 * len(since) >= self._threads.num_threads:
            # Threads of calls that were ended are about to come free.
            num_wanted = max(0, self._num_wanted(now) - len(self._ending) - len(late))
            hurried = [c for c, age in ages.items() if _HURRY_SECONDS < age <= self._max_seconds]
            late += hurried[:num_wanted]
        for _ in range(min(len(late), len(self._refused_at))):  # these get the threads
            self._refused_at.popleft()
        for context in late:
            self._ending.add(context)
            self._refusals.count(CancelledError())
            context.cancel()
        if late:
            least = min(ages[context] for context in late)
            _log.warning(
                "%d calls ended: requests didn't arrive, or answers weren't taken, within %.3g s",
                len(late),
                least,
            )
        return len(late)

    def _num_wanted(self, now: float) -> int:
        """Calls that wait for a thread, and those that would if they might."""
        while self._refused_at and now - self._refused_at[0] > _REFUSED_SECONDS:
            self._refused_at.popleft()
        return self._threads.num_waiting + len(self._refused_at)

    def close(self) -> None:
        """Ends its thread; calls are left alone from then on."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            if self._since:
                self.end_late_calls()


@answering
def _refuse(request: object, context: grpc.ServicerContext) -> NoReturn:
    raise RequestError("expected one request message, got none")
