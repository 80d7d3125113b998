"""The load generator: Poisson gaps, latencies from the intended start, bounds, a process of its own."""

import contextlib
import math
import threading
import time
from concurrent import futures
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from open_loop import UNSENT, LoadGenerator, play, save_requests
from serving_lab import arrivals_of, fixed_sizes, md1_latencies, mixed_sizes, small_sizes
from serving_swaps import WARM, run_swaps
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.metrics_http import MetricsServer
from xlarank_serving.threads import on_threads


class FakeClock:
    """Time passes when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeCall:
    """Answered before anybody asks, after some time has passed."""

    def __init__(self, code="OK"):
        self._code = code

    def code(self):
        return SimpleNamespace(name=self._code)

    def add_done_callback(self, callback):
        callback(self)


def played(send, at, **options):
    clock = FakeClock()
    return play(
        lambda data, timeout: send(clock, data),
        [b"a", b"b"],
        at,
        [0] * len(at),
        timeout=1,
        clock=clock,
        sleep=clock.sleep,
        **options,
    )


def test_requests_start_at_their_times_and_codes_are_counted():
    codes = iter(["OK", "RESOURCE_EXHAUSTED", "OK"])

    def send(clock, data):
        clock.sleep(0.01)
        return FakeCall(next(codes))

    result = played(send, [0.0, 1.0, 2.0])
    np.testing.assert_allclose(result.latencies, 0.01)
    np.testing.assert_allclose(result.lags, 0, atol=1e-9)
    assert result.counts == {"OK": 2, "RESOURCE_EXHAUSTED": 1}
    assert result.is_ok.tolist() == [True, False, True]
    assert len(result.answered) == 2
    assert result.latency(0.99) == pytest.approx(0.01)


def test_who_is_held_up_is_late_from_its_intended_start():
    """The first request takes the generator itself a second; the ones behind it count what they waited."""
    seconds = iter([1.0, 0.0, 0.0, 0.0])

    def send(clock, data):
        clock.sleep(next(seconds))
        return FakeCall()

    result = played(send, [0.0, 0.25, 0.5, 2.0])
    np.testing.assert_allclose(result.latencies, [1.0, 0.75, 0.5, 0.0], atol=1e-9)
    np.testing.assert_allclose(result.lags, [0.0, 0.75, 0.5, 0.0], atol=1e-9)


def test_no_more_than_so_many_are_open():
    """Two are never answered until the fourth is due: the third isn't sent, the fourth is."""
    clock, waiting = FakeClock(), []

    class Open(FakeCall):
        def add_done_callback(self, callback):
            waiting.append(lambda: callback(self))

    def sleep(seconds):
        clock.sleep(seconds)
        if clock.now > 100.3:
            while waiting:
                waiting.pop()()

    def send(data, timeout):
        return Open() if clock.now < 100.3 else FakeCall()

    result = play(
        send, [b"a"], [0.0, 0.1, 0.2, 0.3], [0] * 4, timeout=1, max_open=2, clock=clock, sleep=sleep
    )
    assert result.codes == ["OK", "OK", UNSENT, "OK"]
    assert np.isnan(result.latencies).tolist() == [False, False, True, False]
    np.testing.assert_allclose(result.latencies[[0, 1, 3]], [0.3, 0.2, 0.0], atol=1e-9)


def test_a_schedule_may_end_before_all_of_it_is_due():
    """Told while the third request is under way: what was sent is answered, what is left isn't part of it."""
    answers, num_sent = [], 0

    class Open(FakeCall):
        def add_done_callback(self, callback):
            answers.append(lambda: callback(self))

    def send(data, timeout):
        nonlocal num_sent
        num_sent += 1
        return Open()

    def is_over():
        if num_sent < 3:
            return False
        while answers:
            answers.pop()()
        return True

    clock = FakeClock()
    at = [0.1 * place for place in range(10)]
    result = play(send, [b"a"], at, [0] * 10, timeout=1, is_over=is_over, clock=clock, sleep=clock.sleep)
    assert result.codes == ["OK"] * 3
    np.testing.assert_array_equal(result.at, at[:3])
    np.testing.assert_allclose(result.latencies, [0.3, 0.2, 0.1], atol=1e-9)
    assert len(result.lags) == 3


