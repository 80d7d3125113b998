"""HTTP connections that ask for nothing, against a real uvicorn."""

import asyncio
import contextlib
import socket
import ssl
import threading

import pytest
import trustme
import uvicorn
from xlarank_serving import http_connections
from xlarank_serving.http_connections import BoundedServer, bounded_connections
from xlarank_serving.unread import UnreadAnswers

LONG = 60.0  # seconds; a test would fail for its own timeout first
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def serve():
    """Starts servers of an ASGI app; gives a function that connects to one."""
    with contextlib.ExitStack() as stack:

        def start(
            app,
            *,
            max_connections=100,
            idle_seconds=LONG,
            max_header_seconds=LONG,
            max_discarded_bytes=2**20,
            max_handshake_seconds=LONG,
            tls=None,
            unread=None,
        ):
            bounded = bounded_connections(
                max_connections=max_connections,
                idle_seconds=idle_seconds,
                max_header_seconds=max_header_seconds,
                max_discarded_bytes=max_discarded_bytes,
                when_full=full,
                unread=UnreadAnswers() if unread is None else unread,
            )
            options = uvicorn.Config(
                app,
                http=bounded,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                timeout_keep_alive=int(LONG),
                timeout_graceful_shutdown=1,
            )
            options.load()
            options.ssl = tls
            server = BoundedServer(options, max_handshake_seconds=max_handshake_seconds)
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)

            def connect():
                return stack.enter_context(socket.create_connection(listening.getsockname(), timeout=20))

            connect.server = server
            return connect

        yield start


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def full(scope, receive, send):
    await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"full"})


def ask(connection):
    """Sends a request and reads the whole answer, of which it gives the status."""
    connection.sendall(REQUEST)
    return status_of(connection)


def status_of(connection):
    answer = b""
    while not answer.endswith((b"hello", b"full")):
        part = connection.recv(4096)
        assert part, answer
        answer += part
    return int(answer.split()[1])


def is_closed(connection):
    """Waits for the end."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(2**20):
            pass
    return True


def test_a_client_that_never_speaks_is_left(serve):
    connect = serve(hello, idle_seconds=0.1)
    assert is_closed(connect())


@pytest.mark.parametrize("before", [(), (REQUEST,)], ids=["first", "second"])
def test_a_header_that_never_ends_is_given_up_however_it_trickles(serve, before):
    connect = serve(hello, max_header_seconds=0.3)
    connection = connect()
    for _ in before:
        assert ask(connection) == 200
    connection.settimeout(0.02)  # the pace of the trickle
    connection.sendall(REQUEST[:-2])
    closed = False
    for _ in range(1000):
        try:
            connection.sendall(b"X: y\r\n")
            closed = not connection.recv(1)
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            closed = True
        if closed:
            break
    assert closed


def test_a_connection_is_kept_for_the_next_request_and_then_left(serve):
    connect = serve(hello, idle_seconds=0.5)
    connection = connect()
    assert [ask(connection) for _ in range(3)] == [200] * 3
    assert is_closed(connection)


def test_requests_sent_ahead_are_all_answered(serve):
    connection = serve(hello)()
    connection.sendall(3 * REQUEST)
    answer = b""
    while answer.count(b"hello") < 3:
        part = connection.recv(4096)
        assert part
        answer += part


def test_at_the_limit_the_longest_idle_one_makes_room(serve):
    connect = serve(hello, max_connections=3)
    first, second, half = connect(), connect(), connect()
    assert [ask(first), ask(second)] == [200, 200]
    half.sendall(REQUEST[:20])
    assert ask(first) == 200  # second is the longest idle now, after half
    assert ask(connect()) == 200
    assert is_closed(half)
    assert ask(connect()) == 200
    assert is_closed(second)
    assert ask(first) == 200


def test_silent_connections_do_not_shut_the_port(serve):
    connect = serve(hello, max_connections=4)
    silent = [connect() for _ in range(20)]
    assert ask(connect()) == 200
    assert all(map(is_closed, silent[:16]))


def test_while_all_have_a_request_one_more_is_refused(serve):
    arrived, go_on = threading.Semaphore(0), threading.Event()

    async def slow(scope, receive, send):
        arrived.release()
        await asyncio.get_running_loop().run_in_executor(None, go_on.wait, 20)
        await hello(scope, receive, send)

    connect = serve(slow, max_connections=2)
    busy = [connect(), connect()]
    for connection in busy:
        connection.sendall(REQUEST)
        assert arrived.acquire(timeout=20)
    refused = connect()
    assert ask(refused) == 429
    go_on.set()
    assert [status_of(connection) for connection in busy] == [200, 200]
    refused.close()
    while ask(busy[0]) != 200:  # until the server has noticed
        pass


def test_a_client_that_does_not_read_its_answer_is_left(serve):
    async def flood(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            sent.append(1)
        ended.set()

    sent, ended = [], threading.Event()
    connect = serve(flood, idle_seconds=0.2)
    connection = connect()
    connection.sendall(REQUEST)
    assert ended.wait(20)  # what a client that is gone would get is thrown away
    assert is_closed(connection)


@pytest.fixture
def big():
    """An app whose answers no socket holds; tells when one is made."""

    class Big:
        num_bytes = 32 * 2**20

        def __init__(self):
            self.made = threading.Semaphore(0)

        async def __call__(self, scope, receive, send):
            size = (b"content-length", b"%d" % self.num_bytes)
            await send({"type": "http.response.start", "status": 200, "headers": [size]})
            await send({"type": "http.response.body", "body": bytes(self.num_bytes)})
            self.made.release()

        def ask(self, connection):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            connection.sendall(REQUEST)
            assert self.made.acquire(timeout=20)

        def read(self, connection, pause=lambda: None):
            """How much of an answer's body comes."""
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            count = 0
            with contextlib.suppress(ConnectionResetError):
                while count < self.num_bytes and (part := connection.recv(2**20)):
                    count += len(part)
                    if count // 2**20 != (count - len(part)) // 2**20:
                        pause()
            return count

    return Big()


