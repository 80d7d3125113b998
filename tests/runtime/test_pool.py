"""Device threads: every job runs once, models take turns by device time, closing loses nothing."""

import collections
import threading

import pytest

from xlarank.errors import UnavailableError
from xlarank.runtime.pool import DevicePool


class Jobs:
    """A workload whose jobs advance a clock of the test's own."""

    def __init__(self, name, log, clock=None, seconds=0.0):
        self.queue = collections.deque()
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds

    def next_job(self, device_index):
        if not self.queue:
            return None
        number = self.queue.popleft()
        return lambda: self.run(number)

    def run(self, number):
        if self.clock is not None:
            self.clock.now += self.seconds
        self.log.append((self.name, number))


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_closing_finishes_what_was_queued():
    log = []
    jobs = Jobs("a", log)
    pool = DevicePool(2)
    pool.attach(jobs)
    for number in range(100):
        pool.submit(jobs, lambda number=number: jobs.queue.append(number))
    pool.close()
    assert sorted(number for _, number in log) == list(range(100))
    with pytest.raises(UnavailableError, match="closed"):
        pool.submit(jobs, lambda: None)


def test_a_detached_workload_is_refused():
    pool = DevicePool(1)
    try:
        jobs = Jobs("a", [])
        with pytest.raises(UnavailableError):
            pool.submit(jobs, lambda: None)
        pool.attach(jobs)
        pool.detach(jobs)
        with pytest.raises(UnavailableError):
            pool.submit(jobs, lambda: None)
    finally:
        pool.close()


def test_models_take_turns_by_the_device_time_they_used():
    clock, log = FakeClock(), []
    heavy, light = Jobs("heavy", log, clock, 3.0), Jobs("light", log, clock, 1.0)
    pool = DevicePool(1, clock=clock)
    pool.attach(heavy)
    pool.attach(light)
    with pool.locked():  # the device sees both queues at once
        heavy.queue.extend(range(4))
        light.queue.extend(range(12))
    pool.submit(light, lambda: None)
    pool.close()
    names = [name for name, _ in log]
    assert names.count("heavy") == 4
    assert names.count("light") == 12
    for end in range(4, 17, 4):  # in every stretch of 4 jobs: 3 s of each
        assert names[:end].count("heavy") == end // 4


def test_two_devices_run_at_the_same_time():
    both = threading.Barrier(2, timeout=30)

    class Meeting(Jobs):
        def run(self, number):
            both.wait()

    jobs = Meeting("a", [])
    pool = DevicePool(2)
    pool.attach(jobs)
    for number in range(2):
        pool.submit(jobs, lambda number=number: jobs.queue.append(number))
    pool.close()
    assert not both.broken
