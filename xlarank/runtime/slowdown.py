"""What runs take in place of what their bucket's price says: `Slowdown`."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["Slowdown"]

_ADAPT = 0.1
"""Share of the newest run."""

_STEPS = (0.5, 4.0)
"""One run counts as this many times what was expected at most: an odd one must not close the door, nor open
it, while a device that has become slow is believed in some tens of runs, however slow."""

_LEAST_SPREAD = 0.1
"""Of prices, over the mean one: runs that are more alike don't tell what others would take."""

_MOST_SPREADS = 4.0
"""So many standard deviations of prices beyond the mean one tells what was seen, and no further."""

_FADE_SECONDS = 10.0
"""Without a run what was learnt fades: nothing else would end a time in which all are refused for it."""


class Slowdown:
    """Learns from runs of one model on one device, one at a time. Pure: the owner hands in the time.

    Beyond the price of the mean run what counts is by how much runs of a greater price took longer, which is
    not less than the prices differ: small runs that take long for the host's sake say nothing of large ones,
    and who is let in by mistake teaches, who is refused doesn't.
    """

    def __init__(self) -> None:
        self._price = self._taken = 0.0  # of the mean run, in seconds
        self._variance = self._covariance = 0.0  # of prices; of prices and what was taken
        self._idle_since = math.inf  # inf while one runs

    def ratio(self, now: float) -> float:
        """Seconds taken over seconds priced, of the mean run."""
        if not self._price:
            return 1.0
        return 1.0 + (self._taken / self._price - 1.0) * self._kept(now)

    def seconds(self, price: float, now: float) -> float:
        """What a run of this price is expected to take."""
        return self.at(now)(price)

    def at(self, now: float) -> Callable[[float], float]:
        """`seconds` at a time."""
        mean, ratio, slope = self._price, self.ratio(now), self._slope(now)
        most = mean + _MOST_SPREADS * math.sqrt(self._variance)

        def seconds(price: float) -> float:
            if price <= mean:
                return price * ratio
            seen = min(price, most)
            return mean * ratio + (seen - mean) * slope + (price - seen)

        return seconds

    def _slope(self, now: float) -> float:
        """Seconds taken beyond the mean run over seconds priced beyond it: 1 unless more was seen."""
        if self._variance <= (_LEAST_SPREAD * self._price) ** 2:
            return 1.0
        seen = 1.0 + (self._covariance / self._variance - 1.0) * self._kept(now)
        return min(max(1.0, seen), max(1.0, self.ratio(now)))

    def _kept(self, now: float) -> float:
        """Share of what was learnt that has not faded."""
        return math.exp(-max(0.0, now - self._idle_since) / _FADE_SECONDS)

    def begin(self, now: float) -> None:
        """A run begins. Tell `end`."""
        self._covariance = self._variance + (self._covariance - self._variance) * self._kept(now)
        self._taken, self._idle_since = self._price * self.ratio(now), math.inf

    def end(self, now: float, *, price: float = 0.0, taken: float = 0.0) -> None:
        """It has ended; with a price its time is learnt from."""
        self._idle_since = now
        if not price:
            return
        expected = self.seconds(price, now)
        taken = min(_STEPS[1] * expected, max(_STEPS[0] * expected, taken))
        if not self._price:
            self._price = self._taken = price
        off, late = price - self._price, taken - self._taken
        self._price += _ADAPT * off
        self._taken += _ADAPT * late
        self._variance = (1 - _ADAPT) * (self._variance + _ADAPT * off * off)
        self._covariance = (1 - _ADAPT) * (self._covariance + _ADAPT * off * late)
