"""Access log and traces of real calls to a server."""

import contextlib
import itertools
import json
import os
import re
import resource
import socket
import time
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from xlarank_serving import access_log, tracing
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.access_log import AccessLog, line_of
from xlarank_serving.config import AccessLogConfig, ServerConfig, TracingConfig
from xlarank_serving.request_record import RequestRecord
from xlarank_serving.server import RankingServer
from xlarank_serving.tracing import Tracer

from xlarank.cli import serve_start
from xlarank.cli.serve_config import ServeConfig
from xlarank.errors import ConfigError, OverloadError
from xlarank.runtime import Timings

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def record(**fields):
    given = {
        "ended_at": 1_700_000_000.25,
        "model": "feed",
        "version": "3",
        "id": "a",
        "candidates": 5,
        "status": "OK",
        "message": "",
        "total_seconds": 0.010,
        "decode_seconds": 0.001,
        "timings": Timings(queue=0.002, gather=0.003, execute=0.0035, total=0.009),
    }
    return RequestRecord(**given | fields)


@pytest.fixture
def ask(wire):
    """Sends the valid request, or what is left of it, to a server with observers; gives the status code."""
    running = []

    def start(*observers):
        repository = wire.repository()
        engine = repository.add(wire.spec, 3)
        config = ServerConfig(port=0, http_port=0)
        server = RankingServer(repository, repository.metrics.text, config, observers=observers)
        channel = grpc.insecure_channel(server.address)
        running.append((server, channel))
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
            messages.ModelInferResponse.FromString,
        )

        def ask(request, metadata=()):
            try:
                infer(request, timeout=20, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        return ask, engine

    yield start
    for server, channel in running:
        channel.close()
        server.stop(0)


def valid(wire):
    return wire.raw(**wire.valid())


def test_requests_are_logged_with_their_times_and_what_failed_with_its_reason(ask, wire, tmp_path):
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogConfig(path=path))
    send, engine = ask(log)
    request = valid(wire)
    request.id = "first"
    assert send(request) is grpc.StatusCode.OK
    broken = wire.raw(age=("FP32", [1], b""))
    assert send(broken) is grpc.StatusCode.INVALID_ARGUMENT
    engine.error = OverloadError("the queue is full", 0.25)
    assert send(valid(wire)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    request = valid(wire)
    request.model_name = "nobody"
    assert send(request) is grpc.StatusCode.NOT_FOUND
    assert send(b"no message") is grpc.StatusCode.INVALID_ARGUMENT
    log.close()
    answered, refused, full, unknown, malformed = map(json.loads, path.read_text().splitlines())
    assert (answered["transport"], answered["wait_ms"] >= 0) == ("grpc", True)
    assert (malformed["status"], malformed["model"]) == ("INVALID_ARGUMENT", "")
    assert malformed["message"].startswith("expected a ModelInferRequest, got 10 bytes that aren't one")
    assert (answered["id"], answered["status"], answered["version"]) == ("first", "OK", "3")
    assert answered["candidates"] == 3
    assert (answered["queue_ms"], answered["gather_ms"], answered["execute_ms"]) == (1.0, 2.0, 3.0)
    assert answered["ms"] > answered["decode_ms"] > 0
    assert refused["status"] == "INVALID_ARGUMENT"
    assert "age" in refused["message"]
    assert (full["status"], full["message"]) == ("RESOURCE_EXHAUSTED", "the queue is full")
    assert (full["candidates"], full["version"]) == (3, "3")  # it was read, and refused then
    assert full["decode_ms"] > 0
    assert (unknown["status"], unknown["model"]) == ("NOT_FOUND", "nobody")


def test_a_share_is_logged_evenly_and_failures_all_of_them(tmp_path):
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogConfig(path=path, share=0.25))
    for number in range(400):
        log(record(id=str(number)))
        if number % 100 == 0:
            log(record(status="INTERNAL", message="broken"))
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(line["status"] == "INTERNAL" for line in lines) == 4
    kept = [int(line["id"]) for line in lines if line["status"] == "OK"]
    assert 95 <= len(kept) <= 105
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 6


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path):
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogConfig(path=path))
    log(record(id="before"))
    deadline = time.monotonic() + 30
    while "before" not in path.read_text() and time.monotonic() < deadline:
        pass
    path.rename(tmp_path / "access.log.1")
    path.touch()  # as logrotate's `create` does
    log(record(id="after"))
    log.close()
    assert "before" in (tmp_path / "access.log.1").read_text()
    assert "after" in path.read_text()


