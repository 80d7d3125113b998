"""One thread a device, shared by all models: `DevicePool`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from xlarank.errors import DeadlineError, ExecutionError, OverloadError, UnavailableError
from xlarank.runtime.batcher import Batch, Batcher
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.device_health import DeviceHealth, DeviceState, DeviceStatus, Suspicion
from xlarank.runtime.pool_metrics import REFUSALS, DeviceSnapshot, PoolSnapshot, QueueSnapshot
from xlarank.runtime.scheduler import BatcherMaker, ModelQueue, Scheduler, Turn
from xlarank.spec import FaultConfig, RequestOptions
from xlarank.spec.serving import QueueConfig

__all__ = ["DevicePool", "Workload"]

_log = logging.getLogger(__name__)

_LEAST_TICK_SECONDS = 0.001

_REFUSAL_OF = {OverloadError: "queue_full", DeadlineError: "deadline", UnavailableError: "no_device"}


class Workload(Protocol):
    """A model's part. The pool calls it without holding its lock."""

    def run(self, batch: Batch, device_index: int) -> Any:
        """Runs what is still waited for of a batch; raises when it fails or gives scores that aren't finite.

        What `answer` takes; its `is_whole` tells whether that was all. None if it was nothing.
        """
        ...

    def answer(self, result: Any) -> None:
        """Answers the requests of a batch that has run."""
        ...

    def isolate(self, batch: Batch, device_index: int, error: Exception) -> None:
        """Answers a batch that fails with `error` on devices that work: who is at fault, and the others."""
        ...

    def fail(self, items: Sequence[Any], error: Exception) -> None:
        """Answers requests that will not be run, or not to their end."""
        ...

    def fail_late(self, item: Any) -> None:
        """Answers a request whose deadline passed, or would have, before it was run to its end."""
        ...

    def probe(self, device_index: int) -> None:
        """Raises when a golden replay on the device fails."""
        ...


