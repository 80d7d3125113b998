"""One thread a device, shared by all models: `DevicePool`."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from xlarank.errors import ExecutionError, OverloadError, UnavailableError, XlarankError
from xlarank.runtime.batcher import Batcher
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.complaints import Complaints
from xlarank.runtime.device_health import DeviceHealth, DeviceState, DeviceStatus, Suspicion
from xlarank.runtime.isolation import Culprit, FaultSearch, Step
from xlarank.runtime.model_queue import ModelQueue, Turn
from xlarank.runtime.pool_metrics import PoolSnapshot, Refusals, snapshot_of
from xlarank.runtime.pool_threads import DEFECT_SECONDS, Task, Timer, device_thread
from xlarank.runtime.scheduler import BatcherMaker, Scheduler
from xlarank.runtime.suspicions import Suspicions
from xlarank.runtime.watchdog import Watchdog
from xlarank.runtime.work import Workload
from xlarank.runtime.yielding import IdleSignal
from xlarank.spec import FaultConfig, RequestOptions
from xlarank.spec.serving import QueueConfig

__all__ = ["DevicePool"]

_log = logging.getLogger(__name__)

_LEAST_TICK_SECONDS = 0.001

_Stranded = tuple[Workload, list[Any], Exception | None]
"""Requests of a model that won't be run, and why; None for want of a device."""