def test_a_log_whose_folder_goes_and_comes_back_goes_on(tmp_path, caplog):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = AccessLog(AccessLogConfig(path=folder / "access.log"))
    folder.rename(tmp_path / "away")
    log(record(id="lost"))
    deadline = time.monotonic() + 30
    while "access log: lines are lost: " not in caplog.text and time.monotonic() < deadline:
        pass
    folder.mkdir()
    log(record(id="after"))
    log.close()
    lost, after = map(json.loads, (folder / "access.log").read_text().splitlines())
    assert (lost, after["id"]) == ({"dropped_lines": 1}, "after")


def test_a_log_goes_on_when_a_full_disk_was_rotated_away(tmp_path, caplog):
    path = tmp_path / "access.log"
    path.symlink_to("/dev/full")
    log = AccessLog(AccessLogConfig(path=path))
    for _ in range(3):
        log(record(id="lost"))
    deadline = time.monotonic() + 30
    while log._num_lost < 3 and time.monotonic() < deadline:
        pass
    path.unlink()
    log(record(id="after"))
    log.close()
    lost, after = map(json.loads, path.read_text().splitlines())
    assert (lost, after["id"]) == ({"dropped_lines": 3}, "after")
    assert [r.getMessage() for r in caplog.records] == [
        "access log: lines are lost: [Errno 28] No space left on device"
    ]


def test_a_log_on_a_full_disk_is_closed_and_says_what_is_lost(tmp_path, caplog):
    path = tmp_path / "access.log"
    path.symlink_to("/dev/full")
    log = AccessLog(AccessLogConfig(path=path))
    log(record())
    log.close()
    assert not log._thread.is_alive()
    assert "access log: 1 lines were lost" in caplog.text


def test_closing_a_log_whose_file_takes_no_more_ends(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(access_log, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(access_log, "_MAX_WAITING", 4)
    path = tmp_path / "access.log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which doesn't read
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 1024):
            pass
    os.close(writer)
    log = AccessLog(AccessLogConfig(path=path))
    for _ in range(6):
        log(record())
    log.close()
    assert re.search(r"access log: [56] lines were lost", caplog.text)  # 5 if it was fast to take the first
    assert log._thread.is_alive()
    os.close(reader)  # which ends the thread


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path):
    """A disk takes the begin of a line, has no room for the rest, and then has room again."""
    path = tmp_path / "access.log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = AccessLog(AccessLogConfig(path=path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        log(record(id="cut"))
        deadline = time.monotonic() + 30
        while not log._num_lost and time.monotonic() < deadline:
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log(record(id="after"))
    log.close()
    cut, lost, after = path.read_text().splitlines()
    assert (cut, json.loads(lost)) == (line_of(record(id="cut"))[:10], {"dropped_lines": 1})
    assert json.loads(after)["id"] == "after"


def test_a_log_on_the_standard_output(capfd):
    log = AccessLog(AccessLogConfig(path=Path("-")))
    log(record(id="out"))
    log.close()
    assert json.loads(capfd.readouterr().out)["id"] == "out"


def test_a_line_is_json_with_times_in_milliseconds():
    assert json.loads(line_of(record())) == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "model": "feed",
        "version": "3",
        "id": "a",
        "candidates": 5,
        "transport": "grpc",
        "status": "OK",
        "ms": 10.0,
        "wait_ms": 0.0,
        "decode_ms": 1.0,
        "queue_ms": 2.0,
        "gather_ms": 3.0,
        "execute_ms": 3.5,
    }


def test_a_log_that_can_not_be_written_and_shares_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"access log .*nowhere.*: No such file"):
        AccessLog(AccessLogConfig(path=tmp_path / "nowhere" / "access.log"))
    with pytest.raises(ConfigError, match=r"access_log: share must be in \[0, 1\]; was 2"):
        AccessLogConfig(share=2)
    with pytest.raises(ConfigError, match=r"tracing: share must be in \[0, 1\]; was -1"):
        TracingConfig(share=-1)


