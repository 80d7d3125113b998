"""Which devices hang: `Watchdog`."""

from __future__ import annotations

import math

__all__ = ["Watchdog"]

_TICKS = 10
"""Looks in the time that a run may take: a pause of the process shorter than a tick may go unseen."""

_LEAST_GAP = 0.01
"""Of the time that a run may take: looks come late by that much in any case."""


class Watchdog:
    """Counts for a run only the time that its owner saw pass.

    Who looks later than it meant to was paused, and all else in the process was: a device that is well must
    not be accused of it. Pure: no thread, no clock.

    Attributes:
      seconds: that a run may take.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._starts: dict[int, float] = {}  # of what runs, by device
        self._looked_at = -math.inf
        self._due = math.inf  # when the next look is to come
        self._gaps: list[tuple[float, float]] = []  # that nobody watched, since the oldest of what runs began

    def begin(self, index: int, now: float) -> None:
        """A device begins a run; if it is the only one, the owner is to be woken."""
        if not self._starts:
            self._looked_at = now
            self._due = min(self._due, now + self.seconds / _TICKS)
        self._starts[index] = now

    def end(self, index: int) -> None:
        """It has come back, or is no longer waited for."""
        self._starts.pop(index, None)

    def is_running(self, index: int) -> bool:
        """Whether a device is in a run that is waited for."""
        return index in self._starts

    def look(self, now: float) -> list[int]:
        """Devices that hang. To be called whenever the owner wakes."""
        if now - self._due > _LEAST_GAP * self.seconds:
            self._gaps.append((self._due, now))
        oldest = min(self._starts.values(), default=math.inf)
        self._gaps = [(begin, end) for begin, end in self._gaps if end > oldest]
        self._looked_at = self._due = now
        return [index for index, started_at in self._starts.items() if now >= self._hang_at(started_at)]

    def rest(self, until: float) -> None:
        """The owner sleeps after its look."""
        self._due = until

    @property
    def wake_at(self) -> float:
        """When to look again at the latest; inf when nothing runs."""
        if not self._starts:
            return math.inf
        return min(*map(self._hang_at, self._starts.values()), self._looked_at + self.seconds / _TICKS)

    def _hang_at(self, started_at: float) -> float:
        gaps = sum(end - max(begin, started_at) for begin, end in self._gaps if end > started_at)
        return started_at + self.seconds + gaps
