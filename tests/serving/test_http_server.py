"""The HTTP server itself: who leaves a port to others, and what is no HTTP."""

import contextlib
import http.client
import json
import select
import socket
import threading

import pytest
from xlarank_serving import http_connections
from xlarank_serving.config import HttpConfig
from xlarank_serving.http_server import _turn_away
from xlarank_serving.server import RankingServer, ServerConfig

REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def serve(wire):
    """Starts one of many servers of an HTTP port."""
    with contextlib.ExitStack() as stack:

        def serve(port=0, **options):
            server = RankingServer(
                wire.repository(),
                None,
                ServerConfig(port=0),
                http=HttpConfig(port=port, **options),
                is_one_of_many=True,
            )
            stack.callback(server.stop, 0)
            return server

        yield serve


def connect(server):
    return socket.create_connection(("127.0.0.1", server.rest.port), timeout=20)


def last_answer(connection):
    """What comes until the server ends the connection."""
    answer = b""
    while part := connection.recv(4096):
        answer += part
    return answer


def is_alive(connection):
    """Asks over a connection that is kept; whether it will be kept on."""
    connection.request("GET", "/v2/health/live")
    with connection.getresponse() as response:
        assert response.status == 200
        response.read()
        return response.getheader("connection") != "close"


def test_who_is_connected_is_answered_once_more_when_a_server_leaves_its_port(serve):
    server, waits = serve(), []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            assert not all(is_alive(kept) for _ in range(10_000))
            silent.sendall(REQUEST)
            answers.append(last_answer(silent))
        return False

    answers = []
    kept = http.client.HTTPConnection("127.0.0.1", server.rest.port, timeout=20)
    with connect(server) as silent, contextlib.closing(kept):
        assert is_alive(kept)
        server.retire(wait)
    (answer,) = answers
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in answer
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_a_header_that_has_begun_to_come_is_answered_at_the_end(serve):
    server = serve()
    kept = http.client.HTTPConnection("127.0.0.1", server.rest.port, timeout=20)
    with connect(server) as half, contextlib.closing(kept):
        half.sendall(REQUEST[:20])
        assert is_alive(kept)
        stopping = threading.Thread(target=server.rest.stop, args=(20,))
        stopping.start()
        assert kept.sock.recv(1) == b""
        half.sendall(REQUEST[20:])
        answer = last_answer(half)
        stopping.join(timeout=20)
        assert not stopping.is_alive()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in answer


def listening_at(port=0):
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen()
    return listening


def test_who_connects_to_a_port_that_is_being_left_comes_to_another_server(serve):
    leaving = listening_at()
    port = leaving.getsockname()[1]
    with socket.socket() as before, socket.socket() as client:
        before.connect(("127.0.0.1", port))
        _turn_away(leaving)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect(("127.0.0.1", port))
        with listening_at(port) as other:
            accepted, _ = leaving.accept()
            leaving.close()
            with accepted:
                before.sendall(b"x")  # packets of connections are none of the filter's
                assert accepted.recv(1) == b"x"
            assert select.select([other], [], [], 20)[0]
            taken, address = other.accept()
            taken.close()
            assert address == client.getsockname()


def test_no_request_fails_while_servers_of_a_port_come_and_go(serve):
    port = serve().rest.port
    is_over, failures, num_answers = threading.Event(), [], []

    def ask(is_kept):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as own:
            while not is_over.is_set():
                try:
                    is_alive(own)
                    num_answers.append(1)
                except OSError as error:
                    failures.append(error)
                if not is_kept:
                    own.close()

    clients = [threading.Thread(target=ask, args=(is_kept,)) for is_kept in (False, False, True, True)]
    for client in clients:
        client.start()
    try:
        for _ in range(2):
            serve(port).retire(threading.Event().wait)
    finally:
        is_over.set()
        for client in clients:
            client.join()
    assert failures == []
    assert num_answers


GET = b"GET /v2 HTTP/1.1\r\n"
INFER = b"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\n"
BOTH = INFER + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"
CHUNKED = INFER + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        (GET + b"\r\n", 400, "Missing mandatory Host: header"),
        (INFER + b"Content-Length: -1\r\n\r\n", 400, "bad Content-Length"),
        (INFER + 2 * b"Host: x\r\n" + b"\r\n", 400, "Found multiple Host: headers"),
        (INFER + b"Transfer-Encoding: gzip\r\n\r\n", 501, "Only Transfer-Encoding: chunked is supported"),
        (CHUNKED + b"five\r\n", 400, r"illegal chunk header: bytearray(b'five\r\n')"),
        (GET + b"A: " + 65_536 * b"a", 431, "Receive buffer too long"),
        (GET + b"A: " + 200_000 * b"a", 431, "Receive buffer too long"),
        (BOTH + b"\r\n0\r\n\r\n" + REQUEST, 400, "both Content-Length and Transfer-Encoding"),
        (BOTH + b"Expect: 100-continue\r\n\r\n", 400, "both Content-Length and Transfer-Encoding"),
        (GET + 512 * b"?" + b"\r\n\r\n", 400, f"illegal header line: bytearray(b'{223 * '?'}"),
    ],
    ids=["host", "length", "hosts", "encoding", "chunk", "long", "longer", "both", "expect", "header"],
)
def test_what_is_no_http_is_told_in_json_and_not_logged(serve, caplog, sent, status, text):
    with connect(serve()) as connection:
        connection.sendall(sent)
        head, _, body = last_answer(connection).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode())
    assert b"content-type: application/json\r\n" in head
    assert json.loads(body) == {"error": f"expected an HTTP request, got: {text}"}
    assert caplog.records == []


def send_on(connection, part):
    """Sends until that is refused."""
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(part)


@pytest.mark.parametrize("sent", [b"?\r\n\r\n", CHUNKED + b"five\r\n"], ids=["header", "chunk"])
@pytest.mark.parametrize(("max_body_mib", "seconds"), [(1, 1e9), (2**20, 2.0)], ids=["bytes", "seconds"])
def test_who_sends_on_behind_what_is_no_http_is_read_and_then_left(
    serve, caplog, monkeypatch, sent, max_body_mib, seconds
):
    monkeypatch.setattr(http_connections, "_DISCARD_SECONDS", seconds)
    with connect(serve(max_body_mib=max_body_mib)) as connection:
        connection.sendall(sent)
        assert last_answer(connection).startswith(b"HTTP/1.1 400 ")
        send_on(connection, 64 * b"?")
    assert caplog.records == []


def test_what_is_no_http_behind_an_answer_ends_the_connection(serve, caplog):
    with connect(serve()) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 404 ")
        connection.sendall(b"five\r\n")
        assert b"HTTP" not in last_answer(connection)
    assert caplog.records == []
