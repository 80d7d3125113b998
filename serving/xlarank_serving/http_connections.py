"""How long HTTP connections may stay, and how they end: `bounded_connections`, `BoundedServer`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http
import json
import select
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from xlarank_serving.unread import UnreadAnswers

__all__ = ["BoundedServer", "bounded_connections"]

_LAST = (b"connection", b"close")

_MAX_ERROR_CHARS = 256
"""Of what is told about malformed HTTP: it may quote all of it."""

_PROBE_SECONDS = 0.1
"""Between signs of life to a client that sends no more: the second to one that has left can't be sent."""

_DISCARD_SECONDS = 2.0
"""How long a connection is read on behind its last answer, if that was given before all had come: closed with
bytes unread, TCP resets a connection, and its client loses the answer."""

_FIRST_REQUEST_SECONDS = 0.3
"""How long after its begin a connection is kept for its first request though the server ends."""

_ACCEPT_SECONDS = 0.01
"""For the event loop to make connections of what the kernel has accepted."""

_LAST_SECONDS = 0.1
"""How long a client has yet to read that its request was given up by the server's end."""


def bounded_connections(
    *,
    max_connections: int,
    idle_seconds: float,
    max_header_seconds: float,
    max_discarded_bytes: int,
    when_full: Callable[..., Awaitable[None]],
    unread: UnreadAnswers,
) -> type[H11Protocol]:
    """A uvicorn protocol that closes connections without a request under way.

    uvicorn itself begins to count a connection's idle time with its first answer, and starts anew with every
    byte: who never sends a whole header would stay for ever. And at its limit it refuses requests, so that
    silent connections would shut the port.

    Args:
      max_connections: one more closes the one that has been without a request longest. If all others have
        one it stays, and its request is refused.
      idle_seconds: from the connection's begin, or its last answer, to a request's first byte. A client that
        reads nothing of its answer for so long is left, too.
      max_header_seconds: from there to the end of the header; for the rest of a body that was refused, too.
      max_discarded_bytes: most that is read on behind a last answer; the connection is reset beyond.
      when_full: the ASGI app that refuses it.
      unread: counts what clients haven't read; a connection is a call of its own there.

    Returns:
      The class, for one server: its connections share a list of those that are idle.
    """
    idle: dict[Connection, None] = {}  # the longest first; used by the event loop's thread alone

    class Connection(H11Protocol):
        server_state: _ServerState
        _timer: asyncio.TimerHandle | None = None  # beside uvicorn's own, which bytes reset
        _is_receiving = False  # bytes came since it was last idle, and no whole header yet
        _is_half_closed = False  # its client sends no more, and awaits answers; moves one way
        _is_over = False  # it has had its last answer: what comes yet is discarded; moves one way
        _num_discarded = 0
        _num_unread = 0  # bytes, when the timer was set

        def connection_made(self, transport: Any) -> None:
            own: Any = _Closing(transport, self._close)
            super().connection_made(own)
            self.conn = _Messages(self.server_state)
            self._made_at = self.loop.time()
            self._wait(idle_seconds)
            idle[self] = None
            if len(self.connections) > max_connections and (longest := next(iter(idle))) is not self:
                del idle[longest]
                longest.transport.abort()  # not in order, which its peer could draw out
                self.connections.discard(longest)  # now, or this one's request might be refused yet

        def data_received(self, data: bytes) -> None:
            if self._is_over:
                self._num_discarded += len(data)
                if self._num_discarded > max_discarded_bytes:
                    self.transport.abort()
                return
            self.app = when_full if self._is_full else self.config.loaded_app
            super().data_received(data)
            if self._is_over:
                return
            if self._has_request:
                self._settle()
                idle.pop(self, None)
            elif not self._is_receiving:
                self._is_receiving = True
                self._wait(max_header_seconds)

        def eof_received(self) -> bool:
            """Whether to keep a connection whose client sends no more: for who has sent a whole request."""
            # asyncio's TLS has no half-closed connections.
            if not self._has_request or self.cycle.more_body or self.scheme == "https":
                return False
            self._is_half_closed = True
            self._wait(_PROBE_SECONDS, self._probe)
            return True

        def on_response_complete(self) -> None:
            if self._is_over:
                return
            self._settle()
            super().on_response_complete()
            if self.transport.is_closing() or self._is_over:
                return
            if self._is_half_closed and not self.eof_received():  # else it had sent one more ahead
                self.transport.close()
            elif not self._has_request:
                idle[self] = None
                self._wait(idle_seconds)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(idle_seconds)
            unread.hold(self, self, self._num_unread)

        def resume_writing(self) -> None:
            super().resume_writing()
            unread.release(self)
            if self._has_request:
                self._settle()

        def cancel(self) -> None:
            """Ends it, as it is. Any thread."""
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so is this
                self.loop.call_soon_threadsafe(self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._is_over = True
            self._settle()
            unread.release(self)
            idle.pop(self, None)
            super().connection_lost(exc)

        def shutdown(self) -> None:
            """Ends it now, unless something else will: its answer, its time or `_discard`."""
            if self.transport.is_closing():  # it may have no socket any more
                return
            if not self._has_request:
                if self._is_receiving or self._is_over or self._has_arrived():
                    return
                left = self._made_at + _FIRST_REQUEST_SECONDS - self.loop.time()
                if self.cycle is None and left > 0:
                    self._wait(left)
                    return
            super().shutdown()

        def send_400_response(self, msg: str) -> None:
            """Called where h11's error is handled, which says more than `msg`."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else it has had an answer
                self._send_error(sys.exception() or msg)
            self._discard()

        def _close(self, transport: asyncio.Transport) -> None:
            """Closes it, at once if nothing is left to read."""
            is_ahead = self.conn.their_state is not h11.IDLE and self.conn.trailing_data[0]
            if self._is_over or not (is_ahead or self.conn.their_state is h11.SEND_BODY):
                transport.close()
            else:
                self._discard()

        def _discard(self) -> None:
            """Ends a connection when its client does, or when that takes long or much."""
            if self._has_request:  # as if it had left: its answer is this one
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._is_over = True
            if self._is_half_closed:  # nothing comes
                self.transport.close()
                return
            if self.transport.can_write_eof():  # not over TLS
                self.transport.write_eof()
            self.flow.resume_reading()
            self._settle()
            idle[self] = None
            self._wait(_DISCARD_SECONDS)

        def _send_error(self, error: BaseException | str) -> None:
            status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
            text = f"expected an HTTP request, got: {str(error)[:_MAX_ERROR_CHARS]}"
            body = json.dumps({"error": text}).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), _LAST]
            reason = http.HTTPStatus(status).phrase
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")

        def _has_arrived(self) -> bool:
            """Whether something has come that the event loop hasn't read yet: to close now would reset it."""
            poll = select.poll()  # select() takes no file from the 1024th on
            poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
            return bool(poll.poll(0))

        @property
        def _is_full(self) -> bool:
            # A task may outlive its connection.
            return max(len(self.connections), len(self.tasks)) > max_connections

        @property
        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete and not self._is_over

        def _wait(self, seconds: float, then: Callable[[], None] | None = None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, then or self._give_up)
            self._num_unread = self.transport.get_write_buffer_size()

        def _settle(self) -> None:
            self._is_receiving = False
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _probe(self) -> None:
            """Finds out whether a client sends no more or has left: TCP tells only who writes to it."""
            if not self.cycle.response_started and self.conn.their_http_version != b"1.0":  # it knows no 1xx
                sign = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                self.transport.write(self.conn.send(sign))
                self._wait(_PROBE_SECONDS, self._probe)

        def _give_up(self) -> None:
            num_unread = self.transport.get_write_buffer_size()
            if 0 < num_unread < self._num_unread:  # it reads, slowly
                self._wait(idle_seconds)
            elif num_unread:
                self.transport.abort()  # who doesn't read would never let it be closed in order
            else:
                self.transport.close()

    return Connection


class _Closing:
    """A transport that is closed another way: uvicorn closes it in many places, mostly behind an answer."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[asyncio.Transport], None]) -> None:
        self._transport = transport
        self._close = close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._close(self._transport)


class _ServerState(ServerState):
    """What a server shares with its connections."""

    is_ending = False  # set by any thread, moves one way: each answer is its connection's last


class _Messages(h11.Connection):
    """Refuses requests that end in two ways: whoever passes such a one on may see another end, and so another
    request. Says with an answer that it is the last."""

    def __init__(self, server_state: _ServerState) -> None:
        super().__init__(h11.SERVER)
        self._server_state = server_state

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:  # RFC 9112, section 6.1
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        return event

    def send(self, event: Any) -> Any:
        if self._server_state.is_ending and isinstance(event, h11.Response) and _LAST not in event.headers:
            event = dataclasses.replace(event, headers=[*event.headers, _LAST])
        return super().send(event)


class BoundedServer(uvicorn.Server):
    """A uvicorn server that gives up connections whose TLS handshake doesn't end, and may leave its port.

    Before the handshake a connection has no protocol of uvicorn's yet, so that `bounded_connections` can't
    count it, and asyncio itself lets it stay for a minute.

    Attributes:
      is_leaving: set, by any thread, to have it listen no more and answer each connection once more.
    """

    def __init__(self, config: uvicorn.Config, *, max_handshake_seconds: float) -> None:
        """
        Args:
          config: loaded; with or without TLS.
          max_handshake_seconds: from a connection's begin to the end of its handshake.
        """
        super().__init__(config)
        self.server_state: _ServerState = _ServerState()
        self._max_handshake_seconds = max_handshake_seconds
        self.is_leaving = False  # moves one way

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens. uvicorn has no option for the time, so its event loop, which is its own, passes it on."""
        if self.config.ssl is not None:
            loop = asyncio.get_running_loop()
            bounded = functools.partial(loop.create_server, ssl_handshake_timeout=self._max_handshake_seconds)
            vars(loop)["create_server"] = bounded
        await super().startup(sockets)

    def end_connections(self) -> None:
        """From now on each answer says that it is its connection's last. Any thread."""
        self.server_state.is_ending = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        is_end = await super().on_tick(counter)
        if self.is_leaving:
            # A timer's turn: what was accepted has become a connection, which a closed server would refuse.
            for server in self.servers:
                server.close()
            self.end_connections()
        return is_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends connections as they are answered, those without a request at once, and in the end all."""
        self.end_connections()
        await asyncio.sleep(_ACCEPT_SECONDS)
        await super().shutdown(sockets)
        if self.server_state.connections:  # their requests were cancelled, or they are read on
            await asyncio.sleep(_LAST_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(0)  # a turn of the event loop, which closes them
