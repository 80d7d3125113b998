"""A source that is slow, hangs or fails: who waits for it, for how long, and what they are told."""

import contextlib
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import stored

from xlarank.errors import FeatureError, UnavailableError, XlarankError
from xlarank.host import FeatureRows, FeatureStore

IMPATIENT_MS = 20.0
NUM_THREADS = 8


class FakeClock:
    now = 100.0

    def __call__(self):
        return self.now


class Gate:
    """A source that lets a fetch end when the test says so; the rows are those of its beginning."""

    def __init__(self):
        self.asked, self.entered, self.opened = [], threading.Semaphore(0), threading.Event()
        self.price = 1.0

    def fetch(self, ids):
        rows = [row_of(i, self.price) for i in ids.tolist()]
        opened = self.opened
        self.asked.append(ids.tolist())
        self.entered.release()
        assert opened.wait(timeout=3600)
        return FeatureRows(ids, stored.columns_of(rows))


def row_of(i, price=1.0):
    return stored.DEFAULT_ROW | {"item": i % 100, "price": price}


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def cache(source, **options):
    options = {"fetch_timeout_ms": stored.PATIENT_MS} | options
    return FeatureStore(stored.SPEC, source=source, misses="fetch", memory_bytes=2**20, **options)


def joined(store, ids):
    return stored.rows_of(store.join(ids, {}))


def until_answered(store, ids):
    while True:
        with contextlib.suppress(UnavailableError):
            return joined(store, ids)


def test_requests_for_the_same_ids_ask_once_and_each_gives_up_in_time(gate):
    store = cache(gate, fetch_timeout_ms=IMPATIENT_MS)

    def refused(_):
        with pytest.raises(UnavailableError) as caught:
            store.join([3, 1], {})
        return str(caught.value)

    with ThreadPoolExecutor(16) as pool:
        told = set(pool.map(refused, range(32)))
    assert told == {"feature source Gate of model 'stored': no answer within 20 ms for ids [1, 3]"}
    assert gate.entered.acquire(timeout=60)
    assert gate.asked == [[1, 3]]
    stats = store.stats()
    assert (stats.fetches, stats.fetch_failures) == (0, 32)
    gate.opened.set()
    while not store.stats().fetches:
        os.sched_yield()
    assert joined(store, [1, 3]) == [row_of(1), row_of(3)]
    assert gate.asked == [[1, 3]], "the late answer is kept"


def test_of_ids_that_are_asked_for_already_only_the_others_are(gate):
    store = cache(gate)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(joined, store, [1, 2])
        assert gate.entered.acquire(timeout=60)
        second = pool.submit(joined, store, [3, 2, 4, 2])
        assert gate.entered.acquire(timeout=60)
        gate.opened.set()
        assert first.result(60) == [row_of(1), row_of(2)]
        assert second.result(60) == [row_of(i) for i in (3, 2, 4, 2)]
    assert gate.asked == [[1, 2], [3, 4]]


def test_while_every_thread_hangs_hits_are_answered_and_misses_refused_at_once(gate):
    clock = FakeClock()
    store = cache(gate, fetch_timeout_ms=IMPATIENT_MS, clock=clock)
    store.update([7], stored.columns_of([row_of(7)]))
    for i in range(100, 100 + NUM_THREADS):
        with pytest.raises(UnavailableError, match="no answer within"):
            store.join([7, i], {})
        assert gate.entered.acquire(timeout=60)
    with pytest.raises(UnavailableError, match=r"no answer within 20 ms for ids \[200\]"):
        store.join([200], {})  # waits for a thread
    clock.now += IMPATIENT_MS / 1000
    with pytest.raises(UnavailableError, match="all 8 threads that ask it have waited for more than 20 ms"):
        store.join([201], {})
    assert joined(store, [7]) == [row_of(7)]
    gate.opened.set()
    assert until_answered(store, [201, 200]) == [row_of(201), row_of(200)]
    assert sum(200 in ids for ids in gate.asked) == 1, "nobody waited any more for what had no thread"


def test_a_request_after_an_update_does_not_wait_for_what_was_asked_before_it(gate):
    store = cache(gate)
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(joined, store, [1])
        assert gate.entered.acquire(timeout=60)
        old, gate.opened, gate.price = gate.opened, threading.Event(), 2.0
        store.update([1], stored.columns_of([row_of(1, 2.0)]))
        store.remove([1])  # of the cache: the source has the last word
        after = pool.submit(joined, store, [1])
        assert gate.entered.acquire(timeout=60)
        gate.opened.set()
        assert after.result(60) == [row_of(1, 2.0)]
        old.set()
        assert before.result(60) == [row_of(1, 1.0)]
    assert joined(store, [1]) == [row_of(1, 2.0)]
    assert gate.asked == [[1], [1]]


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (ConnectionError("refused"), UnavailableError, "Raising of model 'stored': ConnectionError: refused"),
        (TimeoutError("slow"), UnavailableError, "TimeoutError: slow"),
        (UnavailableError("asleep"), UnavailableError, "Raising of model 'stored': asleep"),
        (KeyError(3), XlarankError, "Raising of model 'stored': KeyError: 3"),
        (FeatureError("own"), XlarankError, "Raising of model 'stored': own"),
    ],
)
def test_what_a_source_raises_is_told_and_over(raised, error, message, caplog):
    class Raising(Gate):
        fails = True

        def fetch(self, ids):
            if self.fails:
                raise raised
            return super().fetch(ids)

    source = Raising()
    source.opened.set()
    store = cache(source)
    with pytest.raises(XlarankError, match=message) as caught:
        store.join([1], {})
    assert type(caught.value) is error
    assert ("Traceback" in caplog.text) == isinstance(raised, KeyError)
    source.fails = False
    assert joined(store, [1]) == [row_of(1)]
    stats = store.stats()
    assert (stats.fetches, stats.fetch_failures) == (2, 1)


def test_the_time_of_fetches_is_counted():
    clock = FakeClock()

    class Slow:
        def fetch(self, ids):
            clock.now += 3
            return FeatureRows(ids, stored.columns_of([row_of(i) for i in ids.tolist()]))

    store = cache(Slow(), clock=clock)
    for i in (1, 2, 1):
        store.join([i], {})
    assert (store.stats().fetches, store.stats().fetch_seconds) == (2, 6.0)


def test_threads_that_fetched_hold_no_store_and_no_exit_of_the_process(gate):
    gc.disable()
    try:
        store, is_freed = cache(gate), threading.Event()
        weakref.finalize(store, is_freed.set)
        gate.opened.set()
        store.join(np.arange(5), {})
        del store
        assert is_freed.wait(timeout=60)
    finally:
        gc.enable()
    threads = [thread for thread in threading.enumerate() if thread.name == "xlarank-feature-fetch"]
    assert threads
    assert all(thread.daemon for thread in threads)
