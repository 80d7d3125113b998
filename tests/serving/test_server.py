"""Health, reflection, metadata, ports, metrics over HTTP, statuses, and the stop."""

import collections
import contextlib
import fcntl
import http.client
import math
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from prometheus_client.parser import text_string_to_metric_families
from xlarank_serving import transport
from xlarank_serving.config import ConnectionConfig, LimitConfig, SecurityConfig, ServerConfig
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import RankingServer, StopRequest, stop_on_signals
from xlarank_serving.status import answering, error_of, failure_reason, status_of

from xlarank.errors import (
    BundleError,
    ConfigError,
    FeatureError,
    ModelNotFoundError,
    OverloadError,
    RequestError,
    UnavailableError,
    XlarankError,
)
from xlarank.runtime import Timings

Status = health_pb2.HealthCheckResponse


def metric_values(text):
    """Value by sample name and labels, as a scraper reads it."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(serving):
    with urllib.request.urlopen(f"http://{serving.server.http_address}/metrics", timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return response.read().decode()


def test_who_asks_for_the_head_of_the_metrics_gets_no_body(serving):
    with contextlib.closing(http.client.HTTPConnection(serving.server.http_address, timeout=10)) as client:
        client.request("HEAD", "/metrics")
        response = client.getresponse()
        assert response.status == 200
        assert int(response.headers["Content-Length"]) > 1000
        assert response.read() == b""


def test_live_ready_and_server_metadata(serving, wire):
    m = wire.messages
    assert serving.call("ServerLive", m.ServerLiveRequest()).live
    assert serving.call("ServerReady", m.ServerReadyRequest()).ready
    assert serving.call("ModelReady", m.ModelReadyRequest(name="feed")).ready
    assert serving.call("ServerMetadata", m.ServerMetadataRequest()).name == "xlarank"
    serving.repository.loading.add(("feed", 3))
    assert not serving.call("ServerReady", m.ServerReadyRequest()).ready
    assert not serving.call("ModelReady", m.ModelReadyRequest(name="feed", version="3")).ready
    with pytest.raises(UnavailableError, match="is not at ready state"):
        serving.client.metadata("feed")


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata"])
def test_an_unknown_model_is_not_found(shared, wire, method):
    request = getattr(wire.messages, f"{method}Request")
    with pytest.raises(grpc.RpcError, match="Request for unknown model: 'food' is not found") as info:
        shared.call(method, request(name="food"))
    assert info.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError, match="'feed' version 9 is not found") as info:
        shared.call(method, request(name="feed", version="9"))
    assert info.value.code() is grpc.StatusCode.NOT_FOUND


def test_an_unknown_model_or_version_is_not_found_by_infer(shared, wire):
    details = shared.refusal(wire.messages.ModelInferRequest(model_name="food"), grpc.StatusCode.NOT_FOUND)
    assert details == "Request for unknown model: 'food' is not found"
    request = wire.raw(**wire.valid(1))
    request.model_version = "two"
    assert "version two is not found" in shared.refusal(request, grpc.StatusCode.NOT_FOUND)


def test_model_metadata_states_every_tensor_in_order(shared):
    metadata = shared.client.metadata("feed")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("feed", ["3"], "xlarank")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("age", "FP32", [1]),
        ("country", "BYTES", [1]),
        ("watched", "INT64", [-1]),
        ("watched.lengths", "INT32", [1]),
        ("mood", "FP32", [1, 2]),
        ("video", "INT64", [-1]),
        ("topics", "INT64", [-1]),
        ("topics.lengths", "INT32", [-1]),
        ("tags", "BYTES", [-1]),
        ("tags.lengths", "INT32", [-1]),
        ("likes", "FP32", [-1]),
        ("vector", "FP32", [-1, 3]),
        ("hour", "FP32", [-1]),
        ("fresh", "INT64", [-1]),
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("finish", "FP32", [-1]),
        ("share.score", "FP32", [-1]),
    ]


def test_health_follows_the_repository(serving):
    stub = health_pb2_grpc.HealthStub(serving.channel)

    def check(service):
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status

    assert (check(""), check("feed")) == (Status.SERVING, Status.SERVING)
    with pytest.raises(grpc.RpcError) as info:
        check("food")
    assert info.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="feed"), timeout=10)
    assert next(watch).status == Status.SERVING
    serving.repository.loading.add(("feed", 3))
    assert (check(""), check("feed")) == (Status.NOT_SERVING, Status.NOT_SERVING)
    assert next(watch).status == Status.NOT_SERVING
    watch.cancel()


def test_reflection_describes_what_is_served(shared):
    database = proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(shared.channel)
    assert set(database.get_services()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    }
    file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    (service,) = file.service
    assert {method.name for method in service.method} == {
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "ModelReady",
        "ModelMetadata",
        "ModelInfer",
        "ModelStreamInfer",
        "ModelConfig",
        "ModelStatistics",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    }
    assert database.FindFileContainingSymbol("grpc.health.v1.Health").package == "grpc.health.v1"
    # Served on this port to callers with an admin token.
    (admin,) = database.FindFileContainingSymbol("xlarank.admin.v1.Admin").service
    assert "UpdateRows" in {method.name for method in admin.method}
    del database


def test_probes_answer_while_every_ranking_thread_is_busy(wire, candidates):
    running = wire.start(num_threads=2)
    running.engine.hold()
    streams = [ServerReflectionStub(running.channel).ServerReflectionInfo(iter_forever()) for _ in range(4)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(running.client.score, "feed", candidates) for _ in range(3)]
        for _ in range(2):
            assert running.engine.arrived.acquire(timeout=10)
        stub = health_pb2_grpc.HealthStub(running.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == Status.SERVING
        assert running.client.is_ready("feed", timeout=10)
        running.engine.release()  # and the third is answered as soon as a thread is free
        assert [len(answer.result(timeout=10)["finish"]) for answer in answers] == [3, 3, 3]
    for stream in streams:
        stream.cancel()
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def iter_forever():
    yield ServerReflectionRequest(list_services="")
    threading.Event().wait()


def test_metrics_over_http_count_successes_and_failures(serving, wire, candidates):
    serving.client.score("feed", candidates)
    serving.engine.metrics.record_success(3, Timings(queue=0.001, gather=0.002, execute=0.003, total=0.01))
    serving.refusal(wire.raw(age=("FP32", [1], b"")))
    serving.engine.error = UnavailableError("model 'feed' version 3 is closed")
    with pytest.raises(UnavailableError, match="is closed"):
        serving.client.score("feed", candidates)
    serving.engine.error = ZeroDivisionError("boom")
    with pytest.raises(XlarankError, match="INTERNAL: internal error: ZeroDivisionError: boom"):
        serving.client.score("feed", candidates)
    values = metric_values(scrape(serving))
    model = (("model", "feed"), ("version", "3"))
    assert values["nv_inference_request_success_total", *model] == 1
    assert values["nv_inference_count_total", *model] == 3
    for reason, count in {"OTHER": 1, "REJECTED": 1, "BACKEND": 1, "CANCELED": 0}.items():
        labels = (model[0], ("reason", reason), model[1])
        assert values["nv_inference_request_failure_total", *labels] == count


def test_the_wait_for_a_thread_counts_from_the_headers_and_is_told(wire, candidates):
    running = wire.start(num_threads=1)
    running.engine.hold()
    threads = running.server._threads.rank
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(running.client.score, "feed", candidates)
        assert running.engine.arrived.acquire(timeout=10)
        second = callers.submit(running.client.score, "feed", candidates)
        while threads.num_open < 2:
            pass
        seen_at = time.monotonic()
        scrape(running)
        waited = time.monotonic() - seen_at
        running.engine.release()
        assert [len(call.result(timeout=10)["finish"]) for call in (first, second)] == [3, 3]
    values = metric_values(scrape(running))
    name, labels = "xlarank_wait_duration_histogram_us", (("model", "feed"), ("version", "3"))
    assert values[f"{name}_count", *labels] == 2
    assert values[f"{name}_sum", *labels] >= waited * 1e6
    assert running.engine.options[1].arrived_at <= seen_at
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def test_http_answers_nothing_but_metrics(shared):
    host, port = shared.server.http_address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().status == 404
    connection.close()


def test_scrapers_that_say_nothing_make_room_for_one_that_does(serving):
    host, port = serving.server.http_address.split(":")
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(40)
        ]
        silent[-1].sendall(b"GET /metrics HT")
        assert b"nv_inference_count" in scrape(serving).encode()
        assert silent[0].recv(1) == b""
        silent[-1].sendall(b"TP/1.0\r\n\r\n")  # of the 16 that are left
        assert silent[-1].recv(12) == b"HTTP/1.0 200"


def test_an_internal_error_is_logged_and_the_server_goes_on(serving, candidates, caplog):
    serving.engine.error = ZeroDivisionError("boom")
    with pytest.raises(XlarankError, match="ZeroDivisionError: boom"):
        serving.client.score("feed", candidates)
    assert "ZeroDivisionError: boom" in caplog.text
    serving.engine.error = None
    assert len(serving.client.score("feed", candidates)["finish"]) == 3


def test_a_caller_who_leaves_cancels_its_request(serving, wire):
    serving.engine.hold()
    request = wire.raw(**wire.valid(2))
    call = serving.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", type(request).SerializeToString
    ).future(request)
    assert serving.engine.arrived.acquire(timeout=10)
    ((future, _),) = serving.engine.held
    gone = threading.Event()
    future.add_done_callback(lambda _: gone.set())
    call.cancel()
    assert gone.wait(timeout=10)
    assert future.cancelled()
    serving.engine.release()


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_a_port_in_use_is_an_error_that_names_it(wire, which):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"port": port, "http_port": 0} if which == "grpc" else {"port": 0, "http_port": port}
        with pytest.raises(ConfigError, match=f"{which} port {port} on 127.0.0.1: expected a free port, got"):
            wire.start_at(**ports)


def test_two_servers_never_share_a_port(shared, wire):
    with pytest.raises(
        ConfigError, match=f"grpc port {shared.server.port} on 127.0.0.1: expected a free port"
    ):
        wire.start_at(port=shared.server.port, http_port=0)
    with pytest.raises(ConfigError, match=f"http port {shared.server.http_port} on 127.0.0.1"):
        wire.start_at(port=0, http_port=shared.server.http_port)


def test_an_address_that_is_not_ours_is_an_error(wire):
    with pytest.raises(ConfigError, match=r"port 0 on 192\.0\.2\.1: expected a free port, got"):
        wire.start_at(host="192.0.2.1", port=0, http_port=0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"port": 65536}, r"port must be in \[0, 65535\]; was 65536"),
        ({"http_port": -1}, r"http_port must be in \[0, 65535\]; was -1"),
        ({"admin_port": 2**16}, r"admin_port must be in \[0, 65535\]; was 65536"),
        ({"num_threads": 0}, "num_threads must be >= 1; was 0"),
        ({"grace_seconds": -1.0}, "grace_seconds must be >= 0; was -1.0"),
        ({"stream_idle_seconds": -1.0}, "stream_idle_seconds must be >= 0; was -1.0"),
        ({"stream_idle_seconds": 1e10}, "stream_idle_seconds must be <= 2000000.0; was 10000000000.0"),
        ({"grace_seconds": math.nan}, "grace_seconds must be a finite number; was nan"),
    ],
)
def test_a_bad_config_is_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        ServerConfig(**fields)


@pytest.mark.parametrize(
    ("config", "fields", "text"),
    [
        (LimitConfig, {"max_message_mib": 4096}, "limits: max_message_mib must be <= 2047; was 4096"),
        (LimitConfig, {"max_inputs": 0}, "limits: max_inputs must be >= 1; was 0"),
        (LimitConfig, {"max_receive_seconds": 0.0}, "limits: max_receive_seconds must be >= 0.1; was 0.0"),
        (ConnectionConfig, {"max_streams": 0}, "connections: max_streams must be >= 1; was 0"),
        (
            ConnectionConfig,
            {"max_idle_seconds": -1.0},
            "connections: max_idle_seconds must be >= 0; was -1.0",
        ),
        (
            ConnectionConfig,
            {"keepalive_timeout_seconds": 0.0},
            "connections: keepalive_timeout_seconds must be > 0; was 0.0",
        ),
        (
            SecurityConfig,
            {"tls_key": Path("k")},
            "security: expected tls_certificate beside tls_key, got none",
        ),
        (SecurityConfig, {"tls_certificate": Path("c")}, "expected tls_key beside tls_certificate, got none"),
        (
            SecurityConfig,
            {"client_ca": Path("c")},
            "client_ca asks clients for certificates, which takes TLS",
        ),
    ],
)
def test_a_bad_limit_is_refused(config, fields, text):
    with pytest.raises(ConfigError, match=text):
        config(**fields)


def test_under_overload_a_request_is_refused_unread(wire, candidates):
    running = wire.start()
    send = running.channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
    with pytest.raises(grpc.RpcError) as info:
        send(b"no message", timeout=10)
    assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    running.repository.refusal = OverloadError("the queue is full: why", 0.25)
    with pytest.raises(grpc.RpcError) as info:
        send(b"no message", timeout=10)
    assert (info.value.code(), info.value.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full: why",
    )
    assert dict(info.value.trailing_metadata())["grpc-retry-pushback-ms"] == "250"
    assert running.client.metadata("feed").versions == ["3"]  # nothing else is refused
    running.repository.refusal = None
    assert len(running.client.score("feed", candidates)["finish"]) == 3


def test_requests_that_no_version_counts_are_counted_by_status(serving, wire):
    def refused():
        (family,) = serving.server.refusals.collect()
        return {sample.labels["status"]: sample.value for sample in family.samples}

    send = serving.channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
    many = wire.raw(**wire.valid(1))
    many.id = "i" * 2000
    unknown = wire.messages.ModelInferRequest(model_name="food").SerializeToString()
    bad = wire.raw(age=("FP32", [1], b"")).SerializeToString()  # which version 3 counts
    for data in (b"no message", many.SerializeToString(), unknown, bad):
        with pytest.raises(grpc.RpcError):
            send(data, timeout=10)
    assert refused() == {"INVALID_ARGUMENT": 2, "NOT_FOUND": 1}
    assert serving.engine.metrics.statistics().num_failures == 1
    serving.repository.refusal = OverloadError("the queue is full: why", 0.25)
    with pytest.raises(grpc.RpcError):
        send(bad, timeout=10)
    assert refused()["RESOURCE_EXHAUSTED"] == 1


def test_calls_that_wait_for_their_engine_or_never_come_are_not_on_their_way(wire):
    running = wire.start()
    looks = running.repository.overloads
    running.engine.hold()
    send = running.channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
    request = wire.raw(**wire.valid(3)).SerializeToString()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(send, request, timeout=30) for _ in range(3)]
        for _ in range(3):
            assert running.engine.arrived.acquire(timeout=10)
        # One whose headers come, and its message not: it counts for a moment alone.
        halves = queue.SimpleQueue()
        slow = running.channel.stream_unary(f"/{SERVICE_NAME}/ModelInfer")
        late = slow.future(iter(halves.get, None), timeout=30)
        deadline = time.monotonic() + 10
        while len(looks) < 4:
            assert time.monotonic() < deadline
        running.engine.release()
        while looks[-1] or len(looks) < 6:
            send(request, timeout=10)
            assert time.monotonic() < deadline
        halves.put(request)
        halves.put(None)
        for answer in [*answers, late]:
            answer.result(timeout=10)


def test_stop_answers_what_was_accepted_and_then_closes_the_repository(wire, candidates):
    running = wire.start()
    running.engine.hold()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(running.client.score, "feed", candidates) for _ in range(2)]
        for _ in range(2):
            assert running.engine.arrived.acquire(timeout=10)
        watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == Status.SERVING
        stopped = pool.submit(running.server.stop, 30)
        assert next(watch).status == Status.NOT_SERVING  # the stop has begun
        watch.cancel()
        with pytest.raises(UnavailableError, match="the server is stopping"):
            running.client.score("feed", candidates)
        assert not running.repository.is_closed
        running.engine.release()
        assert [len(answer.result(timeout=10)["finish"]) for answer in answers] == [3, 3]
        stopped.result(timeout=10)
    assert running.repository.is_closed
    with pytest.raises(UnavailableError):
        running.client.score("feed", candidates)
    running.channel.close()
    running.client.close()


def test_whoever_calls_during_a_stop_is_told_so_and_never_that_it_cancelled_itself(wire):
    running, request = wire.start(), wire.raw(**wire.valid(3)).SerializeToString()
    codes, is_answered, is_stopped = collections.Counter(), threading.Semaphore(0), threading.Event()

    def ask():
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
        with grpc.insecure_channel(running.server.address, options) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            while not is_stopped.is_set():
                try:
                    infer(request, timeout=20)
                    codes[grpc.StatusCode.OK] += 1
                    is_answered.release()
                except grpc.RpcError as error:
                    codes[error.code()] += 1

    callers = [threading.Thread(target=ask) for _ in range(8)]
    for caller in callers:
        caller.start()
    assert all(is_answered.acquire(timeout=20) for _ in range(40))
    running.server.stop(30)
    is_stopped.set()
    for caller in callers:
        caller.join()
    assert codes.keys() == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    running.channel.close()
    running.client.close()


def test_connections_are_counted_and_no_file_is_left_open(wire):
    running = wire.start()
    live = running.channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
    live(b"", timeout=10)
    before = len(os.listdir("/proc/self/fd"))
    assert [transport.num_connections(running.server.port) for _ in range(3)] == [1, 1, 1]
    assert len(os.listdir("/proc/self/fd")) == before
    transport.stop_listening(running.server.port)
    live(b"", timeout=10)  # who is there stays
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.server.port), timeout=10)
    running.server.stop(0)
    running.channel.close()
    running.client.close()


def test_an_open_watch_does_not_hold_up_a_stop(wire):
    running = wire.start()
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(watch).status == Status.SERVING
    with ThreadPoolExecutor(1) as pool:
        pool.submit(running.server.stop, 600).result(timeout=60)
    assert running.repository.is_closed
    watch.cancel()
    running.channel.close()
    running.client.close()


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "ServerLive"])
@pytest.mark.parametrize("data", [b"\xff" * 50, b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_message_are_the_callers_fault(wire, method, data):
    running = wire.start()
    call = running.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
    if method == "ServerLive" and data[0] == 0x0A:
        data = b"\x0a\x7f"
    with pytest.raises(grpc.RpcError) as caught:
        call(data, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"expected a {method}Request, got {len(data)} bytes" in caught.value.details()
    running.server.stop(0)
    running.channel.close()
    running.client.close()


@pytest.mark.parametrize("grace", [0, 0.01])
def test_a_stop_answers_what_is_left_when_its_grace_is_over(wire, candidates, grace):
    running = wire.start()
    running.engine.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.client.score, "feed", candidates)
        assert running.engine.arrived.acquire(timeout=10)
        running.server.stop(grace)
        # Without grace the connection may be closed before the caller has read it.
        words = f"the server is stopping, and the answer didn't come within {grace:g} s" if grace else "."
        with pytest.raises(UnavailableError if grace else XlarankError, match=words):
            answer.result(timeout=10)
    assert isinstance(running.engine.held[0][0].exception(timeout=0), UnavailableError)
    running.channel.close()
    running.client.close()


def test_a_stop_is_waited_for_where_many_files_are_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    stop = StopRequest()
    try:
        reader, stop._reader = stop._reader, fcntl.fcntl(stop._reader, fcntl.F_DUPFD_CLOEXEC, 1024)
        os.close(reader)
        assert stop.wait(0.001) is False
        stop.set()
        assert stop.wait() is True
    finally:
        stop.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_stop_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(timeout=10)
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


SIGNAL_AT_EVERY_LINE = """
import signal, sys
from xlarank_serving.server import stop_on_signals

