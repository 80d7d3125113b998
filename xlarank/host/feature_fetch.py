"""Asking a source for rows, in threads of its own and not for long: `FeatureFetcher`."""

from __future__ import annotations

import logging
import reprlib
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from xlarank.errors import UnavailableError, XlarankError
from xlarank.spec import Column, join_columns, take

__all__ = ["FeatureFetcher", "FetchedRows"]

_log = logging.getLogger(__name__)

_NUM_THREADS = 8

_IDLE_SECONDS = 10.0
"""After so long without work a thread ends: nobody closes a store."""


class FetchedRows(NamedTuple):
    """Rows that a source has."""

    ids: np.ndarray
    """[k] int64, distinct, in any order."""

    columns: list[Column]
    """One a stored feature, k rows each."""


class FeatureFetcher:
    """Asks a source from a few threads, for an id once at a time. Any thread.

    A fetch is waited for until it is overdue, `timeout_ms` after its first caller; those who come later are
    refused at once, and so are all others while every thread has an overdue one. It is taken to its end all
    the same, and its answer kept for whoever asks then.
    """

    def __init__(self, where: str, *, timeout_ms: float, clock: Callable[[], float]) -> None:
        """
        Args:
          where: what is asked, for messages.
          timeout_ms: most that a caller waits.
          clock: seconds, monotonic.
        """
        self._where = where
        self._timeout_ms = timeout_ms
        self._clock = clock
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        # All below guarded by _lock.
        self._in_flight: dict[int, _Fetch] = {}  # by id
        self._queue: deque[_Fetch] = deque()  # overdue ones are dropped when a thread gets to them
        self._running: set[_Fetch] = set()
        self._num_threads = 0
        self._num_idle = 0
        self._num_ended = 0
        self._seconds = 0.0
        self._num_refused = 0

    def rows(self, ids: np.ndarray, fetch: Callable[[np.ndarray], FetchedRows]) -> FetchedRows:
        """Rows of those ids that the source has.

        Args:
          ids: [m] int64, distinct.
          fetch: asks the source for some of them, in another thread.

        Raises:
          UnavailableError: if the source can't be asked now, or doesn't answer in time.
          XlarankError: if it fails otherwise.
        """
        try:
            parts = [self._answer(asked, own) for asked, own in self._asked(ids, fetch).items()]
        except XlarankError:
            with self._lock:
                self._num_refused += 1
            raise
        if len(parts) == 1:
            return parts[0]
        columns = [join_columns(some) for some in zip(*(part.columns for part in parts), strict=True)]
        return FetchedRows(np.concatenate([part.ids for part in parts]), columns)

    def forget(self, ids: np.ndarray) -> None:
        """Has nobody wait for what was asked before this: callers that come now ask again."""
        with self._lock:
            for i in ids.tolist():
                self._in_flight.pop(i, None)

    def stats(self) -> tuple[int, float, int]:
        """Fetches that have ended, their seconds, and callers that were refused."""
        with self._lock:
            return self._num_ended, self._seconds, self._num_refused

    def _asked(self, ids: np.ndarray, fetch: Callable[[np.ndarray], FetchedRows]) -> dict[_Fetch, list[int]]:
        """The fetches that the ids are part of, and which; those that are part of none are asked for."""
        asked: dict[_Fetch, list[int]] = {}
        with self._lock:
            rest = []
            for i in ids.tolist():
                if i in self._in_flight:
                    asked.setdefault(self._in_flight[i], []).append(i)
                else:
                    rest.append(i)
            if rest:
                asked[self._begin(rest, fetch)] = rest
        return asked

    def _begin(self, ids: list[int], fetch: Callable[[np.ndarray], FetchedRows]) -> _Fetch:
        now = self._clock()
        if len(self._running) == _NUM_THREADS and all(now >= other.overdue_at for other in self._running):
            raise UnavailableError(
                f"{self._where}: all {_NUM_THREADS} threads that ask it have waited for more than "
                f"{self._timeout_ms:g} ms"
            )
        begun = _Fetch(ids, fetch, now + self._timeout_ms / 1000)
        self._queue.append(begun)
        self._in_flight |= dict.fromkeys(ids, begun)
        if len(self._queue) <= self._num_idle:
            self._has_work.notify()
        elif self._num_threads < _NUM_THREADS:
            threading.Thread(target=self._run, name="xlarank-feature-fetch", daemon=True).start()
            self._num_threads += 1
        return begun

    def _answer(self, asked: _Fetch, ids: list[int]) -> FetchedRows:
        """A fetch's rows of some of its ids, once they are there."""
        if not asked.has_ended.wait(max(0.0, asked.overdue_at - self._clock())):
            raise UnavailableError(
                f"{self._where}: no answer within {self._timeout_ms:g} ms for ids {reprlib.repr(ids)}"
            )
        if asked.answer is None:
            kind, text = asked.error
            raise kind(f"{self._where}: {text}")
        if len(ids) == len(asked.ids):
            return asked.answer
        rows = np.flatnonzero(np.isin(asked.answer.ids, ids))
        return FetchedRows(asked.answer.ids[rows], [take(column, rows) for column in asked.answer.columns])

    def _run(self) -> None:
        while (fetch := self._next()) is not None:
            began = self._clock()
            try:
                self._ask(fetch)
            finally:
                with self._lock:
                    self._running.remove(fetch)
                    self._end(fetch)
                    self._num_ended += 1
                    self._seconds += self._clock() - began
                del fetch  # an idle thread holds no rows

    def _next(self) -> _Fetch | None:
        """What to do next; None if nothing came for long."""
        with self._lock:
            has_work = True
            while has_work:
                while self._queue:
                    fetch = self._queue.popleft()
                    if self._clock() < fetch.overdue_at:
                        self._running.add(fetch)
                        return fetch
                    self._end(fetch)
                self._num_idle += 1
                has_work = self._has_work.wait(_IDLE_SECONDS) or bool(self._queue)
                self._num_idle -= 1
            self._num_threads -= 1
            return None

    def _ask(self, fetch: _Fetch) -> None:
        try:
            fetch.answer = fetch.fetch(np.array(fetch.ids, np.int64))
        except UnavailableError as error:
            fetch.error = UnavailableError, str(error)
        except OSError as error:  # of its connection; a time-out is one as well
            fetch.error = UnavailableError, f"{type(error).__name__}: {error}"
        except XlarankError as error:
            fetch.error = XlarankError, str(error)  # never the caller's fault
        except Exception as error:
            _log.exception("%s: failed", self._where)
            fetch.error = XlarankError, f"{type(error).__name__}: {error}"

    def _end(self, fetch: _Fetch) -> None:
        for i in fetch.ids:
            if self._in_flight.get(i) is fetch:
                del self._in_flight[i]
        fetch.has_ended.set()


class _Fetch:
    """Ids that a source is asked for at once. `answer` and `error` are final once it has ended."""

    def __init__(self, ids: list[int], fetch: Callable[[np.ndarray], FetchedRows], overdue_at: float) -> None:
        self.ids = ids
        self.fetch = fetch
        self.overdue_at = overdue_at
        self.has_ended = threading.Event()
        self.answer: FetchedRows | None = None
        # No exception, which would hold its frames, and be raised by several threads.
        self.error: tuple[type[XlarankError], str] = (UnavailableError, "was not asked in time")
