"""Which threads run which RPCs: `ServerThreads`, `AdminThreads`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from xlarank.errors import OverloadError

__all__ = ["AdminThreads", "CountingThreadPool", "ServerThreads", "on_threads", "short_turns"]

_NUM_CONTROL = 4
_NUM_REFUSING = 2
_NUM_REFLECTION = 8
_NUM_WATCHES = 16
_MAX_STREAMS = 64
_NUM_UPDATING = 2

_MAX_ADMIN_CALLS = 64
"""Administrative calls of a kind that run or wait; one more is refused."""

_RETRY_ADMIN_SECONDS = 1.0

_SWITCH_SECONDS = 0.0005
"""After which Python lets another thread run that waits for the interpreter. A request waits for it several
times; at the default of 5 ms, each time, behind a thread that loads a version, requests pile up."""


class CountingThreadPool(concurrent.futures.ThreadPoolExecutor):
    """A thread pool that can be waited for while it stays open.

    Attributes:
      num_threads: at most.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, name)
        self.num_threads = num_threads
        self._changed = threading.Condition()
        self._num_open = 0  # guarded by _changed: submitted and not yet done

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        """As the base class; counts until the work is done."""
        with self._changed:
            self._num_open += 1
        try:
            future = super().submit(fn, *args, **kwargs)
        except RuntimeError:  # shut down
            self._on_done(None)
            raise
        future.add_done_callback(self._on_done)
        return future

    @property
    def num_open(self) -> int:
        """Submitted and not yet done."""
        return self._num_open

    @property
    def num_waiting(self) -> int:
        """Submitted and without a thread."""
        return max(0, self._num_open - self.num_threads)

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing is open; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_open == 0, timeout_seconds)

    def _on_done(self, _: object) -> None:
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()


class AdminThreads:
    """The thread pools of RPCs that change a server: which of them runs which, and how many calls may wait.

    A load waits until versions are proven, for minutes. A rollback and an unload end the compiling that it
    waits for, and rows are written meanwhile: none of these may wait for a thread that a load has.

    Attributes:
      pools: by the method that runs on it.
    """

    def __init__(self) -> None:
        loads = CountingThreadPool(_MAX_ADMIN_CALLS, "grpc-load")
        changes = CountingThreadPool(_MAX_ADMIN_CALLS, "grpc-change")
        updates = CountingThreadPool(_NUM_UPDATING, "grpc-update")
        self.pools = {
            "RepositoryModelLoad": loads,
            "RepositoryModelUnload": changes,
            "Rollback": changes,
            "UpdateRows": updates,
            "UpdateFeatures": updates,
            "RemoveFeatures": updates,
            "FeatureMetadata": updates,
        }

    def refusal(self, method: str) -> OverloadError | None:
        """What a call that comes now is refused with, unread; None if it is to run."""
        pool = self.pools.get(method)
        if pool is None or pool.num_open < _MAX_ADMIN_CALLS:
            return None
        return OverloadError(
            f"{method}: the server has {_MAX_ADMIN_CALLS} calls of its kind in progress or waiting, its "
            f"limit; try again when one has ended",
            retry_after_seconds=_RETRY_ADMIN_SECONDS,
        )

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing is changed for anybody; False when that took too long."""
        return _are_idle(set(self.pools.values()), timeout_seconds)

    def close(self) -> None:
        """Ends the threads once they have nothing left to do."""
        for pool in set(self.pools.values()):
            pool.shutdown()


class ServerThreads:
    """The thread pools of a server.

    Probes and metadata have threads of their own, so that they are answered while every ranking thread
    waits for a device, and every load for its model. So have calls that are refused unread, of which there
    are many when it matters, and so have reflection, which holds a thread for as long as its stream is open,
    and watches of health, which hold one until their request has come and another while they are told
    something. An open ModelStreamInfer holds a thread that writes and one that reads.

    Attributes:
      administration: those of RPCs that change the server.
      max_streams: how many ModelStreamInfer may be open.
    """

    max_streams = _MAX_STREAMS

    def __init__(self, num_rank_threads: int) -> None:
        self.rank = CountingThreadPool(num_rank_threads, "grpc-rank")
        self.control = CountingThreadPool(_NUM_CONTROL, "grpc-control")
        self.administration = AdminThreads()
        self.refusals = concurrent.futures.ThreadPoolExecutor(_NUM_REFUSING, "grpc-refusal")
        self.reflection = CountingThreadPool(_NUM_REFLECTION, "grpc-reflection")
        self.health_watches = CountingThreadPool(_NUM_WATCHES, "grpc-health-watch")
        self.health_news = CountingThreadPool(_NUM_WATCHES, "grpc-health-news")
        self.streams = CountingThreadPool(self.max_streams, "grpc-stream")
        self.stream_readers = concurrent.futures.ThreadPoolExecutor(self.max_streams, "grpc-stream-reader")

    def pool_of(self, method: str) -> concurrent.futures.ThreadPoolExecutor:
        """That a method with one request and one answer runs on, by its name."""
        if method == "ModelInfer":
            return self.rank
        return self.administration.pools.get(method, self.control)

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing is ranked for anybody; False when that took too long."""
        return _are_idle([self.rank, self.streams], timeout_seconds)

    def close(self) -> None:
        """Ends the threads once they have nothing left to do."""
        self.administration.close()
        for pool in (
            self.rank,
            self.control,
            self.refusals,
            self.reflection,
            self.health_watches,
            self.health_news,
            self.streams,
            self.stream_readers,
        ):
            pool.shutdown()


def _are_idle(pools: Iterable[CountingThreadPool], timeout_seconds: float) -> bool:
    end = time.monotonic() + timeout_seconds
    return all(pool.wait_until_idle(max(0.0, end - time.monotonic())) for pool in pools)


def on_threads(function: Any, pool: concurrent.futures.ThreadPoolExecutor) -> Any:
    """Has gRPC run a method's function on a pool other than the server's; returns the function.

    An attribute that gRPC calls experimental; without it the method runs on the server's pool.
    """
    function.experimental_thread_pool = pool
    return function


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Has threads take short turns at the interpreter, until the end of the block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