class DevicePool:
    """Drives a `Scheduler` with threads: one a device, one turn at a time on each, and one for deadlines.

    Devices that fail are taken out of service as `DeviceHealth` says.

    Attributes:
      num_devices: of it.
      idle: whether no request waits or runs.
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
        self._complaints = Complaints(_log, clock=clock)
        self._timer = Timer(self._lock, self._look, self._complaints)
        # All below guarded by _lock.
        self._scheduler: Scheduler[Any] = Scheduler(num_devices, costs=costs, make_batcher=make_batcher)
        faults = faults or FaultConfig()
        self._health = DeviceHealth(num_devices, faults)
        self._watchdog = Watchdog(faults.watchdog_seconds)
        self._suspicions = Suspicions(self._health)
        self._search = FaultSearch()
        self._workloads: dict[ModelQueue, Workload] = {}
        self._refusals = Refusals()
        self._answering: dict[int, Turn | None] = {}  # by device: the turn, if it ran, that it answers
        self._errands: list[deque[Callable[[], None]]] = [deque() for _ in range(num_devices)]
        self._was_uniform = True  # at the last change
        self._is_closed = False  # moves one way
        self._threads = [
            device_thread(index, self._take, self._give_up, self._complaints) for index in range(num_devices)
        ]
        self.num_devices = num_devices
        self.idle = IdleSignal()
        for thread in (*self._threads, self._timer):
            thread.start()

    @property
    def fault(self) -> str | None:
        """Why no device can be used; None while one can."""
        with self._lock:
            return None if self._scheduler.num_healthy else self._health.fault

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
            try:
                self._scheduler.submit(queue, item, num_rows, options, self._clock())
            except XlarankError as error:
                self._refusals.refuse(queue, error)
                raise
            if self._scheduler.is_uniform:
                self._work.notify()  # whichever it is may take it; one that may not would lose the call
            self._on_change()
            self._tell_change()

    def overload(self, num_arriving: int) -> OverloadError | None:
        """What a request is to be refused with before it is read, for there is no room for it; None if there
        may be. See `Scheduler.overload`."""
        with self._lock:
            refusal = self._scheduler.overload(num_arriving, self._clock())
            self._refusals.num_turned_away += refusal is not None
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

    def drop(self, queue: ModelQueue, item: Any, *, is_late: bool = False) -> None:
        """Forgets what is still queued of a request whose caller has gone, or that has been answered.

        `is_late`: its deadline had passed when its batch was to run; counted.
        """
        with self._lock:
            queue.batcher.drop(item)
            if is_late:
                self._refusals.add(queue, "late")
            self.idle.update(self._scheduler.is_idle)

    def cancel(self, queue: ModelQueue, item: Any) -> None:
        """As `drop`, for a caller that has gone; counted if it was queued."""
        with self._lock:
            if queue.batcher.drop(item):
                self._refusals.add(queue, "canceled")
            self.idle.update(self._scheduler.is_idle)

    def snapshot(self) -> PoolSnapshot:
        """For metrics."""
        with self._lock:
            return snapshot_of(self._scheduler, self._health.statuses(), self._refusals, self._clock())

    def abandon(self, why: str) -> None:
        """Answers UNAVAILABLE what isn't done, and leaves behind the devices that are at it. Then `close`."""
        with self._lock:
            self._is_closed = True
            turns = [*self._scheduler.turns(), *filter(None, self._answering.values())]
            lost = [(self._workloads.get(t.queue), [p.item for p in t.batch.parts], None) for t in turns]
            for index in range(self.num_devices):
                is_away = self._health.is_away(index) or self._watchdog.is_running(index)
                lost += self._exclude(index, why, is_away=is_away)
        for workload, items, _ in lost:
            if workload is not None:  # else its callers have left, and it was closed
                workload.fail(items, UnavailableError(why))

    def close(self) -> bool:
        """Finishes what is queued, then stops the threads; False if one hangs, which is left behind."""
        with self._lock:
            self._is_closed = True
            self._work.notify_all()
            self._timer.tell(-math.inf)
        for index in range(self.num_devices):
            while not self._has_ended(index):
                self._threads[index].join(0.1)
        self._timer.close()
        self._complaints.close()
        return not any(thread.is_alive() for thread in self._threads)

    def _has_ended(self, index: int) -> bool:
        """Whether a device's thread is through, or hangs and is left behind. With or without the lock."""
        return not self._threads[index].is_alive() or self._health.is_away(index)

    # Device threads
    def _give_up(self, index: int, error: Exception) -> None:
        """What a device does next can't be chosen: readiness says so, and a probe puts it back."""
        self._complaints.add("device %d: choosing what it does next failed", index, error=error)
        self._quarantine(index, f"choosing what it does next failed: {error!r}")
        with self._lock:  # no tight loop
            self._work.wait(DEFECT_SECONDS)

    def _take(self, index: int) -> Task | None:
        with self._lock:
            self._answering.pop(index, None)
            self._scheduler.set_answering(index, math.inf)
            self._back(index)
            while True:
                now = self._clock()
                task = self._judgement(index, now) or self._aside(index, now) or self._step(index, now)
                if task is None and (turn := self._scheduler.next_turn(index, now)) is not None:
                    task = functools.partial(self._run, turn, self._workloads[turn.queue])
                task = task or self._step(index, now, is_idle=True)
                if task is not None:
                    self._watchdog.begin(index, now)
                    self._on_change()
                    self._tell_change()
                    return task
                self._tell_change()
                if self._is_closed and not self._has_more():
                    return None
                self._work.wait()

    def _has_more(self) -> bool:
        """Whether there is something that some device has yet to run."""
        has_waiting = self._scheduler.num_queued_requests or len(self._suspicions) or self._search.num_steps
        return bool(has_waiting or self._scheduler.turns())  # what runs may fail, and be run again

    def _aside(self, index: int, now: float) -> Task | None:
        """A probe or an errand, if there is one."""
        if not self._is_closed and now >= self._health.probe_at(index):
            task = functools.partial(self._probe, index, list(self._workloads.items()))
        elif self._errands[index]:
            task = self._errands[index].popleft()
        else:
            return None
        return self._put_aside(index, now, task)

    def _put_aside(self, index: int, now: float, task: Task) -> Task:
        """A task as if it were a turn: the device is not free, and may hang in it."""
        self._answering.pop(index, None)
        self._watchdog.begin(index, now)
        self._scheduler.set_aside(index, True)

        def run() -> None:
            try:
                task()
            finally:
                with self._lock:
                    self._scheduler.set_aside(index, False)
                    self._back(index)
                    self._work.notify_all()

        return run

    def _run(self, turn: Turn, workload: Workload) -> None:
        """One turn of the scheduler."""
        try:
            result = workload.run(turn.batch, turn.device)
        except Exception as error:  # the boundary of a device's thread: a batch may fail, the thread not
            if self._suspect(Suspicion(turn, workload, error, has_hung=False)):
                self._complain("device %d: a batch of model %s failed", turn, error=error)
            return
        if self._ran(turn, result):
            self._answer(turn, workload, result)

    def _answer(self, turn: Turn, workload: Workload, result: Any) -> None:
        try:
            workload.answer(result)
        except Exception as error:  # nobody must wait for ever
            self._complain("device %d: a batch of model %s has run, but can't be answered", turn, error=error)
            items = [part.item for part in turn.batch.parts]
            workload.fail(items, ExecutionError(f"model {turn.queue.name!r}: {error}"))

    def _complain(self, line: str, turn: Turn, *details: str, error: Exception | None = None) -> None:
        name = turn.queue.name
        self._complaints.add(line, turn.device, name, *details, about=name, error=error)

    def _end(self, turn: Turn) -> bool:
        """Ends a turn; False if the watchdog has given the device up meanwhile, and its batch away.

        The device is free once its thread has told callers, whose callbacks may take long, or hang.
        """
        index, now = turn.device, self._clock()
        is_own = self._scheduler.turn_of(index) is turn
        self._scheduler.finished(turn, now)
        self._scheduler.set_answering(index, now)
        self._answering[index] = None
        self._health.back(index)
        self._watchdog.begin(index, now)
        self._suspicions.end(turn)
        self._on_change()
        return is_own

    def _back(self, index: int) -> None:
        self._watchdog.end(index)
        self._health.back(index)

    def _ran(self, turn: Turn, result: Any) -> bool:
        """As `_end`, of a turn that didn't fail."""
        with self._lock:
            is_own = self._end(turn)
            if is_own and result is not None:
                self._answering[turn.device] = turn
                self._suspicions.ran(turn.queue, turn.device, self._clock())
            return is_own

    def _suspect(self, suspicion: Suspicion) -> bool:
        """As `_end`, of a turn that failed. Another device will tell whose fault it was, or this one."""
        turn = suspicion.turn
        with self._lock:
            is_own = self._end(turn)
            if is_own:
                self._health.suspect(suspicion)
                self._scheduler.set_suspended(turn.device, True)
                self._suspicions.add(suspicion)
                self._work.notify_all()
            return is_own

    def _judgement(self, index: int, now: float) -> Task | None:
        """A suspicion that this device clears up: as another one that works, or because none is left."""
        suspicion = self._suspicions.next_for(index)
        if suspicion is None:
            return None
        if self._health.suspicion(index) is suspicion:
            if not self._suspicions.has_replayed(index, suspicion, now):
                return self._put_aside(index, now, functools.partial(self._prove, suspicion, index))
            self._clear(suspicion)
        self._suspicions.take(suspicion)
        turn = self._scheduler.retry(suspicion.turn, index, now)
        self._suspicions.begin(suspicion, turn)
        return lambda: self._judge(suspicion, turn)

    def _prove(self, suspicion: Suspicion, index: int) -> bool:
        """Has a device run golden requests, as no other one will tell whether it works.

        If a suspect does, its batch gets the second run that another device would have given it: what fails
        but once is nobody's fault.
        """
        try:
            suspicion.workload.probe(index)
        except Exception as error:
            _log.exception("device %d: golden replay failed", index)
            self._quarantine(index, f"{suspicion.reason}; golden replay: {error}")
            return False
        with self._lock:
            self._suspicions.replayed(suspicion.turn.queue, index, self._clock())
        return True

    def _judge(self, suspicion: Suspicion, turn: Turn) -> None:
        """Runs a batch that failed or hung once more."""
        workload, accused = suspicion.workload, suspicion.turn.device
        try:
            result = workload.run(turn.batch, turn.device)
        except Exception as error:
            self._complain("device %d: a batch of model %s failed again", turn)
            if suspicion.has_hung:
                with self._lock:
                    is_own = self._end(turn)
                if is_own:
                    both = ExecutionError(f"{suspicion.reason}; on device {turn.device}: {error}")
                    workload.fail(suspicion.items, both)
            else:
                self._blame(turn, Step(suspicion, tuple(turn.batch.parts)), error, is_judging=True)
            return
        if self._ran(turn, result):
            is_whole = result is not None and result.is_whole
            if is_whole and accused == turn.device:
                line = "device %d: a batch of model %s failed once, and not again: %s"
                self._complain(line, turn, suspicion.reason)
            elif is_whole and self._health.suspicion(accused) is suspicion:
                self._quarantine(accused, suspicion.reason)
            else:  # what is no longer waited for may have been at fault: its next batch will tell
                with self._lock:
                    self._clear(suspicion)
            self._answer(turn, workload, result)

    def _clear(self, suspicion: Suspicion) -> None:
        """A device is no longer a suspect because of this, if it is: it may have been given up meanwhile."""
        if self._health.suspicion(suspicion.turn.device) is suspicion:
            self._back_in_service(suspicion.turn.device)

    def _blame(self, turn: Turn, step: Step, error: Exception, *, is_judging: bool = False) -> None:
        """Data failed again: its fault, if the device is believed, or else once that has proven itself."""
        confirm = culprit = None
        with self._lock:
            now = self._clock()
            if not self._end(turn):
                return  # it has been given up
            learn = functools.partial(self._learn, step, error, now - turn.started_at)
            if self._suspicions.is_believed(turn.device, step.suspicion, now):
                culprit = learn()
            else:  # meanwhile another one may take it
                self._suspicions.add(step.suspicion) if is_judging else self._search.put_back(step)
                task = functools.partial(self._confirm, turn.device, step, learn)
                confirm = self._put_aside(turn.device, now, task)
            self._work.notify_all()
        if confirm is not None:
            confirm()
        self._accuse(step, culprit)

    def _confirm(self, index: int, step: Step, learn: Callable[[], Culprit | None]) -> None:
        if not self._prove(step.suspicion, index):
            return
        with self._lock:
            is_healthy = self._health.state(index) is DeviceState.HEALTHY  # else it came back late
            is_own = is_healthy and (self._suspicions.take(step.suspicion) or self._search.take_back(step))
            culprit = learn() if is_own else None
        self._accuse(step, culprit)

    def _learn(self, step: Step, error: Exception | None, seconds: float) -> Culprit | None:
        """How a run of the search ended; who is known to be at fault."""
        now = self._clock()
        self._clear(step.suspicion)
        culprit = self._search.ran(step, error, now, seconds)
        if culprit is not None:
            self._suspicions.accused(step.suspicion.turn.queue, now)
        self._work.notify_all()
        return culprit

    @staticmethod
    def _accuse(step: Step, culprit: Culprit | None) -> None:
        if culprit is not None:
            step.suspicion.workload.accuse(culprit)

    def _step(self, index: int, now: float, *, is_idle: bool = False) -> Task | None:
        """Of the search for bad data: each is a turn, watched and counted by itself."""
        if self._health.state(index) is not DeviceState.HEALTHY:
            return None
        step = self._search.take(now, is_idle=is_idle)
        if step is None:
            return None
        return functools.partial(self._run_step, step, self._scheduler.retry(step.turn_on(index), index, now))

    def _run_step(self, step: Step, turn: Turn) -> None:
        workload: Workload = step.suspicion.workload
        try:
            result = workload.run(turn.batch, turn.device)
        except Exception as error:
            self._blame(turn, step, error)
            return
        if self._ran(turn, result) and result is not None:  # None: nobody waits for it any more
            if step.culprit is None:
                self._answer(turn, workload, result)
            with self._lock:
                culprit = self._learn(step, None, self._clock() - turn.started_at)
            self._accuse(step, culprit)

    def _probe(self, index: int, workloads: Sequence[tuple[ModelQueue, Workload]]) -> None:
        try:
            for _, workload in workloads:
                workload.probe(index)
        except Exception as error:
            _log.warning("device %d: still quarantined: %s", index, error)
            with self._lock:
                self._health.probe_failed(index, str(error), self._clock())
            return
        _log.warning("device %d: works again", index)
        with self._lock:
            for queue, _ in workloads:
                self._suspicions.replayed(queue, index, self._clock())
            self._back_in_service(index)

    def _back_in_service(self, index: int) -> None:
        self._health.acquit(index)
        self._scheduler.set_suspended(index, False)
        self._scheduler.set_healthy(index, True)
        self._work.notify_all()

    def _quarantine(self, index: int, reason: str) -> None:
        with self._lock:
            stranded = self._exclude(index, reason)
        self._tell_excluded(index, reason, stranded)

    def _exclude(self, index: int, reason: str, *, is_away: bool = False) -> list[_Stranded]:
        """Quarantines a device. Returns what nobody is left to run."""
        self._watchdog.end(index)
        self._health.quarantine(index, reason, self._clock(), is_away=is_away)
        self._scheduler.set_suspended(index, False)
        self._scheduler.set_healthy(index, False)
        stranded: list[_Stranded] = []
        if not self._scheduler.num_healthy:
            stranded += [(self._workloads[queue], items, None) for queue, items in self._scheduler.clear()]
            waiting = (*self._suspicions.clear(), *self._search.clear())
            stranded += [(each.workload, each.items, None) for each in waiting]
        self._work.notify_all()
        self._tell_change()
        return stranded

    def _tell_excluded(self, index: int, reason: str, stranded: Sequence[_Stranded]) -> None:
        _log.error("device %d is quarantined: %s", index, reason)
        for workload, items, error in stranded:
            workload.fail(items, error or UnavailableError(self.fault or "the device failed; try again"))

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
        # A device that does something looks by itself once it is through.
        idle = [i for i in range(self.num_devices) if not (self._is_closed or self._watchdog.is_running(i))]
        probe_at = min(map(self._health.probe_at, idle), default=math.inf)
        return min(self._scheduler.wake_at(), probe_at, self._watchdog.wake_at)

    def _tell_change(self) -> None:
        """To the timer, and to who keeps out of requests' way."""
        self.idle.update(self._scheduler.is_idle)
        self._timer.tell(self._wake_at())

    def _look(self) -> bool:
        """Answers late requests, ends deferrals, has devices probed, finds hanging ones; False at the end."""
        with self._lock:
            now = self._clock()
            taken = self._scheduler.take_late(now)
            late = [(self._workloads[queue], item) for queue, item in taken]
            for queue, _ in taken:
                self._refusals.add(queue, "late")
            if taken:  # more may be in sight behind them
                self._work.notify_all()
            hung = [(index, *self._on_hang(index)) for index in self._watchdog.look(now)]
            if not late and not hung:
                if self._is_closed and all(map(self._has_ended, range(self.num_devices))):
                    return False
                self._wait(now)
        for workload, item in late:
            workload.fail_late(item)
        for index, reason, stranded in hung:
            self._tell_excluded(index, reason, stranded)
        return True

    def _wait(self, now: float) -> None:
        self.idle.update(self._scheduler.is_idle)
        seconds = (wake_at := self._wake_at()) - now
        if seconds <= 0:  # a deferral has ended, or a probe is due: devices see to it
            self._work.notify_all()
            seconds = _LEAST_TICK_SECONDS
        if self._is_closed:
            seconds = min(seconds, 0.1)
        self._watchdog.rest(now + seconds)
        self._timer.wait(wake_at, seconds)

    def _on_hang(self, index: int) -> tuple[str, list[_Stranded]]:
        """A device hasn't come back: its batch goes to another, once. Gives the reason, and what is lost."""
        turn, what, may_retry = self._scheduler.turn_of(index), "a batch", False
        if turn is not None:
            may_retry = not turn.is_retry and self._scheduler.num_healthy > 1
        elif index in self._answering:
            turn, what = self._answering.pop(index), "answering a batch"
        else:  # a probe, or a run of a version that is being proven
            what = "a golden replay"
        reason = f"{what} took more than {self._watchdog.seconds:g} s"
        if turn is None:
            return reason, self._exclude(index, reason, is_away=True)
        if (suspicion := self._suspicions.end(turn)) is not None:
            self._clear(suspicion)  # nobody will tell any more
        workload = self._workloads.get(turn.queue)  # None: its callers have left, and it was closed
        if workload is not None and may_retry:
            self._suspicions.add(Suspicion(turn, workload, ExecutionError(reason), has_hung=True))
        stranded = self._exclude(index, reason, is_away=True)
        if workload is not None and not may_retry:
            items = [part.item for part in turn.batch.parts]
            stranded.append((workload, items, ExecutionError(f"model {turn.queue.name!r}: {reason}")))
        return f"{reason} of model {turn.queue.name!r} version {turn.queue.version}", stranded
