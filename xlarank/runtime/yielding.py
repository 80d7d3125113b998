"""A process that leaves the cores to requests: `YieldingProcess`, `IdleSignal`."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["IdleSignal", "YieldingProcess"]

_PERIOD_SECONDS = 0.25
_LEAST_SHARE = 0.2


class IdleSignal:
    """Whether no request waits or runs, for whoever is to keep out of their way."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
          clock: seconds, monotonic.
        """
        self._clock = clock
        self._lock = threading.Lock()
        # All below guarded by _lock.
        self._is_idle = True
        self._since = clock()
        self._listener: Callable[[bool], None] | None = None

    def update(self, is_idle: bool) -> None:
        """As it is now; cheap where nothing changes."""
        with self._lock:
            if is_idle != self._is_idle:
                self._is_idle = is_idle
                self._since = self._clock()
                if self._listener is not None:
                    self._listener(is_idle)

    @property
    def seconds(self) -> float:
        """For how long no request has waited or run."""
        with self._lock:
            return self._clock() - self._since if self._is_idle else 0.0

    @contextlib.contextmanager
    def told(self, listener: Callable[[bool], None]) -> Iterator[None]:
        """Has one listener told while the context lasts: at once, and of every change.

        Args:
          listener: called on the way of a request; takes some microseconds and never raises.
        """
        with self._lock:
            assert self._listener is None
            self._listener = listener
            listener(self._is_idle)
        try:
            yield
        finally:
            with self._lock:
                self._listener = None


class YieldingProcess:
    """A process that is stopped while requests wait or run, but for a small share of the time.

    The lowest priority isn't enough. The kernel moves a thread that waits for its core to another one when
    that falls idle; beside a process that always has something to do none does, and the threads of a batch
    wait on one core for each other.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        least_share: float = _LEAST_SHARE,
        period_seconds: float = _PERIOD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          process: that runs; nobody else stops it or waits for it.
          least_share: of each period, in (0, 1]: it runs for so long whatever requests do, so that it comes
            to its end beside a server that is never idle.
          period_seconds: within which it gets that.
          clock: seconds, monotonic.
        """
        self._process = process
        self._least_seconds = least_share * period_seconds
        self._rest_seconds = period_seconds - self._least_seconds
        self._clock = clock
        self._lock = threading.Lock()
        # All below guarded by _lock.
        self._is_wanted = False  # its cores, by requests
        self._is_granted = False  # the share that it gets all the same
        self._running_since: float | None = clock()  # None while it is stopped
        self._ran_seconds = 0.0  # in this period, before that

    def on_idle(self, is_idle: bool) -> None:
        """Lets it run, or stops it; for `IdleSignal.told`. Takes some microseconds."""
        with self._lock:
            self._is_wanted = not is_idle
            self._update()

    def wait(self) -> int:
        """Until it has ended; returns its exit status. What `least_share` says is kept by this call."""
        while True:
            status = self._ended_within(self._rest_seconds)
            if status is None and (lacking := self._grant()):
                status = self._ended_within(lacking)
            if status is not None:
                return status
            self._begin_period()

    def _ended_within(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _grant(self) -> float:
        """Has it run, whatever requests do; returns for how many seconds, 0 if it has run enough."""
        with self._lock:
            running = 0.0 if self._running_since is None else self._clock() - self._running_since
            lacking = max(0.0, self._least_seconds - self._ran_seconds - running)
            self._is_granted = lacking > 0
            self._update()
            return lacking

    def _begin_period(self) -> None:
        with self._lock:
            self._ran_seconds = 0.0
            if self._running_since is not None:
                self._running_since = self._clock()
            self._is_granted = False
            self._update()

    def _update(self) -> None:
        now = self._clock()
        must_stop = self._is_wanted and not self._is_granted
        if must_stop and self._running_since is not None:
            self._process.send_signal(signal.SIGSTOP)
            self._ran_seconds += now - self._running_since
            self._running_since = None
        elif not must_stop and self._running_since is None:
            self._process.send_signal(signal.SIGCONT)
            self._running_since = now
