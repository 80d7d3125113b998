"""Device threads: every request runs once, late ones are told in time, closing loses nothing."""

import functools
import math
import os
import random
import threading
from types import SimpleNamespace

import pytest

from xlarank.errors import UnavailableError
from xlarank.runtime import pool_threads, scheduler
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.device_health import DeviceState
from xlarank.runtime.pool import DevicePool
from xlarank.spec import Bucket, BucketLadder, FaultConfig, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

ONE_ROW = BucketPlan(BucketLadder((Bucket(1, 1),)), LatencyProfile({Bucket(1, 1): 1e-3}))


class Work:
    """Notes what it was given; `hold` keeps a device at its first batch."""

    def __init__(self, on_run=lambda: None):
        self.on_run = on_run
        self.runs, self.late, self.failed = [], [], []
        self.is_told = threading.Semaphore(0)

    def run(self, batch, device_index):
        self.on_run()
        self.runs.append(([part.item for part in batch.parts], device_index))
        return SimpleNamespace(is_whole=True)

    def answer(self, result):
        pass

    def fail_late(self, item):
        self.late.append(item)
        self.is_told.release()

    def fail(self, items, error):
        self.failed += items

    @property
    def items(self):
        return [item for items, _ in self.runs for item in items]


def attach(pool, work, **config):
    return pool.attach(work, "feed", [ONE_ROW] * pool.num_devices, QueueConfig(**config))


def submit(pool, queue, item, **options):
    pool.submit(queue, item, 1, RequestOptions(**options))


@pytest.mark.parametrize("config", [{}, {"policy": "spread"}, {"max_defer_ms": 5}])
@pytest.mark.parametrize("key", [None, "user"])
def test_closing_finishes_what_was_queued(config, key):
    work, pool = Work(), DevicePool(2)
    queue = attach(pool, work, **config)
    for number in range(100):
        submit(pool, queue, number, affinity_key=key)
    pool.close()
    assert sorted(work.items) == list(range(100))
    with pytest.raises(UnavailableError, match="model 'feed' is closed"):
        submit(pool, queue, 100)


def test_a_detached_model_is_refused():
    pool = DevicePool(1)
    try:
        queue = attach(pool, Work())
        pool.detach(queue)
        with pytest.raises(UnavailableError, match="model 'feed' is closed"):
            submit(pool, queue, 0)
    finally:
        pool.close()


def test_two_devices_run_at_the_same_time():
    both = threading.Barrier(2, timeout=30)
    work, pool = Work(on_run=both.wait), DevicePool(2)
    queue = attach(pool, work)
    for number in range(2):
        submit(pool, queue, number)
    pool.close()
    assert not both.broken
    assert sorted(device for _, device in work.runs) == [0, 1]


class Gates(Work):
    """Holds every batch until it is let go."""

    def __init__(self):
        super().__init__()
        self.held = {}  # by device: the gate

    def run(self, batch, device_index):
        gate = self.held[device_index] = threading.Event()
        gate.wait(60)
        return super().run(batch, device_index)


def rest(pool, *works):
    """Waits until every device's thread is held in a batch, or waits and was told of nothing."""
    while True:
        with pool._lock:
            num_held = sum(len(work.held) for work in works)
            if num_held + len(pool._work._waiters) == pool.num_devices:
                return
        os.sched_yield()


@pytest.mark.parametrize("seed", range(6))
def test_no_wake_up_is_lost_while_requests_with_keys_come_and_go(seed, monkeypatch):
    """Whenever all threads have come to rest, none does nothing while there is something that it may run."""
    monkeypatch.setattr(scheduler, "_UNEVEN", math.inf)  # they stay alike, however long one is held
    rng, pool = random.Random(seed), DevicePool(3)
    feed, spread = Gates(), Gates()
    queue, other = attach(pool, feed), attach(pool, spread, policy="spread")
    was_uniform = set()
    for number in range(150):
        event = rng.random()
        if event < 0.4:
            submit(pool, queue, number, affinity_key=rng.choice((None, None, "a", "b", "c")))
        elif event < 0.45:
            pool.submit(other, number, 3, RequestOptions())
        elif event < 0.5:
            pool.drop(queue, rng.randrange(max(1, number)))
        elif held := [(work, device) for work in (feed, spread) for device in sorted(work.held)]:
            work, device = rng.choice(held)
            work.held.pop(device).set()
        rest(pool, feed, spread)
        with pool._lock:
            was_uniform.add(pool._scheduler.is_uniform)
            busy = {turn.device for turn in pool._scheduler.turns()}
            waiting = [part for own in (queue, other) for part in own.batcher.waiting()]
            assert len(busy) == 3 or all(part.pin in busy for part in waiting)
    assert was_uniform == {True, False}
    for work in (feed, spread):
        work.run = functools.partial(Work.run, work)
        for gate in work.held.values():
            gate.set()
    pool.close()


