"""Who watches a server's health hears of every change, though nobody else calls and others don't listen."""

import contextlib
import gc
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_http2 import RawClient
from xlarank_serving import health
from xlarank_serving.client import RankingClient
from xlarank_serving.status import error_of_call

from xlarank.errors import OverloadError, XlarankError

Status = health_pb2.HealthCheckResponse
WATCH = "/grpc.health.v1.Health/Watch"
FEED = health_pb2.HealthCheckRequest(service="feed").SerializeToString()
DATA, RST_STREAM = 0, 3


@pytest.fixture
def watched(patient):
    """Opens a Watch; its statuses as they come."""
    stub = health_pb2_grpc.HealthStub(patient.channel)
    open_watches = []

    def watch(service):
        call = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)
        open_watches.append(call)
        return (response.status for response in call)

    yield watch
    for call in open_watches:
        call.cancel()


@pytest.fixture
def raw(patient):
    """Opens Watches of "feed" on a connection of its own."""
    with contextlib.ExitStack() as stack:

        def watch(count, *, num_sent=None, **options):
            client = stack.enter_context(contextlib.closing(RawClient(patient.server.address, **options)))
            for i in range(count):
                client.call(WATCH, FEED, num_sent=num_sent, stream=2 * i + 1)
            client.wait_for_settings()
            return client

        yield watch


def wait_for_watches(patient, count):
    while patient.server._health.num_watches != count:
        pass


def wait_for_frames(client, kind, count):
    while count:
        count -= client.next_frame()[0] == kind


def test_a_watcher_hears_that_a_model_was_unloaded_and_came_back(patient, watched):
    statuses = watched("feed")
    assert next(statuses) == Status.SERVING
    engine = patient.repository.engines.pop(("feed", 3))
    assert next(statuses) == Status.NOT_SERVING
    patient.repository.engines["feed", 3] = engine
    assert next(statuses) == Status.SERVING


def test_a_watcher_hears_that_the_server_is_not_ready(patient, watched):
    statuses = watched("")
    assert next(statuses) == Status.SERVING
    patient.repository.loading.add(("feed", 3))
    assert next(statuses) == Status.NOT_SERVING
    patient.repository.loading.clear()
    assert next(statuses) == Status.SERVING


def test_a_look_that_fails_is_not_the_last_one(patient, watched, caplog, monkeypatch):
    statuses = watched("feed")
    assert next(statuses) == Status.SERVING
    has_failed = []

    def models():
        if not has_failed:
            has_failed.append(True)
            raise XlarankError("for once")
        return []

    monkeypatch.setattr(patient.repository, "models", models)
    assert next(statuses) == Status.NOT_SERVING
    assert "health: the repository can't be asked" in caplog.text


def test_news_that_could_not_be_sent_are_not_the_last_ones(patient, watched, caplog, monkeypatch):
    statuses = watched("feed")
    assert next(statuses) == Status.SERVING
    (watch,) = patient.server._health._watches
    send, has_failed = watch.send, threading.Event()

    def fail(_):
        monkeypatch.setattr(watch, "send", send)
        has_failed.set()
        raise RuntimeError("for once")

    monkeypatch.setattr(watch, "send", fail)
    patient.repository.loading.add(("feed", 3))
    assert has_failed.wait(20)
    while patient.server._health._sending:
        pass
    assert "health: a watcher can't be told" in caplog.text
    patient.repository.loading.clear()
    assert next(statuses) == Status.SERVING


def test_a_model_that_is_not_there_yet_is_waited_for(patient, watched):
    statuses, others = watched("food"), watched("n" * 2**20)
    assert next(statuses) == next(others) == Status.SERVICE_UNKNOWN
    check = health_pb2_grpc.HealthStub(patient.channel).Check
    with pytest.raises(
        grpc.RpcError, match="service 'food' is not found; expected a model's name or ''"
    ) as info:
        check(health_pb2.HealthCheckRequest(service="food"), timeout=10)
    assert info.value.code() is grpc.StatusCode.NOT_FOUND
    patient.repository.engines["food", 1] = patient.engine
    assert next(statuses) == Status.SERVING


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        ([], "expected one request message, got none"),
        ([b"\xff"], "expected a HealthCheckRequest, got 1 bytes"),
    ],
)
def test_a_watch_of_nothing_is_refused(shared, requests, told):
    call = shared.channel.stream_stream(WATCH)(iter(requests), timeout=10)
    with pytest.raises(grpc.RpcError, match=told) as caught:
        next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_names_that_were_watched_are_not_kept(patient):
    watch = patient.channel.stream_stream(WATCH)  # the client keeps no message of such a call

    def ask(number):
        request = health_pb2.HealthCheckRequest(service=str(number) + "n" * 2**20)
        call = watch(iter([request.SerializeToString()]), timeout=60)
        assert Status.FromString(next(call)).status == Status.SERVICE_UNKNOWN
        return call

    calls = [ask(0)]
    tracemalloc.start()
    try:
        calls += [ask(number) for number in range(1, 30)]
        while_open = tracemalloc.get_traced_memory()[0]
        for call in calls:
            call.cancel()
        wait_for_watches(patient, 0)
        del calls, call
        gc.collect()
        at_the_end = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert max(while_open, at_the_end) < 5 * 2**20


def test_watchers_who_read_nothing_keep_no_news_from_others(patient, watched, raw):
    statuses = watched("feed")
    assert next(statuses) == Status.SERVING
    deaf = raw(20, window=7)  # more than threads tell of news; there is room for one status each
    wait_for_frames(deaf, DATA, 20)
    loading, feed = patient.repository.loading, ("feed", 3)
    for _ in range(3):
        loading.add(feed)
        assert next(statuses) == Status.NOT_SERVING
        assert not patient.client.is_ready("feed", timeout=10)
        loading.remove(feed)
        assert next(statuses) == Status.SERVING
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(patient.server.stop, 10)
        assert next(statuses) == Status.NOT_SERVING
        stopped.result(timeout=60)


def test_watches_sent_by_half_are_ended_and_keep_no_others_away(patient, watched, raw):
    halves = raw(40, num_sent=2)  # more than there are threads for them
    for _ in range(3):
        assert next(watched("feed")) == Status.SERVING
    wait_for_frames(halves, RST_STREAM, 40 - 7)  # the rest hold less than half of the threads


def test_a_watch_sent_by_half_is_not_waited_for_for_ever(wire):
    running = wire.start(max_receive_seconds=0.1)
    with contextlib.closing(RawClient(running.server.address)) as client:
        client.call(WATCH, FEED, num_sent=2)
        wait_for_frames(client, RST_STREAM, 1)
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def test_watches_past_the_limit_are_told_when_to_come_again(patient, watched, raw, monkeypatch):
    monkeypatch.setattr(health, "MAX_WATCHES", 3)
    others = raw(3)
    wait_for_frames(others, DATA, 3)
    call = health_pb2_grpc.HealthStub(patient.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    with pytest.raises(grpc.RpcError, match="the server has 3 open Watch calls, its limit") as caught:
        next(call)
    error = error_of_call(caught.value)
    assert isinstance(error, OverloadError)
    assert error.retry_after_seconds == 1.0
    with RankingClient(patient.server.address) as client:
        assert client.is_ready(timeout=10)
    others.close()
    wait_for_watches(patient, 0)
    assert next(watched("feed")) == Status.SERVING