def test_gaps_are_exponential():
    """Kolmogorov and Smirnov: the distance at a level of 0.1%."""
    arrivals, choices = arrivals_of(mixed_sizes(), 50.0, 20_000, seed=3)
    gaps = np.sort(np.diff([arrival.at for arrival in arrivals], prepend=0.0))
    expected = 1 - np.exp(-50.0 * gaps)
    assert np.abs(expected - (np.arange(len(gaps)) + 0.5) / len(gaps)).max() < 1.95 / math.sqrt(len(gaps))
    assert {arrival.num_rows for arrival in arrivals} == set(mixed_sizes().sizes)
    assert [mixed_sizes().sizes[choice] for choice in choices] == [arrival.num_rows for arrival in arrivals]
    again, _ = arrivals_of(mixed_sizes(), 50.0, 20_000, seed=3)
    assert again == arrivals


def test_traffics():
    assert set(fixed_sizes(500).sizes) == {500}
    assert small_sizes().sizes == tuple(range(1, 17))
    # Of a lognormal distribution: its median and its mean.
    assert np.median(mixed_sizes().sizes) == pytest.approx(math.exp(5.1), rel=0.01)
    assert np.mean(mixed_sizes().sizes) == pytest.approx(math.exp(5.1 + 0.2**2 / 2), rel=0.01)


def test_an_m_d_1_queue_by_hand_and_in_the_mean():
    np.testing.assert_allclose(md1_latencies([0.0, 0.5, 0.6, 5.0], 1.0), [1.0, 1.5, 2.4, 1.0])
    arrivals, _ = arrivals_of(fixed_sizes(1), 0.7, 40_000, seed=1)
    mean = md1_latencies([arrival.at for arrival in arrivals], 1.0).mean()
    assert mean == pytest.approx(1 + 0.7 / (2 * 0.3), rel=0.05)  # Pollaczek and Khinchine


@contextlib.contextmanager
def fake_server(answer, num_threads=8, **others):
    """A gRPC server whose ModelInfer is a function of the request's bytes; other methods likewise."""
    server = grpc.server(futures.ThreadPoolExecutor(num_threads))
    methods = {"ModelInfer": answer, **others}
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def requests(tmp_path):
    save_requests(tmp_path / "requests.npz", [b"small", b"larger", b"", b"refused"])
    return tmp_path / "requests.npz"


def test_the_process_sends_what_it_is_told_when_it_is_told(requests):
    arrived = []

    def answer(data, context):
        arrived.append((time.perf_counter(), data))
        if data == b"refused":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return data

    arrivals, choices = arrivals_of(small_sizes(), 400.0, 200, seed=5)
    at, choices = [arrival.at for arrival in arrivals], [choice % 4 for choice in choices]
    with fake_server(answer) as address, LoadGenerator(address, requests) as generator:
        result = generator.play(at, choices)
        loop = generator.closed_loop([0, 3], outstanding=2, seconds=0.2, warm_seconds=0.05)
    sent = [data for _, data in sorted(arrived[:200])]
    names = [b"small", b"larger", b"", b"refused"]
    assert sorted(sent) == sorted(names[choice] for choice in choices)
    assert result.counts == {"OK": sum(c != 3 for c in choices), "RESOURCE_EXHAUSTED": choices.count(3)}
    np.testing.assert_array_equal(result.at, at)
    assert (result.latencies > 0).all()
    assert (result.lags >= 0).all()
    # None was sent before its time, by the server's own clock: the earliest sets the zero.
    times = np.sort([when for when, _ in arrived[:200]])
    assert (np.sort(np.array(at) + result.latencies) + 1 >= times - times[0]).all()
    assert loop.counts.keys() == {"OK", "RESOURCE_EXHAUSTED"}
    assert loop.num_answers == sum(loop.counts.values())
    assert loop.rate > 0


