"""What the HTTP port refuses: too much, too late, and those who may not ask."""

import contextlib
import http.client
import json
import select
import socket
import threading
import time

import pytest
import tritonclient.http as triton
from over_http import Over, as_json
from xlarank_serving.config import HttpConfig, SecurityConfig
from xlarank_serving.server import RankingServer, ServerConfig

from xlarank.errors import ConfigError, OverloadError


def test_a_body_that_is_too_large_is_refused_before_it_is_read(own):
    over = own(max_body_mib=1)
    status, answer = over.infer(bytes(2**20 + 1))
    assert (status, answer["error"]) == (413, "expected a body of at most 1048576 bytes, got more")
    chunks = (bytes(2**16) for _ in range(20))  # of no declared length
    connection = http.client.HTTPConnection(over.address, timeout=20)
    connection.request("POST", "/v2/models/feed/infer", chunks, encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()
    assert over.num_refused() == {"RESOURCE_EXHAUSTED": 2}


def test_silent_connections_do_not_shut_the_port(own, wire):
    over = own(max_connections=2)
    host, port = over.address.split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
        assert over.infer(as_json(wire))[0] == 200


def test_bodies_have_a_common_bound_and_give_their_share_back(own, wire):
    over = own(max_body_mib=1)
    host, port = over.address.split(":")
    head = b"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
    with contextlib.ExitStack() as stack:
        # One that is stalled is refused as soon as all of them together have sent more than 16 MiB.
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(17)
        ]
        for connection in connections:
            connection.sendall(head + bytes(2**20 - 1))
        (refused, *_), _, _ = select.select(connections, [], [], 20)
        answer = b""
        while not answer.endswith(b"}"):
            answer += refused.recv(4096)
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1\r\n" in answer
        assert b"retry-after-ms: 1000\r\n" in answer
        assert b"the server holds 16777216 bytes of requests, its limit; try again" in answer
        assert over.num_refused() == {"RESOURCE_EXHAUSTED": 1}
        connections.remove(refused)
        connections[0].close()
        statuses = (over.infer(as_json(wire))[0] for _ in range(1000))  # until the server has noticed
        assert next(status for status in statuses if status != 429) == 200


