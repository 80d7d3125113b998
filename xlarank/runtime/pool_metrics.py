"""What devices and queues are doing, for Prometheus: `PoolMetrics`.

xlarank_queue_rows                    rows accepted and not yet running, by `model` and `version`
xlarank_queue_requests                requests of which some are
xlarank_queue_seconds                 device time that they are predicted to take
xlarank_queue_refusals_total          requests that were refused or dropped unrun, by `reason`:
                                      queue_full, deadline (refused on arrival), late (dropped from the
                                      queue), canceled (by the caller), no_device
xlarank_turned_away_total             requests that were refused before they were read: no queue had room
xlarank_device_state                  1 for the state that a `device` is in, 0 for the others, by `state`
xlarank_device_rows                   rows that a `device` runs, or that wait for it alone
xlarank_device_busy_seconds_total     time that it ran batches, by `device`
xlarank_device_batches_total          batches that it ran
xlarank_device_slowdown               what its batches take, over what was measured at the load
xlarank_device_quarantines_total      times that it was taken out of service
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xlarank.errors import DeadlineError, OverloadError, UnavailableError, XlarankError
from xlarank.runtime.device_health import DeviceState, DeviceStatus
from xlarank.runtime.model_queue import ModelQueue
from xlarank.runtime.scheduler import Scheduler

__all__ = [
    "REFUSALS",
    "DeviceSnapshot",
    "PoolMetrics",
    "PoolSnapshot",
    "QueueSnapshot",
    "Refusals",
    "snapshot_of",
]

REFUSALS = ("queue_full", "deadline", "late", "canceled", "no_device")
"""Why a request isn't run: refused on arrival for the queue's or its deadline's sake; dropped from the queue
at its deadline, or as its caller left; no device is healthy."""

_REFUSAL_OF = {OverloadError: "queue_full", DeadlineError: "deadline", UnavailableError: "no_device"}


class Refusals:
    """Counts requests that aren't run. Its owner serialises the calls.

    Attributes:
      num_turned_away: those that were refused before they were read.
    """

    def __init__(self) -> None:
        self.num_turned_away = 0
        self._counts: weakref.WeakKeyDictionary[ModelQueue[Any], Counter[str]] = weakref.WeakKeyDictionary()

    def add(self, queue: ModelQueue[Any], reason: str) -> None:
        """One more of a queue's, for one of `REFUSALS`."""
        self._counts.setdefault(queue, Counter())[reason] += 1

    def refuse(self, queue: ModelQueue[Any], error: XlarankError) -> None:
        """One more, which the scheduler refused with this."""
        self.add(queue, _REFUSAL_OF[type(error)])

    def of(self, queue: ModelQueue[Any]) -> dict[str, int]:
        """A queue's so far, by reason."""
        counts = self._counts.get(queue, {})
        return {reason: counts.get(reason, 0) for reason in REFUSALS}


@dataclasses.dataclass(frozen=True)
class QueueSnapshot:
    """One model's queue."""

    name: str
    version: int
    num_rows: int
    num_requests: int
    seconds: float
    """Device time that they are predicted to take."""

    refusals: Mapping[str, int]
    """Requests refused or dropped unrun, by reason; see `REFUSALS`."""


@dataclasses.dataclass(frozen=True)
class DeviceSnapshot:
    """One device."""

    status: DeviceStatus
    num_batches: int
    busy_seconds: float
    slowdown: float
    """What its batches take, over what was measured at the load."""

    num_rows: int
    """Rows that it runs, or that wait for it alone."""


@dataclasses.dataclass(frozen=True)
class PoolSnapshot:
    """A pool at one moment."""

    queues: Sequence[QueueSnapshot]
    devices: Sequence[DeviceSnapshot]
    num_turned_away: int = 0
    """Requests refused before they were read, so that their model isn't known."""


def snapshot_of(
    scheduler: Scheduler[Any],
    statuses: Sequence[DeviceStatus],
    refusals: Refusals,
    now: float,
) -> PoolSnapshot:
    """What a pool knows of its devices and queues."""
    queues = [
        QueueSnapshot(
            queue.name,
            queue.version,
            queue.batcher.num_queued_rows,
            queue.batcher.num_queued_requests,
            queue.batcher.queued_seconds,
            refusals.of(queue),
        )
        for queue in scheduler.queues
    ]
    devices = [DeviceSnapshot(status, *scheduler.use_of(index, now)) for index, status in enumerate(statuses)]
    return PoolSnapshot(queues, devices, refusals.num_turned_away)


class PoolMetrics(Collector):
    """Asks a pool at each scrape."""

    def __init__(self, snapshot: Callable[[], PoolSnapshot]) -> None:
        """
        Args:
          snapshot: `DevicePool.snapshot`.
        """
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        snapshot = self._snapshot()
        labels = ["model", "version"]
        rows = GaugeMetricFamily("xlarank_queue_rows", "Rows accepted and not yet running", labels=labels)
        requests = GaugeMetricFamily("xlarank_queue_requests", "Requests with such rows", labels=labels)
        seconds = GaugeMetricFamily(
            "xlarank_queue_seconds", "Device time that queued rows are predicted to take", labels=labels
        )
        refusals = CounterMetricFamily(
            "xlarank_queue_refusals", "Requests refused or dropped unrun", labels=[*labels, "reason"]
        )
        for queue in snapshot.queues:
            own = [queue.name, str(queue.version)]
            rows.add_metric(own, queue.num_rows)
            requests.add_metric(own, queue.num_requests)
            seconds.add_metric(own, queue.seconds)
            for reason, count in queue.refusals.items():
                refusals.add_metric([*own, reason], count)
        turned_away = CounterMetricFamily(
            "xlarank_turned_away",
            "Requests refused before they were read, as no queue had room",
            value=snapshot.num_turned_away,
        )
        yield from (rows, requests, seconds, refusals, turned_away)
        states = GaugeMetricFamily(
            "xlarank_device_state", "1 for the state that a device is in", labels=["device", "state"]
        )
        rows = GaugeMetricFamily(
            "xlarank_device_rows", "Rows that a device runs, or that wait for it alone", labels=["device"]
        )
        busy = CounterMetricFamily(
            "xlarank_device_busy_seconds", "Seconds that a device ran batches", labels=["device"]
        )
        batches = CounterMetricFamily(
            "xlarank_device_batches", "Batches that a device ran", labels=["device"]
        )
        slowdown = GaugeMetricFamily(
            "xlarank_device_slowdown", "Time of a device's batches over that at the load", labels=["device"]
        )
        quarantines = CounterMetricFamily(
            "xlarank_device_quarantines", "Times that a device was taken out of service", labels=["device"]
        )
        for index, device in enumerate(snapshot.devices):
            own = [str(index)]
            for state in DeviceState:
                states.add_metric([*own, state.value], float(device.status.state is state))
            rows.add_metric(own, device.num_rows)
            busy.add_metric(own, device.busy_seconds)
            batches.add_metric(own, device.num_batches)
            slowdown.add_metric(own, device.slowdown)
            quarantines.add_metric(own, device.status.num_quarantines)
        yield from (states, rows, busy, batches, slowdown, quarantines)
