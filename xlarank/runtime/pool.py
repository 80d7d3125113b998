"""One thread a device, shared by all models: `DevicePool`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from xlarank.errors import UnavailableError
from xlarank.runtime.batcher import Batch
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.queue_config import QueueConfig
from xlarank.runtime.scheduler import ModelQueue, Scheduler, Turn
from xlarank.spec import RequestOptions

__all__ = ["DevicePool", "Workload"]


_LEAST_TICK_SECONDS = 0.001


class Workload(Protocol):
    """A model's part: what the pool asks for without holding its lock."""

    def run(self, batch: Batch, device_index: int) -> None:
        """Runs one batch on the device and answers its requests; never raises."""
        ...

    def fail_late(self, item: Any) -> None:
        """Answers a request whose deadline passed, or would have, before it was run to its end."""
        ...


class DevicePool:
    """Drives a `Scheduler` with threads: one a device, one turn at a time on each, and one for deadlines."""

    def __init__(
        self,
        num_devices: int,
        *,
        costs: Sequence[float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the threads.

        Args:
          num_devices: one thread each.
          costs: see `Scheduler`.
          clock: seconds, monotonic.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # a device may have something to do
        self._timer = threading.Condition(self._lock)  # the earliest deadline may have changed
        # All below guarded by _lock.
        self._scheduler: Scheduler[Any] = Scheduler(num_devices, costs=costs)
        self._workloads: dict[ModelQueue, Workload] = {}
        self._timer_at = math.inf  # when the timer wakes by itself
        self._is_closed = False  # moves one way
        self._threads = [
            threading.Thread(target=self._serve, args=(index,), name=f"xlarank-device-{index}", daemon=True)
            for index in range(num_devices)
        ]
        self._threads.append(threading.Thread(target=self._keep_time, name="xlarank-timer", daemon=True))
        self.num_devices = num_devices
        for thread in self._threads:
            thread.start()

    def attach(
        self, workload: Workload, name: str, plans: Sequence[BucketPlan], config: QueueConfig
    ) -> ModelQueue:
        """Lets a model take part; see `Scheduler.attach`."""
        with self._lock:
            queue = self._scheduler.attach(name, plans, config)
            self._workloads[queue] = workload
            return queue

    def detach(self, queue: ModelQueue) -> None:
        """Takes a model out; turns under way finish. Idempotent."""
        with self._lock:
            self._scheduler.detach(queue)
            self._workloads.pop(queue, None)

    def submit(self, queue: ModelQueue, item: Any, num_rows: int, options: RequestOptions) -> None:
        """Queues a request and wakes a device.

        Raises:
          UnavailableError: if the pool is closed, the model isn't attached, or no device is healthy.
          OverloadError, DeadlineError: see `Scheduler.submit`.
        """
        with self._lock:
            if self._is_closed or queue not in self._workloads:
                raise UnavailableError(f"model {queue.name!r} is closed")
            self._scheduler.submit(queue, item, num_rows, options, self._clock())
            if self._scheduler.is_uniform:
                self._work.notify()
            self._on_change()
            self._set_timer()

    def drop(self, queue: ModelQueue, item: Any) -> None:
        """Forgets what is still queued of a request whose caller has gone."""
        with self._lock:
            queue.batcher.drop(item)

    def close(self) -> None:
        """Finishes what is queued, then stops the threads."""
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
            self._timer.notify()
        for thread in self._threads:
            thread.join()

    def _serve(self, index: int) -> None:
        """A device's thread."""
        while (taken := self._take(index)) is not None:
            workload, turn = taken
            workload.run(turn.batch, index)
            with self._lock:
                self._scheduler.finished(turn, self._clock())
                self._on_change()

    def _take(self, index: int) -> tuple[Workload, Turn] | None:
        with self._lock:
            while True:
                turn = self._scheduler.next_turn(index, self._clock())
                self._set_timer()
                if turn is not None:
                    self._on_change()
                    return self._workloads[turn.queue], turn
                if self._is_closed and not self._scheduler.num_queued_requests:
                    return None
                self._work.wait()

    def _on_change(self) -> None:
        """Which device may take what may depend on what the others do."""
        if self._is_closed or not self._scheduler.is_uniform:
            self._work.notify_all()

    def _set_timer(self) -> None:
        if self._scheduler.wake_at() < self._timer_at:
            self._timer.notify()

    def _keep_time(self) -> None:
        """The timer's thread: answers late requests when they are late, and ends deferrals."""
        while True:
            with self._lock:
                late = [
                    (self._workloads[queue], item) for queue, item in self._scheduler.take_late(self._clock())
                ]
                if not late:
                    if self._is_closed:
                        return
                    wake_at = self._scheduler.wake_at()
                    seconds = wake_at - self._clock()
                    if seconds <= 0:  # a deferral has ended: devices see to it
                        self._work.notify_all()
                        seconds = _LEAST_TICK_SECONDS
                    self._timer_at = wake_at
                    self._timer.wait(None if seconds == math.inf else seconds)
                    self._timer_at = -math.inf  # looks again before it waits again
            for workload, item in late:
                workload.fail_late(item)