def test_a_request_is_a_span_of_the_callers_trace_with_its_stages_below(ask, wire):
    exporter = InMemorySpanExporter()
    tracer = Tracer(TracingConfig(share=0.0), exporter=exporter)
    send, _ = ask(tracer)
    assert send(valid(wire)) is grpc.StatusCode.OK  # nobody's trace: by the share, none
    assert send(valid(wire), [("traceparent", f"00-{TRACE}-{SPAN}-01")]) is grpc.StatusCode.OK
    broken = wire.raw(age=("FP32", [1], b""))
    assert send(broken, [("traceparent", f"00-{TRACE}-{SPAN}-01")]) is grpc.StatusCode.INVALID_ARGUMENT
    tracer.close()
    spans = exporter.get_finished_spans()
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}
    roots = [span for span in spans if span.name == "ModelInfer"]
    assert [format(span.parent.span_id, "016x") for span in roots] == [SPAN, SPAN]
    assert [span.attributes["rpc.grpc.status"] for span in roots] == ["OK", "INVALID_ARGUMENT"]
    assert roots[0].attributes["xlarank.candidates"] == 3
    assert not roots[1].status.is_ok
    stages = [span for span in spans if span.name != "ModelInfer"]
    assert [span.name for span in stages] == ["wait", "decode", "queue", "gather", "execute", "respond"]
    assert all(span.parent.span_id == roots[0].context.span_id for span in stages)
    assert stages[0].start_time == roots[0].start_time
    assert all(a.end_time == b.start_time for a, b in itertools.pairwise(stages))
    assert stages[-1].end_time == roots[0].end_time


def test_spans_of_http_requests_say_so():
    exporter = InMemorySpanExporter()
    tracer = Tracer(TracingConfig(share=1.0), exporter=exporter)
    tracer(record(transport="http", decode_seconds=None, timings=None))
    tracer.close()
    (span,) = exporter.get_finished_spans()
    assert (span.attributes["xlarank.transport"], span.attributes["xlarank.status"]) == ("http", "OK")
    assert "rpc.system" not in span.attributes


def test_stages_last_as_long_as_they_did():
    exporter = InMemorySpanExporter()
    tracer = Tracer(TracingConfig(share=1.0), exporter=exporter)
    tracer(record())
    tracer.close()
    milliseconds = {s.name: (s.end_time - s.start_time) / 1e6 for s in exporter.get_finished_spans()}
    expected = {
        "ModelInfer": 10,
        "wait": 0,
        "decode": 1,
        "queue": 2,
        "gather": 3,
        "execute": 3.5,
        "respond": 0.5,
    }
    assert milliseconds == pytest.approx(expected, abs=1e-2)


def test_a_request_that_dies_in_the_queue_was_there_to_its_end():
    exporter = InMemorySpanExporter()
    tracer = Tracer(TracingConfig(share=1.0), exporter=exporter)
    tracer(record(status="DEADLINE_EXCEEDED", message="late", timings=None))
    tracer.close()
    milliseconds = {s.name: (s.end_time - s.start_time) / 1e6 for s in exporter.get_finished_spans()}
    expected = {"ModelInfer": 10, "wait": 0, "decode": 1, "queue": 9}
    assert milliseconds == pytest.approx(expected, abs=1e-2)


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(caplog, monkeypatch):
    monkeypatch.setattr(tracing, "_CLOSE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracer = Tracer(TracingConfig(endpoint=endpoint, share=1.0))
        tracer(record())
        tracer.close()
    assert "the collector didn't take the last spans in time; they are lost" in caplog.text


def test_the_tracer_which_may_take_longest_is_closed_last(tmp_path):
    config = ServeConfig(
        access_log=AccessLogConfig(path=tmp_path / "access.log"),
        tracing=TracingConfig(endpoint="http://127.0.0.1:9"),
    )
    with contextlib.ExitStack() as stack:
        observers = [stack.enter_context(contextlib.closing(each)) for each in serve_start._observers(config)]
    assert [type(each) for each in observers] == [Tracer, AccessLog]
