"""Threads that look and wait: no number and no defect ends them."""

import logging
import math
import os
import threading

from xlarank.runtime import pool_threads
from xlarank.runtime.complaints import Complaints
from xlarank.runtime.pool_threads import Timer


def timer_of(look):
    lock = threading.Lock()
    return lock, Timer(lock, look, Complaints(logging.getLogger("xlarank.test")))


def test_a_timer_waits_for_any_time_and_looks_when_told_of_something_nearer(caplog):
    waits, looked = iter([1e12, 1e300, math.inf]), []

    def look():
        seconds = next(waits, None)
        looked.append(seconds)
        with lock:
            if seconds is not None:
                timer.wait(seconds, seconds)
        return seconds is not None

    lock, timer = timer_of(look)
    timer.start()
    while timer._thread.is_alive():
        with lock:
            timer.tell(5.0)
        os.sched_yield()
    timer.close()
    assert looked == [1e12, 1e300, math.inf, None]
    assert caplog.messages == []


def test_a_look_that_raises_is_logged_and_the_next_one_comes(caplog, monkeypatch):
    monkeypatch.setattr(pool_threads, "DEFECT_SECONDS", 0.001)
    looks = iter([True, ValueError("not as it should be"), True, False])

    def look():
        if isinstance(result := next(looks), Exception):
            raise result
        return result

    _, timer = timer_of(look)
    timer.start()
    timer.close()
    assert caplog.messages == ["the look at deadlines and devices that hang failed"]
    assert "ValueError: not as it should be" in caplog.text


def test_closing_does_not_wait_for_a_look_that_always_raises(monkeypatch):
    monkeypatch.setattr(pool_threads, "DEFECT_SECONDS", 0.001)
    has_looked = threading.Event()

    def look():
        has_looked.set()
        raise ValueError

    _, timer = timer_of(look)
    timer.start()
    assert has_looked.wait(60)
    timer.close()
    assert not timer._thread.is_alive()
