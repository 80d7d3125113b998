"""Bad data and the watchdog, in real pools on a clock that the test sets."""

import contextlib
import math
import os
import random
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

    def __init__(self, num_devices, probe_seconds):
        self.clock, self.data = Clock(), Data()
        self.gates = []  # open at the end
        faults = FaultConfig(watchdog_seconds=WATCHDOG_SECONDS, probe_seconds=probe_seconds)
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
        """Lets time pass, in steps so small that the watchdog sees them."""
        while seconds > 0:
            self.jump(min(seconds, WATCHDOG_SECONDS / 10))
            seconds -= WATCHDOG_SECONDS / 10

    def jump(self, seconds):
        """Lets time pass at once, and the watchdog look."""
        with self.pool._lock:
            self.clock.now += seconds
            self.pool._timer.tell(-math.inf)
            self.pool._timer._wakes_at = -math.inf
        while self.pool._timer._wakes_at == -math.inf:  # until it waits again
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

    def serve(num_devices=1, probe_seconds=1e6):
        opened.append(Served(num_devices, probe_seconds))
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


def test_a_device_that_hangs_in_answers_is_quarantined_and_what_was_not_answered_fails(serve):
    served = serve(probe_seconds=1.0)
    data, hang = served.data, Hang(served)
    answer = data.answer

    def answer_and_hang(result):
        if result.items != [0, 1]:
            return answer(result)
        data._end([0], "answered")
        hang()
        return answer(result)

    data.answer = answer_and_hang
    served.submit_together(0, 1)
    data.wait_for(0, 1)
    reason = "answering a batch took more than 10 s"
    assert data.outcomes[0] == "answered"
    assert str(data.outcomes[1]) == f"model 'feed': {reason}"
    assert served.pool.fault == f"no device is healthy (0: {reason})"
    assert served.pool.statuses()[0].is_away
    hang.gate.set()
    with served.pool._work:
        assert served.pool._work.wait_for(lambda: not served.pool._health.is_away(0), 30)
    served.jump(1)
    served.wait_for_states(DeviceState.HEALTHY)
    served.submit(2)
    data.wait_for(2)
    assert data.outcomes[2] == "answered"
    assert served.pool.snapshot().devices[0].busy_seconds == 0.0  # the time in which it answered isn't


def test_the_log_hears_of_bad_data_once_a_minute(serve, caplog):
    served = serve()
    data = served.data
    data.bad = set(range(12))
    for number in range(12):
        served.clock.now += 60 * (number == 10)
        served.submit(number)
        data.wait_for(number)
    served.pool.close()
    failed, again = (f"device 0: a batch of model feed failed{again}" for again in ("", " again"))
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        failed,
        f"{failed} (10 since the last such line)",
    ]
    said = [message for message in caplog.messages if message.startswith(again)]
    assert said[0] == again
    assert len(said) == 3  # the last as it closes
    assert len(caplog.messages) == 6


def test_a_device_that_comes_back_late_from_the_golden_replay_is_not_cleared_by_it(serve):
    served = serve()
    data, hang = served.data, Hang(served)
    data.bad, data.on_probe = {0}, hang
    served.submit(0)
    data.wait_for(0)
    assert isinstance(data.outcomes[0], UnavailableError)
    assert str(data.outcomes[0]) == "no device is healthy (0: a golden replay took more than 10 s)"
    assert served.pool.statuses()[0].is_away
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


class Puppet:
    """Holds every run and golden replay until it is told how they end."""

    def __init__(self, served):
        self.pool, self.is_free = served.pool, False
        self.held = {}  # by device: the gate, and how it ends
        served.data.on_run = lambda _, device_index: self.hold(device_index)
        served.data.probe = self.hold

    def hold(self, device_index):
        if self.is_free:
            return
        held = self.held[device_index] = [threading.Event(), None]
        assert held[0].wait(60)
        if held[1] is not None:
            raise held[1]

    def release(self, device_index, error=None):
        held = self.held.pop(device_index)
        held[1] = error
        held[0].set()

    def rest(self):
        """Until every device is held, or waits."""
        while True:
            with self.pool._lock:
                if len(self.held) + len(self.pool._work._waiters) == self.pool.num_devices:
                    return
            os.sched_yield()


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_nobody_waits_for_ever_in_whatever_order_devices_fail_hang_and_come_back(serve, seed, num_devices):
    rng, served = random.Random(seed), serve(num_devices, probe_seconds=1.0)
    puppet, accepted = Puppet(served), []
    for number in range(40):
        event = rng.random()
        if event < 0.35:
            with contextlib.suppress(UnavailableError):
                served.submit(number)
                accepted.append(number)
        elif event < 0.75 and puppet.held:
            error = RuntimeError("overflow") if rng.random() < 0.4 else None
            puppet.release(rng.choice(sorted(puppet.held)), error)
        else:
            served.pass_time(WATCHDOG_SECONDS * rng.choice((0.3, 1.1)))
        puppet.rest()
    puppet.is_free = True
    for index in sorted(puppet.held):
        puppet.release(index)
    served.data.wait_for(*accepted)
    served.jump(100)
    served.wait_for_states(*[DeviceState.HEALTHY] * num_devices)


