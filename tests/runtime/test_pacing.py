"""Pieces of a load, and the rests between them, by a clock handed in."""

import threading

import pytest

from xlarank.errors import UnavailableError
from xlarank.runtime.pacing import PacedRuns
from xlarank.runtime.pool import DevicePool


class Clock:
    """Stands still but for waits and pieces of work."""

    def __init__(self):
        self.now = 100.0
        self.rested = 0.0
        self.is_stopping = False

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        self.rested += seconds
        return self.is_stopping


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pool(clock):
    pool = DevicePool(1)
    pool.idle._clock = clock
    pool.idle.update(False)  # a request waits or runs
    yield pool
    pool.close()


@pytest.fixture
def paced(pool, clock):
    return PacedRuns(pool, share=0.1, wait=clock.wait, clock=clock)


def test_runs_that_prove_a_version_come_between_turns_and_take_a_small_share_of_the_time():
    pauses = []
    times = iter([0.0, 2.0, 2.0])
    pool = DevicePool(2)
    paced = PacedRuns(pool, share=0.1, wait=pauses.append, clock=lambda: next(times))
    started, end = threading.Event(), threading.Event()

    def turn():
        started.set()
        end.wait(60)

    pool.run_between(0, turn)
    started.wait(60)
    ran = []
    asking = threading.Thread(target=lambda: paced.on(0)(lambda: ran.append(threading.current_thread().name)))
    asking.start()
    asking.join(0.05)
    assert ran == []  # the device is busy
    end.set()
    asking.join(60)
    assert ran == ["xlarank-device-0"]
    assert pauses == [pytest.approx(18.0)]  # 2 s of every 20
    with pytest.raises(ZeroDivisionError):
        paced.on(1)(lambda: 1 / 0)
    pool.close()
    with pytest.raises(UnavailableError, match=r"the devices' threads have ended"):
        paced.on(1)(lambda: 1)


@pytest.mark.parametrize(("seconds", "rest"), [(0.04, 0.16), (0.0, 0.0), (58.0, 1.0)])
def test_work_of_the_host_comes_in_pieces_with_rests_in_between(paced, clock, seconds, rest):
    """A fifth of the time; a second at most, as what has queued up is answered by then."""

    def piece():
        clock.now += seconds
        return threading.current_thread()

    assert paced.beside(piece) is threading.current_thread()
    assert clock.rested == pytest.approx(rest)


def test_it_does_not_rest_where_there_are_no_requests(paced, pool, clock):
    pool.idle.update(True)
    clock.now += 1
    paced.beside(lambda: clock.wait(0.2))
    assert clock.rested == 0.2


def test_a_rest_ends_when_there_has_been_no_request_for_a_while(paced, pool, clock):
    paced.beside(lambda: pool.idle.update(True) or clock.wait(0.02))
    assert clock.rested == pytest.approx(0.05, abs=0.0101)


def test_a_pause_between_requests_ends_no_rest(paced, pool, clock):
    def wait(seconds):
        pool.idle.update(False)
        pool.idle.update(True)
        return clock.wait(seconds)

    paced = PacedRuns(pool, share=0.1, wait=wait, clock=clock)
    paced.beside(lambda: clock.wait(0.1))
    assert clock.rested == pytest.approx(0.1 + 0.4)


def test_nothing_goes_on_while_the_server_stops(paced, clock):
    clock.is_stopping = True
    with pytest.raises(UnavailableError, match=r"^the server is stopping$"):
        paced.beside(lambda: clock.wait(0.1))