def test_a_client_that_reads_slowly_gets_its_whole_answer(serve, big):
    connection = serve(big, idle_seconds=0.6)()
    big.ask(connection)
    pace = threading.Event()  # never set: 32 MiB take several times `idle_seconds`
    assert big.read(connection, lambda: pace.wait(0.1)) == big.num_bytes


def test_past_the_bound_of_unread_answers_the_longest_unread_is_left(serve, big):
    unread = UnreadAnswers(max_bytes=70 * 2**20)
    connect = serve(big, unread=unread)
    connections = [connect() for _ in range(3)]
    for connection in connections:
        big.ask(connection)
    assert unread.num_bytes <= 70 * 2**20
    assert [big.read(each) == big.num_bytes for each in connections] == [False, True, True]
    for connection in connections[1:]:
        big.ask(connection)  # so what came before is over
        assert big.read(connection) == big.num_bytes


def test_answers_of_others_push_out_a_connection_too(serve, big):
    class Call:
        def cancel(self):
            raise AssertionError

    unread, call = UnreadAnswers(max_bytes=70 * 2**20), Call()
    connection = serve(big, unread=unread)()
    big.ask(connection)
    unread.hold(call, call, 60 * 2**20)  # on another thread than the loop's
    assert big.read(connection) < big.num_bytes
    unread.release(call)
    assert unread.num_bytes == 0


@pytest.fixture(scope="module")
def contexts():
    """TLS of a server, and of a client that trusts it."""
    authority = trustme.CA()
    tls, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.configure_trust(trusting)
    return tls, trusting


def test_a_client_that_never_shakes_hands_is_left_and_one_that_does_is_answered(serve, contexts):
    tls, trusting = contexts
    connect = serve(hello, max_handshake_seconds=1.0, tls=tls)
    with trusting.wrap_socket(connect(), server_hostname="127.0.0.1") as connection:
        assert is_closed(connect())
        assert ask(connection) == 200


