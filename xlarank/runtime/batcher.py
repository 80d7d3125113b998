"""Turns queued requests into device batches: `Batcher`.

Contract
  - Pure: no threads, no clock, no I/O. The owner serialises calls and hands in a device's name.
  - Work-conserving: `next_batch` answers whenever a row is queued that the device may run. A lone
    request never waits for company; batches grow only because devices were busy.
  - First come, first served: a batch is the longest prefix of the queue that fits `max_batch_rows` rows
    and a bucket's requests. Rows are counted and requests are counted.
  - A request is bound to a device when the device frees, not at arrival.
  - A request of more rows than the largest bucket is split; its parts run one after the other on the
    device that took the first, and the last part takes company along.
  - Every queued row comes out exactly once, in order within its request, unless its request is dropped.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable
from typing import Generic, TypeVar

from xlarank.errors import BucketError
from xlarank.spec import Bucket, BucketLadder

__all__ = ["Batch", "Batcher", "Part"]

Item = TypeVar("Item", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Part(Generic[Item]):
    """Rows ``[begin, end)`` of one request."""

    item: Item
    begin: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Batch(Generic[Item]):
    """What one device runs at once."""

    bucket: Bucket
    """Smallest bucket that holds the parts."""

    parts: tuple[Part[Item], ...]
    """At most one a request; part i is context i of the batch."""

    @property
    def num_rows(self) -> int:
        """Valid rows; the rest of the bucket is padding."""
        return sum(part.num_rows for part in self.parts)


class Batcher(Generic[Item]):
    """The queue of one model. See the contract at the top of the file."""

    def __init__(self, ladder: BucketLadder, *, max_batch_rows: int | None = None) -> None:
        """
        Args:
          ladder: the compiled buckets.
          max_batch_rows: rows beyond which requests are not merged (the knee of the latency profile);
            the largest bucket by default. A single request may still fill the largest bucket.
        """
        limit = ladder.max_rows if max_batch_rows is None else max_batch_rows
        if not 1 <= limit <= ladder.max_rows:
            raise BucketError(f"max_batch_rows must be in [1, {ladder.max_rows}]; was {limit}")
        self._ladder = ladder
        self._max_batch_rows = limit
        self._queue: collections.deque[Part[Item]] = collections.deque()
        self._bound: dict[Hashable, Part[Item]] = {}  # by device: what is left of a split request
        self._num_queued_rows = 0

    @property
    def num_queued_rows(self) -> int:
        """Rows accepted and not yet in a batch."""
        return self._num_queued_rows

    @property
    def num_queued_requests(self) -> int:
        """Requests with rows not yet in a batch."""
        return len(self._queue) + len(self._bound)

    def add(self, item: Item, num_rows: int) -> None:
        """Queues a request of at least one row."""
        if num_rows < 1:
            raise BucketError(f"expected a request of at least one row, got {num_rows}")
        self._queue.append(Part(item, 0, num_rows))
        self._num_queued_rows += num_rows

    def drop(self, item: Item) -> bool:
        """Forgets what is still queued of a request; returns whether there was something."""
        dropped = [part for part in self._queue if part.item == item]
        for part in dropped:
            self._queue.remove(part)
        for device, part in list(self._bound.items()):
            if part.item == item:
                dropped.append(self._bound.pop(device))
        self._num_queued_rows -= sum(part.num_rows for part in dropped)
        return bool(dropped)

    def next_batch(self, device: Hashable) -> Batch[Item] | None:
        """The batch that a free device runs now; None when nothing is queued for it."""
        parts: list[Part[Item]] = []
        num_rows = 0
        while True:
            head = self._bound.get(device) if not parts else None
            is_bound = head is not None
            if head is None:
                if not self._queue:
                    break
                head = self._queue[0]
            size = min(head.num_rows, self._ladder.max_rows)
            limit = self._max_batch_rows if parts else self._ladder.max_rows
            if num_rows + size > limit or not self._ladder.fits(num_rows + size, len(parts) + 1):
                break
            if is_bound:
                del self._bound[device]
            else:
                self._queue.popleft()
            parts.append(Part(head.item, head.begin, head.begin + size))
            num_rows += size
            if size < head.num_rows:
                self._bound[device] = Part(head.item, head.begin + size, head.end)
                break
        if not parts:
            return None
        self._num_queued_rows -= num_rows
        return Batch(self._ladder.bucket_for(num_rows, len(parts)), tuple(parts))