class Clock:
    """Time that a test sets, far ahead of what any prediction reaches."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_deadline_passes_while_every_device_is_busy():
    """Its caller is told by the timer, at once, not when a device frees."""
    gate, clock = threading.Event(), Clock()
    work = Work(on_run=lambda: gate.wait(30))
    pool = DevicePool(1, clock=clock)
    queue = attach(pool, work)
    submit(pool, queue, "runs")
    submit(pool, queue, "late", deadline=1000.5)
    submit(pool, queue, "waits")
    clock.now = 1000.6
    submit(pool, queue, "wakes the timer", deadline=1000.7)
    assert work.is_told.acquire(timeout=30)
    assert work.late == ["late"]
    clock.now = 1000.65
    gate.set()
    pool.close()
    assert work.items == ["runs", "waits", "wakes the timer"]


def test_what_is_found_late_when_a_device_frees_is_told_too():
    gate, clock = threading.Event(), Clock()
    work = Work(on_run=lambda: gate.wait(30))
    pool = DevicePool(1, clock=clock)
    queue = attach(pool, work)
    submit(pool, queue, "runs")
    submit(pool, queue, "late", deadline=1000.5)
    clock.now = 1000.4999  # its millisecond no longer fits
    gate.set()
    assert work.is_told.acquire(timeout=30)
    pool.close()
    assert (work.items, work.late) == (["runs"], ["late"])


def test_a_batch_that_ran_but_can_not_be_answered_fails_and_its_device_goes_on(caplog):
    work, pool = Work(), DevicePool(1)
    queue = attach(pool, work)
    answers = iter([ValueError("another shape"), None])

    def answer(result):
        if (error := next(answers)) is not None:
            raise error
        work.is_told.release()

    work.answer = answer
    submit(pool, queue, "first")
    while not work.failed:
        pass
    submit(pool, queue, "second")
    assert work.is_told.acquire(timeout=60)
    assert work.failed == ["first"]
    assert pool.statuses()[0].state is DeviceState.HEALTHY
    pool.close()
    assert "device 0: a batch of model feed has run, but can't be answered" in caplog.text


def test_what_a_home_that_answers_would_run_is_run_by_another_device():
    gate, pool = threading.Event(), DevicePool(2, faults=FaultConfig(watchdog_seconds=1e6))
    work, is_answering = Work(), threading.Semaphore(0)

    def answer(result):
        is_answering.release()
        assert gate.wait(60)

    work.answer = answer
    queue = attach(pool, work, max_skip_ms=1e9)
    for name in ("first", "second"):
        submit(pool, queue, name, affinity_key="user")
        assert is_answering.acquire(timeout=60)
    assert sorted(device for _, device in work.runs) == [0, 1]
    assert pool._scheduler.is_idle
    gate.set()
    pool.close()


def test_the_look_for_late_requests_goes_on_after_a_defect(monkeypatch, caplog):
    monkeypatch.setattr(pool_threads, "DEFECT_SECONDS", 0.001)
    gate, clock = threading.Event(), Clock()
    work = Work(on_run=lambda: gate.wait(60))
    pool = DevicePool(1, clock=clock)
    take_late, failures = pool._scheduler.take_late, iter([KeyError("x")])

    def failing_once(now):
        if (error := next(failures, None)) is not None:
            raise error
        return take_late(now)

    queue = attach(pool, work)
    submit(pool, queue, "runs")
    submit(pool, queue, "late", deadline=1000.5)
    monkeypatch.setattr(pool._scheduler, "take_late", failing_once)
    clock.now = 1000.6
    submit(pool, queue, "wakes the timer", deadline=1000.7)
    assert work.is_told.acquire(timeout=60)
    assert work.late == ["late"]
    gate.set()
    pool.close()
    assert "the look at deadlines and devices that hang failed" in caplog.messages


def test_a_device_whose_next_task_can_not_be_chosen_is_quarantined_and_comes_back(monkeypatch):
    work, pool = Work(), DevicePool(1, faults=FaultConfig(probe_seconds=0.01))
    work.probe = lambda device_index: None
    queue = attach(pool, work)
    next_turn, failures = pool._scheduler.next_turn, iter([KeyError("x")])

    def failing_once(*args):
        if (error := next(failures, None)) is not None:
            raise error
        return next_turn(*args)

    monkeypatch.setattr(pool._scheduler, "next_turn", failing_once)
    submit(pool, queue, "first")
    while not work.failed:  # the only device is out of service
        pass
    assert work.failed == ["first"]
    assert pool.statuses()[0].num_quarantines == 1
    while pool.fault is not None:
        pass
    submit(pool, queue, "second")
    pool.close()
    assert work.items == ["second"]


def test_an_errand_that_raises_ends_no_thread(caplog):
    work, pool = Work(), DevicePool(1)
    queue = attach(pool, work)

    def errand():
        raise ValueError("not as it should be")

    pool.run_between(0, errand)
    submit(pool, queue, "request")
    pool.close()
    assert work.items == ["request"]
    assert "device 0: what followed a batch, or stood between two, failed" in caplog.text


class Turnstile:
    """Lets one batch run at a time; to be called when it begins."""

    def __init__(self):
        self.begun, self.lets = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self):
        self.begun.release()
        assert self.lets.acquire(timeout=60)


class Listener:
    """Notes what a pool tells of its idleness."""

    def __init__(self):
        self.told, self.idle = [], threading.Semaphore(0)

    def __call__(self, is_idle):
        self.told.append(is_idle)
        if is_idle:
            self.idle.release()


def test_a_pool_is_idle_when_nothing_waits_or_runs_on_any_device():
    turnstile, listener = Turnstile(), Listener()
    work, pool = Work(turnstile), DevicePool(2)
    queue = attach(pool, work)
    with pool.idle.told(listener):
        assert listener.idle.acquire(timeout=60)
        for number in range(3):  # two run, one waits
            submit(pool, queue, number)
        for _ in range(2):
            assert turnstile.begun.acquire(timeout=60)
        turnstile.lets.release(2)
        assert turnstile.begun.acquire(timeout=60)
        assert listener.told == [True, False]
        turnstile.lets.release()
        assert listener.idle.acquire(timeout=60)
        submit(pool, queue, 3)
        turnstile.lets.release()
        assert listener.idle.acquire(timeout=60)
    assert listener.told == [True, False, True, False, True]
    submit(pool, queue, 4)
    turnstile.lets.release()
    pool.close()
    assert len(listener.told) == 5


@pytest.mark.parametrize("forget", [DevicePool.drop, DevicePool.cancel])
def test_a_pool_is_idle_at_once_when_what_waited_is_forgotten(forget):
    work, pool, listener, errand = Work(), DevicePool(1), Listener(), Turnstile()
    queue = attach(pool, work)
    pool.run_between(0, errand)  # not a request, but the only device is at it
    assert errand.begun.acquire(timeout=60)
    with pool.idle.told(listener):
        submit(pool, queue, "waits")
        assert listener.told == [True, False]
        forget(pool, queue, "waits")
        assert listener.told == [True, False, True]
    errand.lets.release()
    pool.close()
    assert work.items == []


def test_a_dropped_request_is_not_run():
    gate = threading.Event()
    work = Work(on_run=lambda: gate.wait(30))
    pool = DevicePool(1)
    queue = attach(pool, work)
    for name in ("runs", "dropped", "stays"):
        submit(pool, queue, name)
    pool.drop(queue, "dropped")
    gate.set()
    pool.close()
    assert work.items == ["runs", "stays"]


class Sick(Work):
    """Fails on device 0; tells of each batch that another one has run."""

    def __init__(self, probe):
        super().__init__()
        self.probe = probe
        self.is_answered = threading.Semaphore(0)

    def run(self, batch, device_index):
        if device_index == 0:
            raise RuntimeError("it is broken")
        return super().run(batch, device_index)

    def answer(self, result):
        super().answer(result)
        self.is_answered.release()


def wait_for_state(pool, state, index=0):
    """Until the pool's threads have come that far; whoever waits for work is told of it."""
    with pool._work:
        assert pool._work.wait_for(lambda: pool._health.state(index) is state, 30)


