"""A request on its way through an engine: `Pending`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np

from xlarank.host import BoundRequest
from xlarank.runtime.answer import Answer, Timings

__all__ = ["Pending"]


class Pending:
    """Collects the scores of one request until all its rows have come, and answers it once.

    Any thread may call it: the parts of a request may run on several devices (policy spread), and its caller
    may leave, or its deadline pass, while they do.
    """

    __slots__ = (
        "__weakref__",
        "_execute",
        "_gather",
        "_is_claimed",
        "_lock",
        "_rows_left",
        "_scores",
        "_started_at",
        "before_seconds",
        "bound",
        "future",
        "queued_at",
    )

    def __init__(
        self,
        bound: BoundRequest,
        tasks: tuple[str, ...],
        queued_at: float,
        arrived_at: float | None = None,
    ) -> None:
        """
        Args:
          bound: the request.
          tasks: names of the model's tasks.
          queued_at: seconds, monotonic.
          arrived_at: the same, when it came to who submits it; with the submit by default.
        """
        self.bound = bound
        self.future: Future[Answer] = Future()
        self.queued_at = queued_at
        self.before_seconds = 0.0 if arrived_at is None else max(0.0, queued_at - arrived_at)
        self._lock = threading.Lock()
        # All below guarded by _lock.
        self._scores = {task: np.empty(bound.num_candidates, np.float32) for task in tasks}
        self._rows_left = bound.num_candidates
        self._started_at = queued_at
        self._gather = 0.0
        self._execute = 0.0
        self._is_claimed = False  # moves one way

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()

    @property
    def has_answer(self) -> bool:
        """Whether its caller was given scores."""
        future = self.future
        return future.done() and not future.cancelled() and future.exception() is None

    @property
    def num_rows_done(self) -> int:
        """Rows whose scores have come."""
        with self._lock:
            return self.bound.num_candidates - self._rows_left

    def add(
        self,
        begin: int,
        scores: Mapping[str, np.ndarray],
        *,
        started_at: float,
        gather_seconds: float,
        execute_seconds: float,
    ) -> bool:
        """Takes the scores of rows from `begin` on; returns whether these were the last.

        Args:
          begin: of the rows.
          scores: [rows] float32 by task.
          started_at: when their gather began.
          gather_seconds: of their batch.
          execute_seconds: of their batch.
        """
        with self._lock:
            for task, values in scores.items():
                self._scores[task][begin : begin + len(values)] = values
            if begin == 0:
                self._started_at = started_at
            self._gather += gather_seconds
            self._execute += execute_seconds
            self._rows_left -= len(next(iter(scores.values())))
            return self._rows_left == 0

    def answer(self, now: float, tell: Callable[[Answer], object] = lambda _: None) -> Answer | None:
        """Answers the caller with what has come; None if that has been done, or the caller has left.

        Args:
          now: seconds, monotonic.
          tell: told of the answer before the caller is, who finds in the metrics what it was answered.
        """
        if not self._claim():
            return None
        timings = Timings(
            queue=self._started_at - self.queued_at,
            gather=self._gather,
            execute=self._execute,
            total=now - self.queued_at,
        )
        answer = Answer(self._scores, timings)
        try:
            tell(answer)
        finally:
            self.future.set_result(answer)
        return answer

    def fail(self, error: BaseException) -> bool:
        """Answers the caller with an error; False if that has been done, or the caller has left."""
        if not self._claim():
            return False
        self.future.set_exception(error)
        return True

    def _claim(self) -> bool:
        """True for the first of those who would answer, if the caller is still there."""
        with self._lock:
            is_first, self._is_claimed = not self._is_claimed, True
        return is_first and self.future.set_running_or_notify_cancel()