@pytest.fixture
def slow():
    """An app that answers once it may; tells of requests that come and of clients that leave."""

    class Slow:
        def __init__(self):
            self.arrived, self.left, self.go_on = threading.Semaphore(0), threading.Event(), asyncio.Event()

        async def __call__(self, scope, receive, send):
            self.loop = asyncio.get_running_loop()
            while (await receive()).get("more_body"):
                pass
            self.arrived.release()
            leaving, answering = asyncio.ensure_future(receive()), asyncio.ensure_future(self.go_on.wait())
            done, rest = await asyncio.wait([leaving, answering], return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            if leaving in done:
                self.left.set()
            await hello(scope, receive, send)

        def answer(self):
            self.loop.call_soon_threadsafe(self.go_on.set)

    return Slow()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize("count", [1, 3])
def test_who_sends_no_more_is_answered_and_then_left(serve, slow, count):
    connection = serve(slow)()
    connection.sendall(count * REQUEST)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(len(CONTINUE)) == CONTINUE  # so the server knows of it
    slow.answer()
    answer = b""
    while part := connection.recv(4096):
        answer += part
    assert (answer.count(b"HTTP/1.1 200 "), answer.count(b"hello")) == (count, count)
    assert not slow.left.is_set()


def test_an_older_client_that_sends_no_more_is_told_nothing_but_the_answer(serve, slow):
    connection = serve(slow)()
    connection.sendall(REQUEST.replace(b"1.1", b"1.0"))
    connection.shutdown(socket.SHUT_WR)
    assert slow.arrived.acquire(timeout=20)
    slow.answer()
    assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_who_leaves_is_noticed_before_the_answer(serve, slow):
    connection = serve(slow)()
    connection.sendall(REQUEST)
    assert slow.arrived.acquire(timeout=20)
    connection.close()
    assert slow.left.wait(20)


PART = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"


@pytest.mark.parametrize("sent", [b"", REQUEST[:20], PART], ids=["nothing", "header", "body"])
def test_who_sends_no_more_in_the_middle_of_a_request_is_left_at_once(serve, slow, sent):
    connection = serve(slow)()
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(4096) == b""


def test_a_request_sent_ahead_by_half_is_left_behind_the_answer(serve, slow):
    connection = serve(slow)()
    connection.sendall(REQUEST + PART)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(len(CONTINUE)) == CONTINUE
    slow.answer()
    assert status_of(connection) == 200
    assert connection.recv(4096) == b""


def send(connection, part, count):
    for _ in range(count):
        connection.sendall(part)


LAST = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_a_last_answer_before_the_body_is_not_lost_to_a_reset(serve, contexts, is_tls):
    tls, trusting = contexts
    connection = serve(hello, tls=tls if is_tls else None)()
    if is_tls:
        connection = trusting.wrap_socket(connection, server_hostname="127.0.0.1")
    with connection:
        part = bytes(2**14)
        connection.sendall(LAST % (2**20) + part)
        assert status_of(connection) == 200
        if not is_tls:
            assert connection.recv(1) == b""  # it closed its side, and reads all the same:
        send(connection, part, 2**20 // len(part) - 1)


def test_a_last_answer_is_not_lost_to_requests_sent_ahead(serve, slow):
    connection = serve(slow)()
    connection.sendall(LAST % 0 + REQUEST)
    assert slow.arrived.acquire(timeout=20)
    slow.answer()
    assert status_of(connection) == 200
    assert connection.recv(1) == b""
    send(connection, REQUEST, 100)


def test_who_sends_more_than_is_read_on_behind_a_last_answer_is_reset(serve):
    connection = serve(hello, max_discarded_bytes=2**16)()
    connection.sendall(LAST % (2**30))
    assert status_of(connection) == 200
    with pytest.raises(ConnectionError):
        send(connection, bytes(2**16), 2**14)


def test_a_connection_is_closed_at_once_behind_a_last_answer_to_a_whole_request(serve):
    connection = serve(hello, idle_seconds=LONG)()
    connection.sendall(LAST % 4 + b"body")
    assert status_of(connection) == 200
    assert connection.recv(1) == b""
    with pytest.raises(ConnectionError):
        send(connection, b"x", 1000)  # nobody reads on


def end_now(connect, meanwhile):
    """Ends the connections as a server does at its end, in one turn of its event loop with a function."""
    done = threading.Event()

    def end():
        meanwhile()
        connect.server.end_connections()
        for each in list(connect.server.server_state.connections):
            each.shutdown()
        done.set()

    connect.server.loop.call_soon_threadsafe(end)
    assert done.wait(20)


@pytest.fixture
def ending(serve):
    """A server that `end_now` can end."""

    async def app(scope, receive, send):
        connect.server.loop = asyncio.get_running_loop()
        await hello(scope, receive, send)

    connect = serve(app)
    with connect() as connection:
        assert ask(connection) == 200
    return connect


def test_an_idle_connection_is_closed_in_order_at_the_end(ending):
    connection = ending()
    assert ask(connection) == 200
    end_now(ending, lambda: None)
    assert connection.recv(1) == b""


def test_a_request_that_arrives_just_as_the_server_ends_is_answered(ending):
    connection = ending()
    assert ask(connection) == 200
    end_now(ending, lambda: connection.sendall(REQUEST))
    assert status_of(connection) == 200
    assert connection.recv(1) == b""


def test_who_has_just_connected_as_the_server_ends_is_answered(ending, monkeypatch):
    monkeypatch.setattr(http_connections, "_FIRST_REQUEST_SECONDS", LONG)
    kept, connection = ending(), ending()
    assert ask(kept) == 200  # so the other one was accepted, too: it is next in the queue
    assert ask(kept) == 200
    end_now(ending, lambda: None)
    assert kept.recv(1) == b""
    assert ask(connection) == 200
    assert connection.recv(1) == b""


def test_who_has_just_connected_and_asks_for_nothing_is_left_at_the_end(ending, monkeypatch):
    monkeypatch.setattr(http_connections, "_FIRST_REQUEST_SECONDS", 0.1)
    connection = ending()
    assert ask(ending()) == 200
    end_now(ending, lambda: None)
    assert connection.recv(1) == b""