def test_a_body_that_does_not_come_is_given_up(own):
    over = own(max_receive_seconds=0.2)
    host, port = over.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as half:
        half.sendall(b"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert half.recv(4096).startswith(b"HTTP/1.1 408")
    assert over.num_refused() == {"CANCELLED": 1}


def test_a_compressed_body_is_refused(own, wire):
    over = own()
    status, answer = over.infer(b"x", **{"Content-Encoding": "gzip"})
    assert (status, answer["error"]) == (415, "expected a body without Content-Encoding, got 'gzip'")
    assert over.infer(as_json(wire), **{"Content-Encoding": "Identity"})[0] == 200
    assert over.num_refused() == {"UNIMPLEMENTED": 1}


def test_json_is_bounded_before_it_is_parsed(over, wire):
    body = b'{"inputs": [' + b"[]," * 1_400_000 + b"[]]}"
    status, _, answer = over.call("POST", "/v2/models/feed/infer", body)
    assert status == 400
    text = f"expected at most 4 MiB of JSON, got {len(body)} bytes"
    assert json.loads(answer)["error"].startswith(text)


def test_a_caller_who_leaves_cancels_the_request(own, wire, caplog):
    over = own()
    over.engine.hold()
    host, port = over.address.split(":")
    body = json.dumps(as_json(wire)).encode()
    with socket.create_connection((host, int(port)), timeout=20) as leaving:
        head = f"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        leaving.sendall(head.encode() + body)
        assert over.engine.arrived.acquire(timeout=10)
    ((future, _),) = over.engine.held
    gone = threading.Event()
    future.add_done_callback(lambda _: gone.set())
    assert gone.wait(timeout=10)
    assert future.cancelled()
    over.engine.release()
    assert over.infer(as_json(wire))[0] == 200
    over.server.stop(0)
    assert "Exception in ASGI application" not in caplog.text


def test_who_may_not_call_is_refused(own, wire, tmp_path):
    (tmp_path / "tokens").write_text("a-token-of-enough-letters\n")
    over = own(security=SecurityConfig(tokens=tmp_path / "tokens"))
    assert over.call("GET", "/v2/health/ready")[0] == 200
    status, headers, answer = over.call("POST", "/v2/models/feed/infer", as_json(wire))
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert "token" in json.loads(answer)["error"]
    assert over.call("GET", "/v2/models/feed", headers={"Authorization": "Bearer bad"}.items())[0] == 401
    assert over.infer(as_json(wire), Authorization="Bearer a-token-of-enough-letters")[0] == 200
    assert over.num_refused() == {"UNAUTHENTICATED": 1}  # of the call that ranks


def test_models_are_loaded_and_unloaded_for_those_with_an_admin_token(own, tmp_path):
    (tmp_path / "tokens").write_text("a-token-of-enough-letters\n")
    over = own(security=SecurityConfig(admin_tokens=tmp_path / "tokens"), is_managed=True)
    token = {"Authorization": "Bearer a-token-of-enough-letters"}
    client = triton.InferenceServerClient(over.address)
    client.load_model("feed", headers=token)
    client.unload_model("feed", headers=token)
    assert over.repository.calls == [("load", "feed"), ("unload", "feed")]
    with pytest.raises(triton.InferenceServerException, match="no configuration and no file comes from"):
        client.load_model("feed", headers=token, config="{}")
    with pytest.raises(triton.InferenceServerException, match="expected a token"):
        client.load_model("feed")
    client.close()
    assert len(over.repository.calls) == 2
    body = {"parameters": ["config"]}
    assert over.call("POST", "/v2/repository/models/feed/load", body, token.items())[0] == 400


def test_what_waits_for_its_body_is_late_all_the_same(own, wire):
    over = own()
    body = json.dumps(as_json(wire) | {"parameters": {"timeout": 1_000}}).encode()
    host, port = over.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        head = f"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode())
        while not over.repository.overloads:  # its headers have come
            pass
        end = time.monotonic() + 2e-3
        while time.monotonic() < end:
            pass
        slow.sendall(body)
        assert slow.recv(4096).startswith(b"HTTP/1.1 504")
    assert over.engine.requests == []


def test_observers_hear_of_requests_over_http_and_of_those_that_are_malformed(own, wire):
    records = []
    over = own(observers=[records.append])
    assert over.infer(as_json(wire))[0] == 200
    assert over.infer(b"{")[0] == 400
    facts = [(one.transport, one.status, one.model) for one in records]
    assert facts == [("http", "OK", "feed"), ("http", "INVALID_ARGUMENT", "feed")]
    (family,) = over.server.refusals.collect()
    assert [(sample.labels["status"], sample.value) for sample in family.samples] == [("INVALID_ARGUMENT", 1)]


def test_under_overload_a_request_is_refused_unread(own):
    over = own()
    over.repository.refusal = OverloadError("the queue is full: why", 1.25)
    status, headers, answer = over.call("POST", "/v2/models/feed/infer", b"no message")
    assert (status, headers["retry-after"], headers["retry-after-ms"]) == (429, "2", "1250")
    assert json.loads(answer) == {"error": "the queue is full: why"}


def test_a_stop_answers_what_was_accepted_and_turns_the_rest_away(wire):
    over = Over(wire)
    over.engine.hold()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(over.infer(as_json(wire))))
    asking.start()
    assert over.engine.arrived.acquire(timeout=10)
    stopping = threading.Thread(target=over.server.stop, args=(20,))
    stopping.start()
    while over.call("GET", "/v2/health/ready")[0] == 200:
        pass
    assert over.infer(as_json(wire)) == (503, {"error": "the server is stopping"})
    over.engine.release()
    for thread in (asking, stopping):
        thread.join(timeout=20)
        assert not thread.is_alive()
    ((status, answer),) = answers
    assert (status, len(answer["outputs"])) == (200, 2)
    with pytest.raises(OSError):
        over.call("GET", "/v2/health/live")


def test_a_port_in_use_is_refused_and_nothing_stays_open(wire):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        repository = wire.repository()
        before = threading.active_count()
        with pytest.raises(ConfigError, match=f"rest port {port} on 127.0.0.1: expected a free port"):
            RankingServer(
                repository,
                repository.metrics.text,
                ServerConfig(port=0, http_port=0),
                http=HttpConfig(port=port),
            )
        assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 70000}, r"http: port must be in \[0, 65535\]; was 70000"),
        ({"max_body_mib": 0}, "http: max_body_mib must be >= 1; was 0"),
        ({"max_receive_seconds": 0}, "http: max_receive_seconds must be >= 0.1; was 0"),
    ],
)
def test_a_bad_config_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        HttpConfig(**options)