class DevicePool:
    """Drives a `Scheduler` with threads: one a device, one turn at a time on each, and one for deadlines.

    Devices that fail are taken out of service as `DeviceHealth` says.
    """

    def __init__(
        self,
        num_devices: int,
        *,
        costs: Sequence[float] | None = None,
        faults: FaultConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_batcher: BatcherMaker = Batcher,
    ) -> None:
        """Starts the threads.

        Args:
          num_devices: one thread each.
          costs, make_batcher: see `Scheduler`.
          faults: see `DeviceHealth`; `FaultConfig()` by default.
          clock: seconds, monotonic.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # a device may have something to do
        self._timer = threading.Condition(self._lock)  # the time to wake may have come nearer
        # All below guarded by _lock.
        self._scheduler: Scheduler[Any] = Scheduler(num_devices, costs=costs, make_batcher=make_batcher)
        self._health = DeviceHealth(num_devices, faults or FaultConfig())
        self._suspicions: list[Suspicion] = []  # to be judged by another device
        self._workloads: dict[ModelQueue, Workload] = {}
        self._refusals: dict[ModelQueue, Counter[str]] = {}
        self._errands: list[deque[Callable[[], None]]] = [deque() for _ in range(num_devices)]
        self._asides = [math.inf] * num_devices  # since when a device does something that is no turn
        self._timer_at = math.inf  # when the timer wakes by itself
        self._num_turned_away = 0
        self._was_uniform = True  # at the last change
        self._is_closed = False  # moves one way
        self._threads = [
            threading.Thread(target=self._serve, args=(index,), name=f"xlarank-device-{index}", daemon=True)
            for index in range(num_devices)
        ]
        self._threads.append(threading.Thread(target=self._keep_time, name="xlarank-timer", daemon=True))
        self.num_devices = num_devices
        for thread in self._threads:
            thread.start()

    @property
    def fault(self) -> str | None:
        """Why no device can be used; None while one can."""
        with self._lock:
            if self._scheduler.num_healthy:
                return None
            reasons = [f"{index}: {s.reason}" for index, s in enumerate(self._health.statuses())]
        return f"no device is healthy ({'; '.join(reasons)})"

    def statuses(self) -> list[DeviceStatus]:
        """Health by device."""
        with self._lock:
            return self._health.statuses()

    def attach(
        self,
        workload: Workload,
        name: str,
        plans: Sequence[BucketPlan],
        config: QueueConfig,
        *,
        version: int = 0,
    ) -> ModelQueue:
        """Lets a model take part; see `Scheduler.attach`."""
        with self._lock:
            queue = self._scheduler.attach(name, plans, config, version=version)
            self._workloads[queue] = workload
            self._refusals[queue] = Counter(dict.fromkeys(REFUSALS, 0))
            return queue

    def detach(self, queue: ModelQueue) -> None:
        """Takes a model out; turns under way finish. Idempotent."""
        with self._lock:
            self._scheduler.detach(queue)
            self._workloads.pop(queue, None)
            self._refusals.pop(queue, None)

    def submit(self, queue: ModelQueue, item: Any, num_rows: int, options: RequestOptions) -> None:
        """Queues a request and wakes a device.

        Raises:
          UnavailableError: if the pool is closed, the model isn't attached, or no device is healthy.
          OverloadError, DeadlineError: see `Scheduler.submit`.
        """
        with self._lock:
            if self._is_closed or queue not in self._workloads:
                raise UnavailableError(f"model {queue.name!r} is closed")
            try:
                self._scheduler.submit(queue, item, num_rows, options, self._clock())
            except tuple(_REFUSAL_OF) as error:
                self._refusals[queue][_REFUSAL_OF[type(error)]] += 1
                raise
            if self._scheduler.is_uniform:
                self._work.notify()  # whichever it is may take it; one that may not would lose the call
            self._on_change()
            self._set_timer()

    def overload(self, num_arriving: int) -> OverloadError | None:
        """What a request is to be refused with before it is read, for there is no room for it; None if there
        may be. See `Scheduler.overload`."""
        with self._lock:
            refusal = self._scheduler.overload(num_arriving, self._clock())
            self._num_turned_away += refusal is not None
            return refusal

    def run_between(self, device_index: int, errand: Callable[[], None]) -> None:
        """Has a device's thread do something after the turn that it is at, before the next one.

        Args:
          device_index: which; where it comes to hang, the errand waits for it to come back.
          errand: never raises; short, as requests wait meanwhile.

        Raises:
          UnavailableError: if the pool is closed, or the device hangs.
        """
        with self._lock:
            if self._is_closed:
                raise UnavailableError("the devices' threads have ended")
            if self._health.is_away(device_index):
                raise UnavailableError(f"device {device_index} hangs")
            self._errands[device_index].append(errand)
            self._work.notify_all()

    def drop(self, queue: ModelQueue, item: Any) -> None:
        """Forgets what is still queued of a request whose caller has gone, or that has been answered."""
        with self._lock:
            queue.batcher.drop(item)

    def cancel(self, queue: ModelQueue, item: Any) -> None:
        """As `drop`, for a caller that has gone; counted if it was queued."""
        with self._lock:
            if queue.batcher.drop(item) and queue in self._refusals:
                self._refusals[queue]["canceled"] += 1

    def snapshot(self) -> PoolSnapshot:
        """For metrics."""
        with self._lock:
            now = self._clock()
            queues = [
                QueueSnapshot(
                    queue.name,
                    queue.version,
                    queue.batcher.num_queued_rows,
                    queue.batcher.num_queued_requests,
                    queue.batcher.queued_seconds,
                    dict(self._refusals[queue]),
                )
                for queue in self._scheduler.queues
            ]
            devices = [
                DeviceSnapshot(status, *self._scheduler.use_of(index, now))
                for index, status in enumerate(self._health.statuses())
            ]
        return PoolSnapshot(queues, devices, self._num_turned_away)

    def close(self) -> None:
        """Finishes what is queued, then stops the threads; one that hangs is left behind."""
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
            self._timer.notify()
        for index in range(self.num_devices):
            while not self._has_ended(index):
                self._threads[index].join(0.1)
        self._threads[-1].join()

    def _has_ended(self, index: int) -> bool:
        """Whether a device's thread is through, or hangs and is left behind. With or without the lock."""
        return not self._threads[index].is_alive() or self._health.is_away(index)

    def is_away(self, device_index: int) -> bool:
        """Whether a device hangs in a batch."""
        with self._lock:
            return self._health.is_away(device_index)

    # Device threads

    def _serve(self, index: int) -> None:
        while (task := self._take(index)) is not None:
            task()
            del task  # it refers to a model, whose memory must not wait for this device's next task

    def _take(self, index: int) -> Callable[[], None] | None:
        """What a device's thread does next; None when it ends."""
        with self._lock:
            while True:
                now = self._clock()
                task = self._judgement(index) or self._aside(index, now)
                if task is None and (turn := self._scheduler.next_turn(index, now)) is not None:
                    workload = self._workloads[turn.queue]
                    task = lambda turn=turn, workload=workload: self._run(turn, workload)  # noqa: E731
                self._set_timer()
                if task is not None:
                    self._on_change()
                    return task
                if self._is_closed and not self._scheduler.num_queued_requests and not self._suspicions:
                    return None
                self._work.wait()

    def _aside(self, index: int, now: float) -> Callable[[], None] | None:
        """A probe or an errand, as if it were a turn: the device is not free, and may hang in it."""
        task = self._probing(index, now)
        if task is None and self._errands[index]:
            task = self._errands[index].popleft()
        if task is None:
            return None
        self._asides[index] = now
        self._scheduler.set_aside(index, True)

        def run() -> None:
            task()
            with self._lock:
                self._asides[index] = math.inf
                self._scheduler.set_aside(index, False)
                self._health.back(index)
                self._work.notify_all()

        return run

    def _run(self, turn: Turn, workload: Workload) -> None:
        """One turn of the scheduler."""
        try:
            result = workload.run(turn.batch, turn.device)
        except Exception as error:  # the boundary of a device's thread: a batch may fail, the thread not
            if self._end(turn):
                _log.exception("device %d: a batch of model %s failed", turn.device, turn.queue.name)
                self._suspect(turn, workload, error)
            return
        if self._end(turn):
            workload.answer(result)

    def _end(self, turn: Turn) -> bool:
        """Frees the turn's device; False if the watchdog has given it up meanwhile, and its batch away."""
        with self._lock:
            is_own = self._scheduler.turn_of(turn.device) is turn
            self._scheduler.finished(turn, self._clock())
            self._health.back(turn.device)
            self._on_change()
            return is_own

    def _suspect(self, turn: Turn, workload: Workload, error: Exception) -> None:
        """Whose fault was it? Another device will tell, or this one alone."""
        suspicion = Suspicion(turn, workload, error, has_hung=False)
        with self._lock:
            if self._scheduler.num_healthy > 1:
                self._health.suspect(turn.device, suspicion.reason)
                self._scheduler.set_suspended(turn.device, True)
                self._suspicions.append(suspicion)
                self._work.notify_all()
                return
            retry = self._scheduler.retry(turn, turn.device, self._clock())
        self._judge_alone(suspicion, retry)

    def _judgement(self, index: int) -> Callable[[], None] | None:
        """A suspicion that this device clears up: as another one that works, or because none is left."""
        for suspicion in self._suspicions:
            accused = suspicion.turn.device
            if index != accused and self._health.state(index) is DeviceState.HEALTHY:
                self._suspicions.remove(suspicion)
                turn = self._scheduler.retry(suspicion.turn, index, self._clock())
                return lambda: self._judge(suspicion, turn)
            if index == accused and not self._health.num_healthy and not suspicion.has_hung:
                self._suspicions.remove(suspicion)
                turn = self._scheduler.retry(suspicion.turn, index, self._clock())
                return lambda: self._judge_alone(suspicion, turn)
        return None

    def _judge(self, suspicion: Suspicion, turn: Turn) -> None:
        """Runs a batch that another device failed with."""
        workload, accused = suspicion.workload, suspicion.turn.device
        try:
            result = workload.run(turn.batch, turn.device)
        except Exception as error:
            _log.warning("device %d: the batch that device %d failed with failed too", turn.device, accused)
            if suspicion.has_hung:
                both = ExecutionError(f"{suspicion.reason}; on another device: {error}")
                workload.fail([part.item for part in turn.batch.parts], both)
            else:
                self._acquit(accused)
                workload.isolate(turn.batch, turn.device, error)
            self._end(turn)
            return
        if self._end(turn):
            if not suspicion.has_hung:
                if result is not None and result.is_whole:
                    self._quarantine(accused, suspicion.reason)
                else:  # what is no longer waited for may have been at fault: its next batch will tell
                    self._acquit(accused)
            workload.answer(result)

    def _judge_alone(self, suspicion: Suspicion, turn: Turn) -> None:
        """The same without another device: a golden replay tells whether this one works.

        If it does, the batch gets the second run that another device would have given it: what fails but once
        is nobody's fault.
        """
        workload = suspicion.workload
        try:
            workload.probe(turn.device)
        except Exception as error:
            _log.exception("device %d: golden replay failed", turn.device)
            if self._end(turn):
                self._quarantine(turn.device, f"{suspicion.reason}; golden replay: {error}")
                self._give_up([part.item for part in turn.batch.parts], workload)
            return
        self._acquit(turn.device)
        try:
            result = workload.run(turn.batch, turn.device)
        except Exception as error:
            workload.isolate(turn.batch, turn.device, error)
            self._end(turn)
            return
        if self._end(turn):
            _log.warning("device %d: a batch failed once, and not again: %s", turn.device, suspicion.reason)
            workload.answer(result)

    def _probing(self, index: int, now: float) -> Callable[[], None] | None:
        if self._is_closed or not self._health.should_probe(index, now):
            return None
        workloads = list(self._workloads.values())
        return lambda: self._probe(index, workloads)

    def _probe(self, index: int, workloads: Sequence[Workload]) -> None:
        try:
            for workload in workloads:
                workload.probe(index)
        except Exception as error:
            _log.warning("device %d: still quarantined: %s", index, error)
            with self._lock:
                self._health.probe_failed(index, str(error), self._clock())
                self._set_timer()
            return
        _log.warning("device %d: works again", index)
        self._acquit(index)

    def _acquit(self, index: int) -> None:
        with self._lock:
            self._health.acquit(index)
            self._scheduler.set_suspended(index, False)
            self._scheduler.set_healthy(index, True)
            self._work.notify_all()

    def _quarantine(self, index: int, reason: str, *, is_away: bool = False) -> None:
        _log.error("device %d is quarantined: %s", index, reason)
        stranded: list[tuple[Workload, list[Any]]] = []
        with self._lock:
            self._health.quarantine(index, reason, self._clock(), is_away=is_away)
            self._scheduler.set_suspended(index, False)
            self._scheduler.set_healthy(index, False)
            if not self._scheduler.num_healthy:  # nobody is left to run what is queued
                stranded = [(self._workloads[queue], items) for queue, items in self._scheduler.clear()]
                for suspicion in self._suspicions:
                    items = [part.item for part in suspicion.turn.batch.parts]
                    stranded.append((suspicion.workload, items))
                self._suspicions.clear()
            self._work.notify_all()
            self._set_timer()
        for workload, items in stranded:
            self._give_up(items, workload)

    def _give_up(self, items: Sequence[Any], workload: Workload) -> None:
        workload.fail(items, UnavailableError(self.fault or "the device failed; try again"))

    def _on_change(self) -> None:
        """Which device may take what may depend on what the others do.

        Once more when it no longer does: a device that waits may have looked while it did.
        """
        is_uniform = self._scheduler.is_uniform
        if self._is_closed or not (is_uniform and self._was_uniform):
            self._work.notify_all()
        self._was_uniform = is_uniform

    # The timer's thread

    def _wake_at(self) -> float:
        starts = [turn.started_at for turn in self._scheduler.turns()]
        starts += [since for index, since in enumerate(self._asides) if not self._health.is_away(index)]
        hang_at = min(starts, default=math.inf) + self._health.config.watchdog_seconds
        return min(self._scheduler.wake_at(), self._health.wake_at(), hang_at)

    def _set_timer(self) -> None:
        if self._wake_at() < self._timer_at:
            self._timer.notify()

    def _keep_time(self) -> None:
        """Answers late requests in time, ends deferrals, has devices probed, and finds those that hang."""
        while True:
            with self._lock:
                now = self._clock()
                taken = self._scheduler.take_late(now)
                late = [(self._workloads[queue], item) for queue, item in taken]
                for queue, _ in taken:
                    self._refusals[queue]["late"] += 1
                since = now - self._health.config.watchdog_seconds
                hung = [turn for turn in self._scheduler.turns() if turn.started_at <= since]
                stuck = [
                    i for i, at in enumerate(self._asides) if at <= since and not self._health.is_away(i)
                ]
                if not late and not hung and not stuck:
                    if self._is_closed and all(map(self._has_ended, range(self.num_devices))):
                        return
                    self._wait(now)
            for workload, item in late:
                workload.fail_late(item)
            for turn in hung:
                self._on_hang(turn)
            for index in stuck:
                self._on_stuck(index)

    def _wait(self, now: float) -> None:
        wake_at = self._wake_at()
        seconds = wake_at - now
        if seconds <= 0:  # a deferral has ended, or a probe is due: devices see to it
            self._work.notify_all()
            seconds = _LEAST_TICK_SECONDS
        if self._is_closed:
            seconds = min(seconds, 0.1)
        self._timer_at = wake_at
        self._timer.wait(None if seconds == math.inf else seconds)
        self._timer_at = -math.inf  # looks again before it waits again

    def _on_stuck(self, index: int) -> None:
        """A device hasn't come back from a probe, or from a run of a version that is being proven."""
        reason = f"a golden replay took more than {self._health.config.watchdog_seconds:g} s"
        with self._lock:
            if self._asides[index] == math.inf:
                return  # it has just come back
        self._quarantine(index, reason, is_away=True)

    def _on_hang(self, turn: Turn) -> None:
        """A device hasn't come back from its batch: it goes to another, once."""
        reason = f"a batch took more than {self._health.config.watchdog_seconds:g} s"
        with self._lock:
            if self._scheduler.turn_of(turn.device) is not turn:
                return  # it has just come back
            workload = self._workloads.get(turn.queue)  # None: its callers have left, and it was closed
            may_retry = not turn.is_retry and self._scheduler.num_healthy > 1
            if workload is not None and may_retry:
                hang = Suspicion(turn, workload, ExecutionError(reason), has_hung=True)
                self._suspicions.append(hang)
        self._quarantine(turn.device, reason, is_away=True)
        if workload is not None and not may_retry:
            items = [part.item for part in turn.batch.parts]
            workload.fail(items, ExecutionError(f"model {turn.queue.name!r}: {reason}"))
