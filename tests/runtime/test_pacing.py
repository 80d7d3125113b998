"""Pieces of a load, and the rests between them, by a clock handed in."""

import threading

import pytest

from xlarank.errors import UnavailableError
from xlarank.runtime.pacing import PacedRuns
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.yielding import IdleSignal


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


class Requests(IdleSignal):
    """As the test says, whatever the pool has."""

    def update(self, is_idle):
        pass

    def say(self, is_idle):
        super().update(is_idle)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pool(clock):
    pool = DevicePool(1)
    pool.idle = Requests(clock)
    pool.idle.say(False)  # a request waits or runs
    yield pool
    pool.close()


@pytest.fixture
def paced(pool, clock):
    return PacedRuns(pool, share=0.1, wait=clock.wait, clock=clock)


def test_runs_that_prove_a_version_come_between_turns_and_take_a_small_share_of_the_time(clock):
    pool = DevicePool(2)
    pool.idle = Requests(clock)
    pool.idle.say(False)
    paced = PacedRuns(pool, share=0.1, wait=clock.wait, clock=clock)
    started, end = threading.Event(), threading.Event()

    def turn():
        started.set()
        end.wait(60)

    pool.run_between(0, turn)
    started.wait(60)
    ran = []

    def run():
        clock.now += 2.0
        ran.append(threading.current_thread().name)

    asking = threading.Thread(target=lambda: paced.on(0)(run))
    asking.start()
    asking.join(0.05)
    assert ran == []  # the device is busy
    end.set()
    asking.join(60)
    assert ran == ["xlarank-device-0"]
    assert clock.rested == pytest.approx(18.0)  # 2 s of every 20
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


@pytest.fixture(params=["beside", "on a device"])
def pace(request, paced):
    return paced.beside if request.param == "beside" else paced.on(0)


def test_it_does_not_rest_where_there_are_no_requests(pace, pool, clock):
    pool.idle.say(True)
    clock.now += 1
    pace(lambda: clock.wait(0.2))
    assert clock.rested == 0.2


def test_a_rest_ends_when_there_has_been_no_request_for_a_while(pace, pool, clock):
    pace(lambda: pool.idle.say(True) or clock.wait(0.02))
    assert clock.rested == pytest.approx(0.05, abs=0.0101)


@pytest.mark.parametrize("is_on_device", [False, True])
def test_a_rest_ends_when_something_else_goes_first(pool, clock, is_on_device):
    def check():
        if clock.rested > 0.3:
            raise UnavailableError("something else goes first")

    paced = PacedRuns(pool, share=0.1, check=check, wait=clock.wait, clock=clock)
    pace = paced.on(0) if is_on_device else paced.beside
    with pytest.raises(UnavailableError, match=r"^something else goes first$"):
        pace(lambda: clock.wait(0.2))
    assert clock.rested == pytest.approx(0.3, abs=0.0101)
    with pytest.raises(UnavailableError, match=r"^something else goes first$"):
        pace(lambda: pytest.fail("expected no piece"))


def test_a_pause_between_requests_ends_no_rest(paced, pool, clock):
    def wait(seconds):
        pool.idle.say(False)
        pool.idle.say(True)
        return clock.wait(seconds)

    paced = PacedRuns(pool, share=0.1, wait=wait, clock=clock)
    paced.beside(lambda: clock.wait(0.1))
    assert clock.rested == pytest.approx(0.1 + 0.4)


def test_nothing_goes_on_while_the_server_stops(pace, clock):
    clock.is_stopping = True
    with pytest.raises(UnavailableError, match=r"^the server is stopping$"):
        pace(lambda: clock.wait(0.1))
