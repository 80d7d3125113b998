"""One thread a device, shared by all models: `DevicePool`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from xlarank.errors import UnavailableError

__all__ = ["DevicePool", "Job", "Workload"]

Job = Callable[[], None]
"""Runs one batch on the device it was taken for and answers its requests; never raises."""


class Workload(Protocol):
    """A queue of work for devices. The pool calls it with its lock held, so it needs none of its own."""

    def next_job(self, device_index: int) -> Job | None:
        """What the free device should run now; None when nothing is queued for it."""
        ...


class DevicePool:
    """Runs workloads on devices, one job at a time on each.

    Workloads that wait for the same device take turns by the device time that they have used, so a
    heavy model can't starve a light one.
    """

    def __init__(self, num_devices: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the threads.

        Args:
          num_devices: one thread each.
          clock: seconds, monotonic.
        """
        self._clock = clock
        self._condition = threading.Condition()
        self._used_seconds: dict[Workload, float] = {}  # guarded by _condition
        self._is_closed = False  # guarded by _condition; moves one way
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"xlarank-device-{index}", daemon=True)
            for index in range(num_devices)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_devices(self) -> int:
        return len(self._threads)

    def attach(self, workload: Workload) -> None:
        """Lets a workload take part; it starts level with the least served one."""
        with self._condition:
            self._used_seconds[workload] = min(self._used_seconds.values(), default=0.0)

    def detach(self, workload: Workload) -> None:
        """Takes a workload out; jobs under way finish."""
        with self._condition:
            self._used_seconds.pop(workload, None)

    def submit(self, workload: Workload, enqueue: Callable[[], None]) -> None:
        """Runs `enqueue` under the pool's lock and wakes a device.

        Raises:
          UnavailableError: if the pool is closed or the workload isn't attached.
        """
        with self._condition:
            if self._is_closed or workload not in self._used_seconds:
                raise UnavailableError("the engine is closed")
            enqueue()
            self._condition.notify()

    def locked(self) -> threading.Condition:
        """The lock that workloads are called under, as a context manager."""
        return self._condition

    def close(self) -> None:
        """Finishes what is queued, then stops the threads."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        while (taken := self._take(index)) is not None:
            workload, job = taken
            start = self._clock()
            job()
            used = self._clock() - start
            with self._condition:
                if workload in self._used_seconds:
                    self._used_seconds[workload] += used

    def _take(self, index: int) -> tuple[Workload, Job] | None:
        with self._condition:
            while True:
                for workload in sorted(self._used_seconds, key=self._used_seconds.__getitem__):
                    job = workload.next_job(index)
                    if job is not None:
                        return workload, job
                if self._is_closed:
                    return None
                self._condition.wait()
