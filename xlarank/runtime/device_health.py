"""Which devices can be trusted, and what is done about those that can't: `DeviceHealth`.

Contract
  - Pure: no threads, no clock. The pool serialises the calls and hands in the time.
  - A device whose batch failed, or gave scores that aren't finite, is *suspect* and gets no work until
    another device has run the same batch. Fine there: the first is quarantined. The same there: it's the
    data, if that device can be believed (see `Suspicions`) or golden requests run on it; both are fine then,
    and the batch is taken apart to find the requests at fault. Without another device, a golden replay
    decides instead, or one that succeeded within the last second, and then a second run.
  - A device that hasn't come back from a batch in `watchdog_seconds` (see `Watchdog`), or from a probe or a
    run of a version that is being proven, is quarantined, and another gets the batch. What it brings back
    later is thrown away. A batch that two devices hung in, or that fails on the second, is given up: it won't
    take down a third. Each run of the search for bad data is a batch of its own, and what hangs in it is
    given up alone. So is what wasn't answered yet of a batch whose answers a device hangs in.
  - A quarantined device is probed by golden replay, at first after `probe_seconds`, then at intervals that
    double up to `_MAX_PROBE_SECONDS`, and returns to service when a probe succeeds.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from xlarank.runtime.model_queue import Turn
from xlarank.spec import FaultConfig

__all__ = ["DeviceHealth", "DeviceState", "DeviceStatus", "Suspicion"]

_MAX_PROBE_SECONDS = 60.0


class DeviceState(enum.StrEnum):
    """What a device is trusted with."""

    HEALTHY = "healthy"
    """Gets work."""

    SUSPECT = "suspect"
    """Another device runs its last batch to see whose fault it was."""

    QUARANTINED = "quarantined"
    """Gets no work, and is probed."""


@dataclasses.dataclass(frozen=True)
class DeviceStatus:
    """One device, for metrics and messages."""

    state: DeviceState
    reason: str
    """Why it isn't healthy; empty for a healthy one."""

    num_quarantines: int
    """So far."""

    is_away: bool
    """Whether it hangs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Suspicion:
    """A batch that a device failed with, to be run by another."""

    turn: Turn[Any]
    workload: Any
    """The pool's, of the turn's model: that may have been detached when the batch is run again."""

    error: Exception
    has_hung: bool

    @property
    def reason(self) -> str:
        """What happened, in words."""
        return str(self.error) or type(self.error).__name__

    @property
    def items(self) -> list[Any]:
        """Whose requests are in the batch."""
        return [part.item for part in self.turn.batch.parts]


class _Device:
    def __init__(self) -> None:
        self.state = DeviceState.HEALTHY
        self.reason = ""
        self.suspicion: Suspicion | None = None  # what makes it a suspect
        self.num_quarantines = 0
        self.probe_at = math.inf
        self.probe_wait = 0.0
        self.is_away = False  # hangs in a batch: its thread can't probe it


class DeviceHealth:
    """See the contract at the top of the file."""

    def __init__(self, num_devices: int, config: FaultConfig) -> None:
        """All devices are healthy at first."""
        self._config = config
        self._devices = [_Device() for _ in range(num_devices)]

    @property
    def config(self) -> FaultConfig:
        """As given."""
        return self._config

    @property
    def num_healthy(self) -> int:
        """Devices that are neither suspect nor quarantined."""
        return sum(device.state is DeviceState.HEALTHY for device in self._devices)

    def statuses(self) -> list[DeviceStatus]:
        """By device."""
        return [DeviceStatus(d.state, d.reason, d.num_quarantines, d.is_away) for d in self._devices]

    @property
    def fault(self) -> str:
        """Why no device can be used, where that is so."""
        reasons = [f"{index}: {device.reason}" for index, device in enumerate(self._devices)]
        return f"no device is healthy ({'; '.join(reasons)})"

    def state(self, index: int) -> DeviceState:
        """Of one device."""
        return self._devices[index].state

    def suspect(self, suspicion: Suspicion) -> None:
        """A device's last batch failed; another device will tell."""
        device = self._devices[suspicion.turn.device]
        device.state, device.reason, device.suspicion = DeviceState.SUSPECT, suspicion.reason, suspicion

    def suspicion(self, index: int) -> Suspicion | None:
        """What makes a device a suspect; None if it is none."""
        return self._devices[index].suspicion

    def acquit(self, index: int) -> None:
        """It was the data, or a probe succeeded: the device gets work again."""
        device = self._devices[index]
        device.state, device.reason, device.suspicion = DeviceState.HEALTHY, "", None

    def quarantine(self, index: int, reason: str, now: float, *, is_away: bool = False) -> None:
        """Takes a device out of service until a probe succeeds.

        Args:
          index: of the device.
          reason: for people.
          now: seconds.
          is_away: it hangs, and can be probed only once it is `back`.
        """
        device = self._devices[index]
        device.num_quarantines += device.state is not DeviceState.QUARANTINED  # it may be so, and hang now
        device.state, device.reason, device.suspicion = DeviceState.QUARANTINED, reason, None
        device.is_away = is_away
        device.probe_wait = self._config.probe_seconds
        device.probe_at = now + device.probe_wait

    def is_away(self, index: int) -> bool:
        """Whether it hangs in a batch."""
        return self._devices[index].is_away

    def back(self, index: int) -> None:
        """A device that hung has come back from its batch."""
        self._devices[index].is_away = False

    def probe_failed(self, index: int, reason: str, now: float) -> None:
        """The next probe waits twice as long."""
        device = self._devices[index]
        device.reason = reason
        device.probe_wait = min(2 * device.probe_wait, _MAX_PROBE_SECONDS)
        device.probe_at = now + device.probe_wait

    def probe_at(self, index: int) -> float:
        """When it's time to try a device; inf for one that isn't quarantined, or hangs."""
        device = self._devices[index]
        is_due = device.state is DeviceState.QUARANTINED and not device.is_away
        return device.probe_at if is_due else math.inf
