"""Bad data and the watchdog, in real pools on a clock that the test sets."""

import math
import os
import threading
from types import SimpleNamespace

import pytest

from xlarank.errors import ExecutionError, UnavailableError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.device_health import DeviceState
from xlarank.runtime.pool import DevicePool
from xlarank.spec import Bucket, BucketLadder, FaultConfig, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

NUM = 16
LADDER = BucketLadder((Bucket(1, 1), Bucket(NUM, NUM)))
PLAN = BucketPlan(LADDER, LatencyProfile(dict.fromkeys(LADDER.buckets, 1e-3)))
WATCHDOG_SECONDS = 10.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Data:
    """Fails with what is `bad`; `on_run` is told of each run and `on_probe` of each golden replay."""

    def __init__(self):
        self.bad = set()
        self.on_run = self.on_probe = lambda *_: None
        self.runs, self.outcomes, self.num_probes = [], {}, 0
        self.changed = threading.Condition()

    def run(self, batch, device_index):
        items = [part.item for part in batch.parts]
        self.runs.append((items, batch.num_rows))
        self.on_run(items, device_index)
        if self.bad.intersection(items):
            raise RuntimeError("overflow")
        return SimpleNamespace(is_whole=True, items=items)

    def probe(self, device_index):
        self.num_probes += 1
        self.on_probe()

    def answer(self, result):
        self._end(result.items if result is not None else [], "answered")

    def accuse(self, culprit):
        self._end([culprit.part.item], "accused")

    def fail(self, items, error):
        self._end(items, error)

    def _end(self, items, outcome):
        with self.changed:
            for item in items:
                self.outcomes.setdefault(item, outcome)
            self.changed.notify_all()

    def wait_for(self, *items):
        with self.changed:
            assert self.changed.wait_for(lambda: self.outcomes.keys() >= set(items), 30)


class Served:
    """A pool, a model that does as `data` says, and time."""

    def __init__(self, num_devices):
        self.clock, self.data = Clock(), Data()
        self.gates = []  # open at the end
        faults = FaultConfig(watchdog_seconds=WATCHDOG_SECONDS, probe_seconds=1e6)
        self.pool = DevicePool(num_devices, faults=faults, clock=self.clock)
        config = QueueConfig(max_queue_ms=1e12)
        self.queue = self.pool.attach(self.data, "feed", [PLAN] * num_devices, config)

    def submit(self, *items, rows=1):
        for item in items:
            self.pool.submit(self.queue, item, rows, RequestOptions())

    def submit_together(self, *items):
        """They wait for a device, so that they run as one batch."""
        gates = [threading.Event() for _ in range(self.pool.num_devices)]
        has_come = threading.Semaphore(0)

        def hold(_, device_index):
            has_come.release()
            assert gates[device_index].wait(30)

        on_run, self.data.on_run = self.data.on_run, hold
        for number in range(self.pool.num_devices):
            self.submit(f"holds {number}")
            assert has_come.acquire(timeout=30)
        self.submit(*items)
        self.data.on_run = on_run
        gates[0].set()
        self.data.wait_for("holds 0")
        for gate in gates:
            gate.set()

    def pass_time(self, seconds):
        """Lets time pass and the watchdog look."""
        with self.pool._lock:
            self.clock.now += seconds
            self.pool._timer_at = -math.inf
            self.pool._timer.notify()
        while self.pool._timer_at == -math.inf:  # until it waits again
            os.sched_yield()

    def states(self):
        return [status.state for status in self.pool.statuses()]

    def wait_for_states(self, *states):
        with self.pool._work:
            assert self.pool._work.wait_for(
                lambda: [status.state for status in self.pool._health.statuses()] == list(states), 30
            )


@pytest.fixture
def serve():
    opened = []

    def serve(num_devices=1):
        opened.append(Served(num_devices))
        return opened[-1]

    yield serve
    for served in opened:
        for gate in served.gates:
            gate.set()
        served.pool.close()


def test_a_search_may_take_longer_than_the_watchdog_waits_as_long_as_no_run_does(serve):
    served = serve()
    data = served.data
    data.bad = {3}
    data.on_run = lambda *_: served.pass_time(0.9 * WATCHDOG_SECONDS)
    data.on_probe = lambda: served.pass_time(0.9 * WATCHDOG_SECONDS)
    served.submit_together(*range(NUM))
    data.wait_for(*range(NUM))
    assert [item for item in range(NUM) if data.outcomes[item] == "accused"] == [3]
    assert [data.outcomes[item] for item in range(NUM)].count("answered") == NUM - 1
    assert data.num_probes == 1
    assert len(data.runs) > 8
    assert served.pool.statuses()[0].num_quarantines == 0
    assert served.states() == [DeviceState.HEALTHY]