def quarantine_first(pool, queue, work):
    """Sends single requests until device 0 has failed with one, and the other has told whose fault it was."""
    while pool.statuses()[0].state is DeviceState.HEALTHY:
        submit(pool, queue, object())
        assert work.is_answered.acquire(timeout=30)
    wait_for_state(pool, DeviceState.QUARANTINED)


def fail(device_index):
    raise RuntimeError("it is still broken")


def test_a_lone_request_is_run_at_once_while_a_device_is_out_of_service():
    """Its thread waits beside that of the healthy one, and must not be the one that is told."""
    work, pool = Sick(fail), DevicePool(2, faults=FaultConfig(probe_seconds=1e6))
    queue = attach(pool, work)
    quarantine_first(pool, queue, work)
    for _ in range(20):
        submit(pool, queue, object())
        assert work.is_answered.acquire(timeout=5)
    pool.close()


@pytest.mark.parametrize("left", [None, SimpleNamespace(is_whole=False)])
def test_a_second_run_without_those_whose_callers_left_says_nothing_of_the_device(left):
    """What left may have been at fault: a poisonous request with a short deadline must not cost a device."""
    work, pool = Sick(fail), DevicePool(2, faults=FaultConfig(probe_seconds=1e6))
    second_run = work.run

    def run(batch, device_index):
        second_run(batch, device_index)
        return left

    work.run = run
    queue = attach(pool, work)
    has_failed = []
    work.on_run = lambda: has_failed.append(pool.statuses()[0].state is DeviceState.SUSPECT)
    while not any(has_failed):
        submit(pool, queue, object())
        assert work.is_answered.acquire(timeout=30)
    wait_for_state(pool, DeviceState.HEALTHY)
    assert pool.statuses()[0].num_quarantines == 0
    work.run = second_run
    pool.close()


