"""Who judges a device that failed with a batch, and who is believed: `Suspicions`.

Contract
  - Pure: no threads, no clock. The pool serialises the calls and hands in the time.
  - A suspicion waits for a healthy device other than the accused; where there is none, for the accused
    itself: as a suspect once golden requests have run on it, or as the only healthy device, which came back
    into service meanwhile by a probe. So some device clears it up as long as one is not quarantined.
  - Data is at fault only where a device that can be believed fails with it: golden requests of the model ran
    on it since the suspicion began or within the last second, or a batch of the model did within the last
    second, and since a request was last accused. So a stream of bad data has a device replay golden requests
    once a second at most, beside good data hardly ever; and devices that all fail with all that they
    run are found.
"""

from __future__ import annotations

import collections
import math
import weakref
from typing import Any

from xlarank.runtime.device_health import DeviceHealth, DeviceState, Suspicion
from xlarank.runtime.model_queue import ModelQueue, Turn

__all__ = ["Suspicions"]

_PROVEN_SECONDS = 1.0
"""For so long a golden replay speaks for a device: bad data that comes again and again must not have it
replayed each time."""


class _Record:
    """When things went well on devices, or not, with one model."""

    def __init__(self) -> None:
        self.ran_at: dict[int, float] = collections.defaultdict(lambda: -math.inf)
        self.replayed_at: dict[int, float] = collections.defaultdict(lambda: -math.inf)
        self.accused_at = -math.inf


class Suspicions:
    """See the contract at the top of the file."""

    def __init__(self, health: DeviceHealth) -> None:
        self._health = health
        self._waiting: list[Suspicion] = []
        self._judged: dict[Turn[Any], Suspicion] = {}  # by the turn that judges
        self._records: weakref.WeakKeyDictionary[ModelQueue[Any], _Record] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, suspicion: Suspicion) -> None:
        """Has it wait for a judge."""
        self._waiting.append(suspicion)

    def take(self, suspicion: Suspicion) -> bool:
        """No longer has it wait; False if it didn't."""
        is_waiting = suspicion in self._waiting
        if is_waiting:
            self._waiting.remove(suspicion)
        return is_waiting

    def clear(self) -> list[Suspicion]:
        """Gives up all that wait."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def next_for(self, index: int) -> Suspicion | None:
        """What a device clears up; the accused itself, as a suspect, if it `has_replayed`."""
        state, num_healthy = self._health.state(index), self._health.num_healthy
        for suspicion in self._waiting:
            is_accused = suspicion.turn.device == index
            if state is DeviceState.HEALTHY and (not is_accused or num_healthy == 1):
                return suspicion
            if self._health.suspicion(index) is suspicion and not num_healthy:
                return suspicion
        return None

    def begin(self, suspicion: Suspicion, turn: Turn[Any]) -> None:
        """A turn judges it."""
        self._judged[turn] = suspicion

    def end(self, turn: Turn[Any]) -> Suspicion | None:
        """A turn has ended, or has been given up: what it judged, if it did."""
        return self._judged.pop(turn, None)

    def ran(self, queue: ModelQueue[Any], index: int, now: float) -> None:
        """A batch ran well on a device."""
        self._record(queue).ran_at[index] = now

    def replayed(self, queue: ModelQueue[Any], index: int, now: float) -> None:
        """Golden requests ran well on a device."""
        self._record(queue).replayed_at[index] = now

    def accused(self, queue: ModelQueue[Any], now: float) -> None:
        """A request was found to be at fault."""
        self._record(queue).accused_at = now

    def has_replayed(self, index: int, suspicion: Suspicion, now: float) -> bool:
        """Whether golden requests ran well on a device: since, or just before."""
        return self._record(suspicion.turn.queue).replayed_at[index] >= _since(suspicion, now)

    def is_believed(self, index: int, suspicion: Suspicion, now: float) -> bool:
        """Whether data is at fault that a device fails with."""
        record = self._record(suspicion.turn.queue)
        is_lately = record.ran_at[index] >= _since(suspicion, now)
        has_run = is_lately and record.ran_at[index] > record.accused_at
        return has_run or self.has_replayed(index, suspicion, now)

    def _record(self, queue: ModelQueue[Any]) -> _Record:
        return self._records.setdefault(queue, _Record())


def _since(suspicion: Suspicion, now: float) -> float:
    return min(suspicion.turn.started_at, now - _PROVEN_SECONDS)