class Hang:
    """Holds a run past the watchdog's time, until told."""

    def __init__(self, served):
        self.served, self.gate = served, threading.Event()
        served.gates.append(self.gate)

    def __call__(self):
        self.served.pass_time(2 * WATCHDOG_SECONDS)
        assert self.gate.wait(30)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_run_of_the_search_that_hangs_is_found_and_what_is_left_goes_elsewhere(serve, num_devices):
    served = serve(num_devices)
    data, hang = served.data, Hang(served)
    data.bad = {3}

    def hang_with_the_first_half(items, _):
        if 0 in items and len(items) == NUM // 2:
            if num_devices == 2:  # time must not pass while the other device runs
                data.wait_for(*range(NUM // 2, NUM))
            hang()

    data.on_run = hang_with_the_first_half
    served.submit_together(*range(NUM))
    data.wait_for(*range(NUM))
    half = range(NUM // 2)
    assert {type(data.outcomes[item]) for item in half} == {ExecutionError}
    assert str(data.outcomes[0]) == "model 'feed': a batch took more than 10 s"
    rest = {str(data.outcomes[item]) for item in range(NUM // 2, NUM)}
    if num_devices == 1:
        assert rest == {"no device is healthy (0: a batch took more than 10 s)"}
    else:
        assert rest == {"answered"}
    assert sorted(served.states()) == sorted([DeviceState.HEALTHY, DeviceState.QUARANTINED][-num_devices:])
    hang.gate.set()


def test_a_device_that_comes_back_late_from_the_golden_replay_is_not_cleared_by_it(serve):
    served = serve()
    data, hang = served.data, Hang(served)
    data.bad, data.on_probe = {0}, hang
    served.submit(0)
    data.wait_for(0)
    assert isinstance(data.outcomes[0], UnavailableError)
    assert str(data.outcomes[0]) == "no device is healthy (0: a golden replay took more than 10 s)"
    assert served.pool.is_away(0)
    hang.gate.set()
    with served.pool._work:
        assert served.pool._work.wait_for(lambda: not served.pool._health.is_away(0), 30)
    assert served.states() == [DeviceState.QUARANTINED]
    assert len(data.runs) == 1


def test_a_suspect_is_cleared_when_the_device_that_was_to_judge_it_hangs(serve):
    """Nobody else will tell: it would wait for ever."""
    served = serve(2)
    data, hang = served.data, Hang(served)
    failed_on = []

    def run(items, device_index):
        if items == ["odd"]:
            failed_on.append(device_index)
            if len(failed_on) == 2:
                hang()
            raise RuntimeError("overflow")

    data.on_run = run
    served.submit("odd")
    data.wait_for("odd")
    assert str(data.outcomes["odd"]) == "model 'feed': a batch took more than 10 s"
    expected = [DeviceState.QUARANTINED, DeviceState.QUARANTINED]
    expected[failed_on[0]] = DeviceState.HEALTHY
    assert served.states() == expected
    served.submit("next")
    data.wait_for("next")
    assert data.outcomes["next"] == "answered"
    hang.gate.set()


def test_bad_data_that_comes_again_and_again_has_a_lone_device_replayed_once_a_second(serve):
    served = serve()
    data = served.data
    data.bad = {"a", "b", "c"}
    for item, seconds, num_probes in (("a", 0, 1), ("b", 1, 1), ("c", 1.5, 2)):
        served.clock.now += seconds
        served.submit(item)
        data.wait_for(item)
        assert data.num_probes == num_probes
    assert set(data.outcomes.values()) == {"accused"}


def test_a_model_is_not_cleared_by_another_ones_golden_requests(serve):
    served = serve()
    other = Data()
    other.bad = served.data.bad = {0}
    queue = served.pool.attach(other, "other", [PLAN], QueueConfig(max_queue_ms=1e12))
    served.submit(0)
    served.data.wait_for(0)
    served.pool.submit(queue, 0, 1, RequestOptions())
    other.wait_for(0)
    assert other.num_probes == 1


def test_a_second_run_of_nothing_says_nothing(serve, caplog):
    """All callers had left."""
    served = serve()
    data = served.data
    run, data.bad = data.run, {0}
    results = [run, lambda *_: None]
    data.run = lambda *batch: results.pop(0)(*batch)
    served.submit(0)
    served.wait_for_states(DeviceState.HEALTHY)
    served.pool.close()
    assert results == []
    assert data.num_probes == 1
    assert not any("not again" in record.getMessage() for record in caplog.records)