def test_a_device_that_hangs_between_batches_is_quarantined_until_it_comes_back():
    gate = threading.Event()
    work, pool = Work(), DevicePool(1, faults=FaultConfig(watchdog_seconds=0.05, probe_seconds=0.01))
    work.probe = lambda device_index: None
    queue = attach(pool, work)
    pool.run_between(0, gate.wait)
    wait_for_state(pool, DeviceState.QUARANTINED)
    said = "no device is healthy (0: a golden replay took more than 0.05 s)"
    assert pool.fault == said
    with pytest.raises(UnavailableError, match="model 'feed': no device is healthy"):
        submit(pool, queue, 0)
    with pytest.raises(UnavailableError, match="device 0 hangs"):
        pool.run_between(0, gate.wait)
    gate.set()
    wait_for_state(pool, DeviceState.HEALTHY)
    submit(pool, queue, 1)
    pool.close()
    assert work.items == [1]


def test_closing_does_not_wait_for_a_probe_that_hangs():
    gate, has_come = threading.Event(), threading.Event()

    def hang(device_index):
        has_come.set()
        gate.wait()

    work, pool = Sick(hang), DevicePool(2, faults=FaultConfig(watchdog_seconds=0.05, probe_seconds=0.01))
    queue = attach(pool, work)
    quarantine_first(pool, queue, work)
    assert has_come.wait(30)
    submit(pool, queue, "last")
    pool.close()
    assert work.items[-1] == "last"
    assert pool.statuses()[0].num_quarantines == 1
    gate.set()
