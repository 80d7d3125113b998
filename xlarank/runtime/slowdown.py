"""What runs take in place of what their bucket's price says: `Slowdown`."""

from __future__ import annotations

import math

__all__ = ["Slowdown"]

_ADAPT = 0.1
"""Share of the newest run."""

_STEPS = (0.5, 4.0)
"""One run counts as this many times what was expected at most: an odd one must not close the door, nor open
it, while a device that has become slow is believed in some tens of runs, however slow."""

_FADE_SECONDS = 10.0
"""Without a run what was learnt fades: nothing else would end a time in which all are refused for it."""


class Slowdown:
    """Learns from runs of one model on one device, one at a time. Pure: the owner hands in the time.

    Beyond the price of the mean run only its excess counts, not the ratio: small runs that take long for the
    host's sake say nothing of large ones, and who is let in by mistake teaches, who is refused doesn't.
    """

    def __init__(self) -> None:
        self._price = self._taken = 0.0  # of the mean run, in seconds
        self._idle_since = math.inf  # inf while one runs

    def ratio(self, now: float) -> float:
        """Seconds taken over seconds priced, of the mean run."""
        if not self._price:
            return 1.0
        idle_seconds = max(0.0, now - self._idle_since)
        return 1.0 + (self._taken / self._price - 1.0) * math.exp(-idle_seconds / _FADE_SECONDS)

    def seconds(self, price: float, now: float) -> float:
        """What a run of this price is expected to take."""
        return price + (self.ratio(now) - 1.0) * min(price, self._price)

    def begin(self, now: float) -> None:
        """A run begins. Tell `end`."""
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
        self._price += _ADAPT * (price - self._price)
        self._taken += _ADAPT * (taken - self._taken)