def wait_with_signal_at(place):
    left = [place]

    def trace(frame, event, argument):
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)
        return trace

    with stop_on_signals() as stop:
        sys.settrace(trace)
        try:
            is_set = stop.wait(timeout=0.05)
        finally:
            sys.settrace(None)
        return is_set, left[0] <= 0

results = [wait_with_signal_at(place) for place in range(1, 30)]
assert results[0] == (True, True), results
assert all(is_set or not was_sent for is_set, was_sent in results), results
"""


def test_a_signal_ends_the_wait_wherever_in_it_it_comes():
    """An Event's lock would be waited for by the handler that interrupted its holder, for ever."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = SIGNAL_AT_EVERY_LINE
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)


SIGNAL_TO_ANOTHER_THREAD = """
import os, signal, threading
from pathlib import Path
from xlarank_serving.server import stop_on_signals

def send():
    where = Path(f"/proc/self/task/{os.getpid()}/wchan")
    while (channel := where.read_text()) != "0" and "poll" not in channel:  # "0": the system doesn't say
        pass
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

with stop_on_signals() as stop:
    threading.Thread(target=send).start()
    assert stop.wait()
"""


def test_a_signal_that_does_not_end_the_system_call_ends_the_wait():
    """As it comes to another thread, or in the moment before the call: Python runs the handler after it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SIGNAL_TO_ANOTHER_THREAD], env=environment, timeout=60, check=True)


@pytest.mark.parametrize(
    ("error", "code", "text", "reason"),
    [
        (FeatureError("feature 'x': no"), "INVALID_ARGUMENT", "feature 'x': no", "OTHER"),
        (RequestError("no"), "INVALID_ARGUMENT", "no", "OTHER"),
        (ModelNotFoundError("no model"), "NOT_FOUND", "no model", "OTHER"),
        (UnavailableError("closed"), "UNAVAILABLE", "closed", "REJECTED"),
        (CancelledError(), "CANCELLED", "cancelled", "CANCELED"),
        (BundleError("bad"), "INTERNAL", "internal error: BundleError: bad", "BACKEND"),
        (ValueError("bad"), "INTERNAL", "internal error: ValueError: bad", "BACKEND"),
    ],
)
def test_each_exception_has_its_code(error, code, text, reason):
    assert status_of(error) == (grpc.StatusCode[code], text)
    assert failure_reason(error) == reason


def test_the_log_hears_of_a_defect_once_a_minute_however_many_calls_meet_it(caplog):
    @answering
    def method(request, context):
        raise ZeroDivisionError("boom")

    codes = []
    for _ in range(3):
        method(None, SimpleNamespace(abort=lambda code, details: codes.append(code)))
    assert codes == [grpc.StatusCode.INTERNAL] * 3
    (said,) = caplog.records
    assert said.getMessage() == "request failed: internal error: ZeroDivisionError: boom"
    assert said.exc_info is not None


@pytest.mark.parametrize("error", [RequestError("r"), ModelNotFoundError("m"), UnavailableError("u")])
def test_a_client_gets_the_exception_back(error):
    back = error_of(*status_of(error))
    assert (type(back), str(back)) == (type(error), str(error))


def test_details_are_cut_between_characters():
    _, details = status_of(RequestError("aé" * 10_000))
    assert details == "aé" * 666 + "a..."  # 3 bytes a pair; the 2000th would be half an é


def test_a_server_is_a_context_manager(wire):
    running = wire.start()
    with running.server as server:
        assert isinstance(server, RankingServer)
        assert running.client.is_ready()
    assert running.repository.is_closed
    running.channel.close()
    running.client.close()