def test_a_stall_of_the_server_is_in_the_latency_of_all_that_wait_for_it(requests):
    """One thread serves; it stops for a while at the fifth request. Who comes meanwhile waits to its end."""
    released, stall = [], 0.4
    num_seen = 0

    def answer(data, context):
        nonlocal num_seen
        num_seen += 1
        if num_seen == 5:
            begin = time.perf_counter()
            threading.Event().wait(stall)
            released.append(time.perf_counter() - begin)
        return data

    at = [0.02 * place for place in range(30)]
    with fake_server(answer, num_threads=1) as address, LoadGenerator(address, requests) as generator:
        result = generator.play(at, [0] * len(at))
    assert result.counts == {"OK": 30}
    # From its own arrival on, each waits for what is left of the stall; nothing can shorten that.
    begin = at[4]
    for arrival, latency in zip(at[4:], result.latencies[4:], strict=True):
        assert latency >= stall - (arrival - begin) - 1e-3
    assert result.lags[5:20].max() < result.latencies[5]  # the generator went on sending


def test_an_answer_that_never_comes_has_a_status_too(requests):
    ended = threading.Event()

    def answer(data, context):
        ended.wait(10)
        return data

    with fake_server(answer) as address, LoadGenerator(address, requests) as generator:
        result = generator.play([0.0, 0.01], [0, 1], timeout=0.1)
        ended.set()
    assert result.counts == {"DEADLINE_EXCEEDED": 2}
    assert math.isnan(result.latency(0.5))


def test_what_is_played_ends_with_the_context(requests):
    """The schedule is of a quarter of an hour; the process does as it is told afterwards, too."""
    seen = threading.Semaphore(0)

    def answer(data, context):
        seen.release()
        return data

    at = [0.01 * place for place in range(90_000)]
    with fake_server(answer) as address, LoadGenerator(address, requests) as generator:
        with generator.playing(at, [0] * len(at)) as played:
            for _ in range(5):
                seen.acquire()
            assert not played
        (result,) = played
        with generator.playing([0.0], [1]) as one:  # ends by itself, or before it has begun
            pass
        again = generator.play([0.0, 0.01], [0, 1])
    assert 5 <= len(result.at) < len(at)
    np.testing.assert_array_equal(result.at, at[: len(result.at)])
    assert result.counts == {"OK": len(result.at)}
    assert len(one[0].at) <= 1
    assert again.counts == {"OK": 2}


class Published:
    """A repository of one version, or of two."""

    model = "feed"

    def __init__(self):
        self.last = 1

    def publish(self, build):
        self.last += 1
        return self.last


def test_load_stays_open_loop_while_a_version_stalls_the_server(tmp_path):
    """Ranking stops when the version appears and goes on when it alone is there, two seconds later."""
    repository, goes_on, looks = Published(), threading.Event(), iter(range(20))
    begins, ends = [], []
    goes_on.set()

    def rank(data, context):
        goes_on.wait()
        threading.Event().wait(0.02)
        return data

    def index(data, context):
        answer = messages.RepositoryIndexResponse()
        answer.models.add(name="feed", version=str(repository.last), state="READY")
        if repository.last == 2 and next(looks, None) is not None:
            goes_on.clear()
            begins.append(time.monotonic())
            answer.models.add(name="feed", version="1", state="UNLOADING")
        else:
            ends.append(time.monotonic())
            goes_on.set()
        return answer.SerializeToString()

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(futures.ThreadPoolExecutor(1))
        address = stack.enter_context(fake_server(rank, 1, RepositoryIndex=on_threads(index, pool)))
        metrics = MetricsServer(lambda: b"xlarank_serving_compiles_total 0\n", host="127.0.0.1", port=0)
        stack.enter_context(contextlib.closing(metrics))
        save_requests(tmp_path / "requests.npz", [b"x"] * 16)
        generator = stack.enter_context(LoadGenerator(address, tmp_path / "requests.npz"))
        ready = {"grpc": address, "http": f"127.0.0.1:{metrics.port}"}
        run = run_swaps(ready, generator, repository, [(WARM, None)], 0.5, seed=1)
    (swap,), at = run.swaps, run.played.at
    # One schedule from the first pause to the last: nothing has held a part of it back.
    schedule = np.array([arrival.at for arrival in arrivals_of(fixed_sizes(1), 1.0, len(at), seed=1)[0]])
    np.testing.assert_allclose(at / at[-1], schedule / schedule[-1])
    assert run.played.began_at + at[-1] > swap.end
    begin = begins[0] - run.played.began_at
    end = min(when for when in ends if when > begins[0]) - run.played.began_at
    stalled = (at > begin) & (at < end)
    assert stalled.sum() > 5
    assert (at + run.played.latencies)[stalled].min() >= end
