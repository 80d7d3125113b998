"""Another rule of batching, to compare ours with: Triton's. `FixedDelayBatcher`.

Triton's `GetDynamicBatch` with the preferred size left at the maximum: requests are taken in order until the
next one doesn't fit, which sends the batch, as a full one is sent; else it is held back until its oldest
request has waited the fixed delay, whether or not the device is idle. Nothing overtakes and nothing is split.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar, cast

from xlarank.errors import BucketError
from xlarank.runtime.batcher import Batch
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.part_queue import Part, Ticket
from xlarank.runtime.scheduler import BatcherMaker
from xlarank.spec import DEFAULT_PRIORITY
from xlarank.spec.serving import QueueConfig

__all__ = ["FixedDelayBatcher", "fixed_delay"]

Item = TypeVar("Item", bound=Hashable)


def fixed_delay(delay_us: float) -> BatcherMaker:
    """What to give a `Scheduler` or a `DevicePool`: batchers that hold requests back for so long."""
    # Not a subclass of Batcher, which is final, but all of it that a scheduler uses.
    return cast(BatcherMaker, functools.partial(FixedDelayBatcher, delay_us=delay_us))


class FixedDelayBatcher(Generic[Item]):
    """A model's queue with the interface of `xlarank.runtime.batcher.Batcher`."""

    def __init__(
        self,
        plan: BucketPlan,
        config: QueueConfig | None = None,
        *,
        num_devices: int = 1,
        delay_us: float,
    ) -> None:
        """
        Args:
          plan: the maximum batch size is its ladder's largest.
          config: limits of admission.
          num_devices: as `Batcher` takes it; the rule doesn't ask.
          delay_us: max_queue_delay_microseconds.
        """
        self.plan = plan
        self.config = config or QueueConfig()
        self._delay = delay_us / 1e6
        self._queue: list[Part[Item]] = []  # ascending by priority, then by arrival
        self._late: list[Item] = []
        self._count = itertools.count()
        self._deferred_until = math.inf

    @property
    def num_queued_rows(self) -> int:
        """Rows accepted and not yet in a batch."""
        return sum(part.num_rows for part in self._queue)

    @property
    def num_queued_requests(self) -> int:
        """Requests not yet in a batch."""
        return len(self._queue)

    @property
    def num_tied_requests(self) -> int:
        """None, as no device is preferred."""
        return 0

    @property
    def queued_seconds(self) -> float:
        """Device time that they will take, by the plan."""
        return sum(self.plan.work_seconds(part.num_rows) for part in self._queue)

    @property
    def deferred_until(self) -> float:
        """When to ask again, where the last `next_batch` held back; inf otherwise."""
        return self._deferred_until

    @property
    def next_deadline(self) -> float:
        """The earliest of what is queued; inf when there is none."""
        return min((part.ticket.deadline for part in self._queue), default=math.inf)

    @property
    def wake_at(self) -> float:
        """When to call `take_late` though nothing happens."""
        return -math.inf if self._late else self.next_deadline

    def waiting(self) -> Iterator[Part[Item]]:
        """What is queued, in order."""
        return iter(self._queue)

    def add(
        self,
        item: Item,
        num_rows: int,
        *,
        now: float,
        priority: int = DEFAULT_PRIORITY,
        deadline: float = math.inf,
        home: int | None = None,
        spread_over: Sequence[int] = (),
    ) -> None:
        """Queues a request; BucketError for one of more rows than the maximum. No device is preferred."""
        if not 1 <= num_rows <= self.plan.ladder.max_rows:
            raise BucketError(
                f"expected a request of 1 to {self.plan.ladder.max_rows} rows, got {num_rows}; this rule "
                f"splits none"
            )
        ticket = Ticket(item, now, deadline, (float(priority), next(self._count)))
        bisect.insort(self._queue, Part(ticket, 0, num_rows), key=lambda part: part.ticket.order)

    def release(self, device: int) -> None:
        """Nothing is bound to a device."""

    def drop(self, item: Item) -> bool:
        """Forgets a queued request; returns whether there was one."""
        kept = [part for part in self._queue if part.item != item]
        is_there = len(kept) < len(self._queue)
        self._queue = kept
        return is_there

    def clear(self) -> list[Item]:
        """Forgets everything; returns the requests."""
        items = [part.item for part in self._queue]
        self._queue = []
        return items

    def expire(self, now: float) -> None:
        """Moves requests whose deadline has passed to the late ones."""
        late = [part.item for part in self._queue if part.ticket.deadline <= now]
        for item in late:
            self.drop(item)
        self._late += late

    def take_late(self) -> list[Item]:
        """Requests that were not run because of their deadline; each once."""
        late, self._late = self._late, []
        return late

    def seconds_ahead(self, now: float, priority: int) -> float:
        """Device time of all that a request of this level would find before it."""
        ahead = [part for part in self._queue if part.ticket.order[0] <= priority]
        return sum(self.plan.work_seconds(part.num_rows) for part in ahead)

    def next_batch(
        self,
        device: int,
        now: float,
        *,
        plan: BucketPlan | None = None,
        **_: object,  # what the rule doesn't ask
    ) -> Batch[Item] | None:
        """The batch that a free device runs now; None when there is none, or it is held back."""
        self._deferred_until = math.inf
        self.expire(now)
        if not self._queue:
            return None
        plan = plan or self.plan
        parts, is_full = self._prefix(plan)
        oldest = min(part.ticket.queued_at for part in self._queue)
        if not is_full and now < oldest + self._delay:
            self._deferred_until = oldest + self._delay
            return None
        num_rows = sum(part.num_rows for part in parts)
        bucket = plan.bucket(num_rows, len(parts))
        assert bucket is not None  # _prefix saw to it
        del self._queue[: len(parts)]
        return Batch(bucket, tuple(parts))

    def _prefix(self, plan: BucketPlan) -> tuple[list[Part[Item]], bool]:
        """The first requests that fit together, and whether the next one doesn't or they fill a batch."""
        parts: list[Part[Item]] = []
        num_rows = 0
        for part in self._queue:
            if plan.bucket(num_rows + part.num_rows, len(parts) + 1) is None:
                return parts, True
            parts.append(part)
            num_rows += part.num_rows
        return parts, num_rows >= plan.ladder.max_rows