def test_what_hung_is_run_by_its_own_device_when_that_came_back_and_the_other_hangs(serve):
    served = serve(2, probe_seconds=1.0)
    puppet = Puppet(served)
    served.submit("first")
    puppet.rest()
    (first,) = puppet.held
    served.pass_time(0.6 * WATCHDOG_SECONDS)
    served.submit("second")
    puppet.rest()
    served.pass_time(0.5 * WATCHDOG_SECONDS)
    assert served.states()[first] is DeviceState.QUARANTINED
    puppet.release(first)
    served.jump(1)  # a probe is due
    while first not in puppet.held:
        os.sched_yield()
    puppet.release(first)
    served.wait_for_states(*[DeviceState.HEALTHY] * 2)
    puppet.is_free = True
    served.pass_time(0.5 * WATCHDOG_SECONDS)
    served.data.wait_for("first", "second")
    assert set(served.data.outcomes.values()) == {"answered"}
    puppet.release(1 - first)


def fail(*_):
    raise RuntimeError("illegal address")


def test_devices_that_all_fail_with_whatever_they_run_are_quarantined(serve):
    served = serve(2)
    data = served.data
    data.run, data.probe = fail, fail
    served.submit(0)
    data.wait_for(0)
    assert isinstance(data.outcomes[0], UnavailableError)
    why = "illegal address; golden replay: illegal address"
    assert served.pool.fault == f"no device is healthy (0: {why}; 1: {why})"


def test_devices_that_all_break_while_they_serve_are_found_by_the_second_request(serve):
    served = serve(2)
    data = served.data
    served.submit_together()
    data.wait_for("holds 0", "holds 1")
    data.run, data.probe = fail, fail
    served.submit("first")  # of which their last runs say that it is at fault
    data.wait_for("first")
    served.wait_for_states(DeviceState.HEALTHY, DeviceState.HEALTHY)
    served.submit("second")
    data.wait_for("second")
    assert data.outcomes["first"] == "accused"
    assert isinstance(data.outcomes["second"], UnavailableError)


def test_bad_data_alone_has_each_device_replayed_once_a_second_and_beside_good_data_none(serve):
    served = serve(2)
    data = served.data
    data.bad = set(range(10))
    served.submit_together(0)
    data.wait_for(0)
    assert data.num_probes == 0
    served.submit(*range(1, 10))
    data.wait_for(*range(10))
    assert 1 <= data.num_probes <= 2
    assert {data.outcomes[item] for item in range(10)} == {"accused"}
    assert sum(status.num_quarantines for status in served.pool.statuses()) == 0


def test_a_pause_of_the_process_is_nobodys_hang(serve):
    served = serve(2)
    puppet = Puppet(served)
    served.submit(0)
    puppet.rest()
    (index,) = puppet.held
    served.jump(2 * WATCHDOG_SECONDS)
    served.pass_time(0.8 * WATCHDOG_SECONDS)
    assert served.states() == [DeviceState.HEALTHY] * 2
    puppet.is_free = True
    served.pass_time(0.2 * WATCHDOG_SECONDS)
    assert served.states()[index] is DeviceState.QUARANTINED
    served.data.wait_for(0)
    puppet.release(index)


def test_the_timer_sleeps_while_a_probe_runs(serve):
    served = serve(1, probe_seconds=1.0)
    data, puppet = served.data, Puppet(served)
    data.run = fail
    served.submit(0)
    puppet.rest()
    puppet.release(0, RuntimeError("broken"))
    data.wait_for(0)
    served.jump(5)
    while not puppet.held:
        os.sched_yield()
    with served.pool._lock:
        assert served.pool._wake_at() > served.clock.now
    puppet.release(0)


def test_what_fails_while_the_pool_closes_is_judged_by_another_device(serve):
    served = serve(2)
    puppet = Puppet(served)
    served.submit(0)
    puppet.rest()
    (index,) = puppet.held
    closing = threading.Thread(target=served.pool.close, daemon=True)
    closing.start()
    while not served.pool._is_closed:
        os.sched_yield()
    other = served.pool._threads[1 - index]
    while other.is_alive() and not served.pool._work._waiters:
        os.sched_yield()
    puppet.is_free = True
    puppet.release(index, RuntimeError("overflow"))
    served.data.wait_for(0)
    closing.join(30)
    assert not closing.is_alive()
    assert served.data.outcomes == {0: "answered"}
