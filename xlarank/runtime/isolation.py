"""Finds what is at fault in batches that fail wherever they run: `FaultSearch`.

Contract
  - Pure: no threads, no clock, and it runs nothing. The owner serialises the calls, takes steps, runs each as
    a batch of its own on a device that works, and says how it ended. Several may run at a time.
  - Requests first: a batch is halved until each of its requests has run, so that it can be answered at once,
    or has failed by itself. Of k at fault among Q that takes at most 2 k log2(Q) steps.
  - Then the row of each that failed, by halving again: at most 2 log2(N) steps. They answer nobody else, so
    while other requests wait they get a quarter of a device's time. Past `_MAX_NARROWED` requests at a time,
    and `_MAX_SECONDS` for each, the rows that are still suspected will do.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from xlarank.runtime.batcher import Batch
from xlarank.runtime.device_health import Suspicion
from xlarank.runtime.model_queue import Turn
from xlarank.runtime.part_queue import Part

__all__ = ["Culprit", "FaultSearch", "Step"]

_MAX_NARROWED = 8

_MAX_SECONDS = 1.0

_REST_TIMES = 3
"""After a step for rows there is none, while requests wait, for so many times as long as it took."""


@dataclasses.dataclass(frozen=True, eq=False)
class Culprit:
    """A request that fails by itself."""

    part: Part
    error: Exception

    begin: int
    """The fault shows with rows ``[begin, end)`` of the request; one row, unless it takes several or they
    weren't told apart."""

    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A run that will tell more."""

    suspicion: Suspicion
    """What began it."""

    parts: tuple[Part, ...]

    culprit: Culprit | None = None
    """Whose row is looked for; None while the parts are requests that may be answered."""

    until: float = math.inf
    """When the rows that are left will do."""

    @property
    def workload(self) -> Any:
        """The pool's, of the model."""
        return self.suspicion.workload

    @property
    def items(self) -> list[Any]:
        """Whose requests the parts are."""
        return [part.item for part in self.parts]

    def turn_on(self, index: int) -> Turn[Any]:
        """What a device is to run."""
        first = self.suspicion.turn
        bucket = first.queue.plans[index].bucket(sum(part.num_rows for part in self.parts), len(self.parts))
        assert bucket is not None  # it held more
        return dataclasses.replace(first, batch=Batch(bucket, self.parts))


class FaultSearch:
    """See the contract at the top of the file."""

    def __init__(self) -> None:
        self._requests: collections.deque[Step] = collections.deque()
        self._rows: collections.deque[Step] = collections.deque()
        self._rests_until = -math.inf

    @property
    def num_steps(self) -> int:
        """That are to be taken."""
        return len(self._requests) + len(self._rows)

    def put_back(self, step: Step) -> None:
        """Has a step that was taken wait again."""
        (self._requests if step.culprit is None else self._rows).appendleft(step)

    def take_back(self, step: Step) -> bool:
        """Takes a step that was put back; False if it has been taken."""
        for steps in (self._requests, self._rows):
            if step in steps:
                steps.remove(step)
                return True
        return False

    def begin(
        self, suspicion: Suspicion, parts: Sequence[Part], error: Exception, now: float
    ) -> Culprit | None:
        """Takes parts that fail together apart; see `ran`."""
        if len(parts) == 1:
            culprit = Culprit(parts[0], _alone(error), parts[0].begin, parts[0].end)
            if len(self._rows) >= _MAX_NARROWED or culprit.end - culprit.begin == 1:
                return culprit
            self._rows.append(_low_half(suspicion, culprit, now + _MAX_SECONDS))
            return None
        middle = len(parts) // 2
        self._requests += [Step(suspicion, tuple(half)) for half in (parts[:middle], parts[middle:])]
        return None

    def take(self, now: float, *, is_idle: bool) -> Step | None:
        """What to run next; None if that is nothing.

        Args:
          now: seconds.
          is_idle: the device has nothing else to do.
        """
        if self._requests:
            return self._requests.popleft()
        if self._rows and (is_idle or now >= self._rests_until):
            return self._rows.popleft()
        return None

    def ran(self, step: Step, error: Exception | None, now: float, seconds: float) -> Culprit | None:
        """A step was run.

        Args:
          step: taken before.
          error: what it failed with; None if its parts ran, and may be answered if they are whole.
          now: seconds.
          seconds: what it took.

        Returns:
          A request at fault of which no more will be known: it is to be answered.
        """
        culprit = step.culprit
        if culprit is None:
            return None if error is None else self.begin(step.suspicion, step.parts, error, now)
        self._rests_until = now + _REST_TIMES * seconds
        (rows,) = step.parts
        if error is not None:
            culprit = dataclasses.replace(culprit, error=_alone(error), begin=rows.begin, end=rows.end)
            if culprit.end - culprit.begin == 1 or now >= step.until:
                return culprit
            self._rows.appendleft(_low_half(step.suspicion, culprit, step.until))
            return None
        if rows.end == culprit.end or now >= step.until:  # neither half fails without the other
            return culprit
        high = dataclasses.replace(rows, begin=rows.end, end=culprit.end)
        self._rows.appendleft(dataclasses.replace(step, parts=(high,)))
        return None

    def clear(self) -> list[Step]:
        """Gives up what is to be taken."""
        steps = [*self._requests, *self._rows]
        self._requests.clear()
        self._rows.clear()
        return steps


def _low_half(suspicion: Suspicion, culprit: Culprit, until: float) -> Step:
    middle = (culprit.begin + culprit.end) // 2
    rows = dataclasses.replace(culprit.part, begin=culprit.begin, end=middle)
    return Step(suspicion, (rows,), culprit, until)


def _alone(error: Exception) -> Exception:
    """Without its traceback, whose frames have what is told of it: a cycle."""
    return error.with_traceback(None)
