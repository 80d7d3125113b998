"""What is queued, in order, and device time and rows of what is before a place in it: `PartQueue`."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["Part", "PartQueue", "Ticket"]

Item = TypeVar("Item", bound=Hashable)

_CHUNK_PARTS = 128
"""Parts in half of a full chunk: adding them up costs about a microsecond."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket(Generic[Item]):
    """A queued request."""

    item: Item
    queued_at: float
    deadline: float
    order: tuple[float, int]
    """Place in the queue: time of arrival, later by the ageing of its priority level; then a count."""

    home: int | None = None
    """The device that it prefers; None for any."""

    is_spread: bool = False
    """Whether devices have a share of it each."""

    head_start: float = 0.0
    """Seconds that the highest level has over this one's; equal for equal levels."""

    @property
    def is_tied(self) -> bool:
        """Whether it matters which device comes for it first."""
        return self.home is not None or self.is_spread


@dataclasses.dataclass(frozen=True)
class Part(Generic[Item]):
    """Rows ``[begin, end)`` of one request."""

    ticket: Ticket[Item]
    begin: int
    end: int
    pin: int | None = None
    """The only device that may run it; None for any."""

    @property
    def item(self) -> Item:
        """The request's name."""
        return self.ticket.item

    @property
    def num_rows(self) -> int:
        """Rows in it."""
        return self.end - self.begin

    def may_run_on(self, device: int) -> bool:
        """Whether a device isn't ruled out."""
        return self.pin is None or self.pin == device


class PartQueue(Generic[Item]):
    """Parts by the order of their requests, those of one request by their rows.

    They are in chunks with a sum each, as every arrival asks what is before it, however much is queued. A sum
    is made anew when its chunk changes, so that no rounding piles up.
    """

    def __init__(self) -> None:
        self._chunks: list[list[Part[Item]]] = []  # ascending, none of them empty
        self._seconds: list[list[float]] = []  # of each part
        self._sums: list[float] = []
        self._rows: list[int] = []  # sums, too

    def __iter__(self) -> Iterator[Part[Item]]:
        return itertools.chain.from_iterable(self._chunks)

    @property
    def seconds(self) -> float:
        """Device time of all."""
        return sum(self._sums)

    def seconds_before(self, order: float) -> float:
        """Device time of the requests whose order isn't later than this."""
        at, place = self._end_of(order)
        if at == len(self._chunks):
            return self.seconds
        return sum(self._sums[:at]) + sum(self._seconds[at][:place])

    def rows_before(self, order: float) -> int:
        """Rows of the requests whose order isn't later than this."""
        at, place = self._end_of(order)
        own = self._chunks[at][:place] if place else ()
        return sum(self._rows[:at]) + sum(part.num_rows for part in own)

    def seconds_of_first(self, num_rows: int) -> float:
        """Device time of so many rows that come first; of a request that they end in, its share."""
        seconds, left = 0.0, num_rows
        chunks = zip(self._chunks, self._seconds, self._sums, self._rows, strict=True)
        for parts, prices, total, rows in chunks:
            if rows <= left:
                seconds, left = seconds + total, left - rows
                continue
            for part, price in zip(parts, prices, strict=True):
                taken = min(left, part.num_rows)
                seconds, left = seconds + price * taken / part.num_rows, left - taken
            break
        return seconds

    def _end_of(self, order: float) -> tuple[int, int]:
        """The chunk in which what isn't later than this ends, and the place there."""
        key = (order, math.inf)
        at = bisect.bisect_left(self._chunks, key, key=_last_place)
        if at == len(self._chunks):
            return at, 0
        return at, bisect.bisect_left(self._chunks[at], key, key=_place)

    def insert(self, part: Part[Item], seconds: float) -> None:
        """Queues a part that takes so much device time."""
        if not self._chunks:
            self._chunks, self._seconds, self._sums = [[part]], [[seconds]], [seconds]
            self._rows = [part.num_rows]
            return
        at = min(bisect.bisect_left(self._chunks, _place(part), key=_last_place), len(self._chunks) - 1)
        parts, prices = self._chunks[at], self._seconds[at]
        place = bisect.bisect_left(parts, _place(part), key=_place)
        parts.insert(place, part)
        prices.insert(place, seconds)
        self._sums[at] = sum(prices)
        self._rows[at] += part.num_rows
        if len(parts) > 2 * _CHUNK_PARTS:
            self._chunks[at : at + 1] = [parts[:_CHUNK_PARTS], parts[_CHUNK_PARTS:]]
            self._seconds[at : at + 1] = [prices[:_CHUNK_PARTS], prices[_CHUNK_PARTS:]]
            self._sums[at : at + 1] = [sum(half) for half in self._seconds[at : at + 2]]
            self._rows[at : at + 1] = [sum(p.num_rows for p in half) for half in self._chunks[at : at + 2]]

    def remove(self, part: Part[Item]) -> None:
        """Takes out a part that is queued."""
        at = bisect.bisect_left(self._chunks, _place(part), key=_last_place)
        parts, prices = self._chunks[at], self._seconds[at]
        place = bisect.bisect_left(parts, _place(part), key=_place)
        assert parts[place] is part
        del parts[place], prices[place]
        if parts:
            self._sums[at] = sum(prices)
            self._rows[at] -= part.num_rows
        else:
            del self._chunks[at], self._seconds[at], self._sums[at], self._rows[at]


def _place(part: Part) -> tuple[float, int, int]:
    return (*part.ticket.order, part.begin)


def _last_place(parts: list[Part]) -> tuple[float, int, int]:
    return _place(parts[-1])
