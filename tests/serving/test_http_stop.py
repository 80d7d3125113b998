"""What clients that keep their HTTP connections see of a stop."""

import contextlib
import http.client
import json
import signal
import socket
import threading

import linear
import numpy as np
import pytest
import tritonclient.http as triton
from served import served_by, tensors_of
from xlarank_serving.config import HttpConfig
from xlarank_serving.http_messages import HEADER_LENGTH
from xlarank_serving.server import RankingServer, ServerConfig

LIVE = "/v2/health/live"
INFER = "/v2/models/feed/infer"


@pytest.fixture
def stopping(wire):
    """A server in its stop, which waits for one request; what is kept of connections was made before."""
    repository = wire.repository()
    engine = repository.add(wire.spec, 3)
    server = RankingServer(repository, None, ServerConfig(port=0), http=HttpConfig(port=0))

    class Stopping:
        def __init__(self, stack):
            self.asked, self.kept, self.idle = (self._connection(stack) for _ in range(3))
            self._thread = threading.Thread(target=server.stop, args=(60,))

        def _connection(self, stack):
            connection = http.client.HTTPConnection("127.0.0.1", server.rest.port, timeout=20)
            connection.request("GET", LIVE)
            assert answer_of(connection) == (200, None, b"")
            return stack.enter_context(contextlib.closing(connection))

        def begin(self):
            engine.hold()
            self.asked.request("POST", INFER, *binary(wire))
            assert engine.arrived.acquire(timeout=20)
            self._thread.start()
            while self.connect_and_ask("GET", "/v2/health/ready")[0] == 200:
                pass

        def connect_and_ask(self, *request):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.rest.port, 20)) as new:
                new.request(*request)
                return answer_of(new)

        def end(self):
            engine.release()
            self._thread.join(timeout=60)
            assert not self._thread.is_alive()

    with contextlib.ExitStack() as stack:
        stopping = Stopping(stack)
        try:
            stopping.begin()
            yield stopping
        finally:
            if engine.held is not None:
                stopping.end()


def binary(wire, n=3):
    """Body and headers of a request."""
    tensors = []
    for name, value in wire.valid(n).items():
        array = np.array(value, np.object_) if isinstance(value, list) else value
        datatype = triton.np_to_triton_dtype(array.dtype)
        tensors.append(triton.InferInput(name.replace("__", "."), array.shape, datatype))
        tensors[-1].set_data_from_numpy(array)
    body, length = triton.InferenceServerClient.generate_request_body(tensors)
    return body, {HEADER_LENGTH: str(length)}


def answer_of(connection):
    """Status, what is said of the connection, and the body."""
    with connection.getresponse() as response:
        return response.status, response.getheader("connection"), response.read()


REFUSAL = (503, "close", b'{"error":"the server is stopping"}')


def test_each_answer_of_a_stop_says_that_it_is_the_last(stopping, wire):
    for _ in range(2):  # the client opens a new connection, as it was told to
        stopping.kept.request("POST", INFER, *binary(wire))
        assert answer_of(stopping.kept) == REFUSAL
        assert stopping.kept.sock is None
    assert stopping.connect_and_ask("GET", LIVE) == (200, "close", b"")
    stopping.end()
    status, connection, _ = answer_of(stopping.asked)
    assert (status, connection) == (200, "close")
    assert stopping.idle.sock.recv(1) == b""


HEAD = b"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\n"


def test_a_refusal_before_the_body_has_come_is_not_lost_to_a_reset(stopping):
    part, count = bytes(2**16), 64
    stopping.kept.sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (count * len(part)) + part)
    assert answer_to_raw(stopping.kept.sock) == REFUSAL
    assert stopping.kept.sock.recv(1) == b""
    for _ in range(count - 1):
        stopping.kept.sock.sendall(part)


def test_who_sends_for_ever_behind_its_last_answer_does_not_hold_up_a_stop(stopping):
    stopping.kept.sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    assert answer_to_raw(stopping.kept.sock) == REFUSAL
    sending = threading.Thread(target=send_on, args=(stopping.kept.sock,))
    sending.start()
    stopping.end()
    sending.join(timeout=60)
    assert not sending.is_alive()


def answer_to_raw(connection):
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.getheader("connection"), response.read()


def send_on(connection):
    """Sends chunks of a body until that is refused."""
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(b"1\r\nx\r\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    linear.build(folder / "models")
    return folder


@contextlib.contextmanager
def started(folder, *options):
    """A server process, and where it answers."""
    models, cache = str(folder / "models"), str(folder / "cache")
    with served_by(models, "--compile-cache", cache, "--rest-port", "0", *options) as process:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1]
        yield process, json.loads(line)["rest"]


def stop(process):
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_who_sends_a_body_for_ever_does_not_hold_up_a_stop(folder):
    options = ("--rest-max-receive-seconds", "1000")
    with (
        started(folder, *options) as (process, address),
        socket.create_connection(pair(address)) as connection,
    ):
        connection.sendall(HEAD.replace(b"feed", b"linear") + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\n{\r\n")
        sending = threading.Thread(target=send_on, args=(connection,))
        sending.start()
        stop(process)
        sending.join(timeout=60)
        assert not sending.is_alive()


def pair(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


class Kept:
    """Asks over a connection that it keeps as long as it may, until nobody listens."""

    def __init__(self, address, request):
        self.statuses, self._request = [], request
        self._connection = http.client.HTTPConnection(address, timeout=60)
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        with contextlib.closing(self._connection), contextlib.suppress(ConnectionRefusedError):
            while True:
                self._request(self._connection)
                self.statuses.append(answer_of(self._connection)[0])


class KeptByTriton:
    """The same of the published client."""

    def __init__(self, address):
        self.statuses, self._address = [], address
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        with (
            triton.InferenceServerClient(self._address) as client,
            contextlib.suppress(ConnectionRefusedError),
        ):
            while True:
                try:
                    client.infer("linear", tensors_of(5, triton.InferInput))
                    self.statuses.append(200)
                except triton.InferenceServerException as error:
                    self.statuses.append(int(error.status()))


def test_nobody_who_keeps_a_connection_is_reset_by_a_stop(folder):
    body, length = triton.InferenceServerClient.generate_request_body(tensors_of(2000, triton.InferInput))
    headers = {HEADER_LENGTH: str(length), "Content-Length": str(len(body))}

    def live(connection):
        connection.request("GET", LIVE)

    def infer(connection):
        connection.request("POST", "/v2/models/linear/infer", body, headers)

    def infer_in_pieces(connection):
        pieces = (body[i : i + 4096] for i in range(0, len(body), 4096))
        connection.request("POST", "/v2/models/linear/infer", pieces, headers)

    with started(folder) as (process, address):
        clients = [
            Kept(address, request) for request in (live, infer, infer, infer_in_pieces, infer_in_pieces)
        ]
        clients.append(KeptByTriton(address))
        for client in clients:
            client.thread.start()
        while not all(client.statuses for client in clients):
            assert all(client.thread.is_alive() or client.statuses for client in clients)
        stop(process)
        for client in clients:
            client.thread.join(timeout=60)
            assert not client.thread.is_alive()
    assert {status for client in clients for status in client.statuses} <= {200, 503}
