"""What a pool's threads do, which no defect of ours ends: `device_thread`, `Timer`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from xlarank.runtime.complaints import Complaints

__all__ = ["DEFECT_SECONDS", "Task", "Timer", "device_thread"]

DEFECT_SECONDS = 1.0
"""So long a thread rests after a defect: it may come again at once."""

Task = Callable[[], object]


def device_thread(
    index: int,
    take: Callable[[int], Task | None],
    give_up: Callable[[int, Exception], None],
    complaints: Complaints,
) -> threading.Thread:
    """What does a device's tasks, one after another. Without it the device would look well and do nothing.

    Args:
      index: of the device.
      take: gives the next task, None at the end.
      give_up: told when `take` raises, which is asked again then.
      complaints: about tasks that raise.
    """

    def run() -> None:
        while True:
            try:
                task = take(index)
            except Exception as error:
                give_up(index, error)
                continue
            if task is None:
                return
            try:
                task()
            except Exception as error:
                line = "device %d: what followed a batch, or stood between two, failed"
                complaints.add(line, index, error=error)
            del task  # it refers to a model, whose memory must not wait for this device's next task

    return threading.Thread(target=run, name=f"xlarank-device-{index}", daemon=True)


class Timer:
    """Looks, waits until the next look is due or something comes before it, and looks again.

    A look that raises is logged, and the next one comes: without them no deadline ends and no device hangs.
    """

    def __init__(self, lock: threading.Lock, look: Callable[[], bool], complaints: Complaints) -> None:
        """
        Args:
          lock: its owner's.
          look: does what is due, calls `wait` with the lock, and returns whether another one is to come.
          complaints: about looks that raise.
        """
        self._look = look
        self._complaints = complaints
        self._lock = lock
        self._is_due = threading.Condition(lock)
        self._wakes_at = -math.inf  # guarded by the lock; -inf while it doesn't wait
        self._is_closing = False  # moves one way
        self._thread = threading.Thread(target=self._run, name="xlarank-timer", daemon=True)

    def start(self) -> None:
        """The first look comes now."""
        self._thread.start()

    def wait(self, wake_at: float, seconds: float) -> None:
        """Of a look: waits for so long, or until told of what comes before `wake_at`. Holds the lock."""
        self._wakes_at = wake_at
        self._is_due.wait(min(seconds, threading.TIMEOUT_MAX))
        self._wakes_at = -math.inf

    def tell(self, wake_at: float) -> None:
        """When something is due. Holds the lock."""
        if wake_at < self._wakes_at:
            self._is_due.notify()

    def close(self) -> None:
        """Waits for its last look; one that fails is the last."""
        self._is_closing = True
        self._thread.join()

    def _run(self) -> None:
        has_more = True
        while has_more:
            try:
                has_more = self._look()
            except Exception as error:  # a defect of ours
                self._complaints.add("the look at deadlines and devices that hang failed", error=error)
                has_more = not self._is_closing
                with self._lock:  # no tight loop
                    self._wakes_at = -math.inf
                    self._is_due.wait(DEFECT_SECONDS)
