"""Runs of a version that is being proven, between the batches of those that serve: `PacedRuns`."""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from xlarank import device
from xlarank.errors import ExecutionError, UnavailableError
from xlarank.runtime.device_health import DeviceState
from xlarank.runtime.pool import DevicePool

__all__ = ["PacedRuns"]

Result = TypeVar("Result")

_HOST_SHARE = 0.2
"""Of the time, for work that needs the interpreter, as everything that answers requests does."""

_MAX_HOST_REST_SECONDS = 1.0
"""What has queued up is answered within that."""

_IDLE_SECONDS = 0.05
"""Without a request for so long, nothing has queued up. At half of the load that a device takes, or more,
there are no such pauses."""

_REST_LOOK_SECONDS = 0.01
"""How often one who rests looks for that, and for what goes first."""

_LOOK_SECONDS = 1.0
"""How often one who waits for a device looks whether that still has a point."""


class PacedRuns:
    """Single runs, each on a device's own thread and for at most a small share of its time.

    A request waits at most for one of them, as it would for another request's batch; beside the batches they
    would share the cores with them and slow all of them down. One thread at a time may ask for runs.

    Nothing rests where there are no requests. Before a run or a piece, and all through a rest, it looks
    whether something else goes first.
    """

    def __init__(
        self,
        pool: DevicePool,
        *,
        share: float,
        check: Callable[[], None] = lambda: None,
        wait: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
          pool: of the devices.
          share: of a device's time, in (0, 1].
          check: raises what ends the work here, if something else goes first.
          wait: pauses for some seconds; true where nobody needs the runs any more.
          clock: seconds, monotonic.
        """
        self._pool = pool
        self._share = share
        self._check = check
        self._wait = wait
        self._clock = clock

    def can_prove(self, device_index: int) -> bool:
        """Whether a device works: one that doesn't would fail a version that is right. It replays the golden
        requests of all versions before it serves again."""
        return self._pool.statuses()[device_index].state is DeviceState.HEALTHY

    def beside(self, work: Callable[[], Result], /) -> Result:
        """Does a piece of the host's work here, then waits until that was a fifth of the time.

        At most a second. What has queued up meanwhile is answered before the next piece. A `device.Pace`.

        Raises:
          UnavailableError: if nobody needs it any more, or something else goes first.
        """
        self._check()
        start = self._clock()
        result = work()
        rest = _rest(self._clock() - start, _HOST_SHARE)
        self._rest(min(rest, _MAX_HOST_REST_SECONDS))
        return result

    def on(self, device_index: int) -> device.Pace:
        """What runs work on a device; after each run it waits as long as the share demands.

        It raises as `beside` does, and ExecutionError if the device hangs.
        """
        return functools.partial(self._run, device_index)

    def _run(self, device_index: int, work: Callable[[], Result], /) -> Result:
        self._check()
        done: Future[tuple[Result, float]] = Future()

        def errand() -> None:
            start = self._clock()
            try:
                result = work()
            except BaseException as error:  # the device's thread goes on; the caller is told
                done.set_exception(error)
            else:
                done.set_result((result, self._clock() - start))

        self._pool.run_between(device_index, errand)
        while not concurrent.futures.wait([done], timeout=_LOOK_SECONDS).done:
            if self._pool.statuses()[device_index].is_away:
                raise ExecutionError(f"device {device_index} hangs in a golden replay of it")
            if self._wait(0.0):
                raise _stopping()
        result, seconds = done.result()
        self._rest(_rest(seconds, self._share))
        return result

    def _rest(self, seconds: float) -> None:
        end = self._clock() + seconds
        while (rest := end - self._clock()) > 0 and self._pool.idle.seconds < _IDLE_SECONDS:
            if self._wait(min(rest, _REST_LOOK_SECONDS)):
                raise _stopping()
            self._check()


def _stopping() -> UnavailableError:
    return UnavailableError("the server is stopping")


def _rest(seconds: float, share: float) -> float:
    """Seconds after which work was that share of the time."""
    return seconds * (1 / share - 1)
