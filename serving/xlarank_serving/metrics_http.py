"""`/metrics` over HTTP: `MetricsServer`."""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from xlarank.errors import AccessError, ConfigError
from xlarank_serving.tls import ServerTls

__all__ = ["MetricsServer"]

_log = logging.getLogger(__name__)

_MAX_SCRAPES = 16
"""At a time, each on a thread; one more takes the place of the one that has longest said nothing whole."""

_POLL_SECONDS = 0.1
"""How often the listening thread looks whether it shall stop."""


class MetricsServer:
    """Answers GET /metrics on a thread of its own until closed.

    Prometheus's text format 0.0.4 whatever the scraper would take: OpenMetrics would rename Triton's
    counters. One scrape a thread; they never touch the threads that rank.
    """

    def __init__(
        self,
        text: Callable[[], bytes],
        *,
        host: str,
        port: int,
        tls: ServerTls | None = None,
        check: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        """
        Args:
          text: writes the metrics; called once a scrape.
          host: address to listen on.
          port: 0 for a free one.
          tls: None for plain HTTP.
          check: told a scrape's authorization header, None for none; raises AccessError to refuse it.

        Raises:
          ConfigError: if the port is in use or the address can't be had.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._server = _Server((host, port), _handler(text, check), family=family, tls=tls)
        except OSError as error:
            raise ConfigError(
                f"http port {port} on {host}: expected a free port, got {error.strerror or error}"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="metrics-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening and waits for scrapes under way."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True  # a scraper that hangs must not hold up the stop
    allow_reuse_port = False  # else a second server would share the port silently

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[http.server.BaseHTTPRequestHandler],
        *,
        family: socket.AddressFamily,
        tls: ServerTls | None,
    ) -> None:
        self.address_family = family
        self._tls = None if tls is None else tls.http_context()
        self._lock = threading.Lock()
        # Scrapers on a thread, and of them those whose request is awaited, the longest first; both guarded by
        # _lock.
        self._open: set[socket.socket] = set()
        self._silent: dict[socket.socket, None] = {}
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake comes with the first read, on the scrape's own thread and within its time.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            has_room = len(self._open) < _MAX_SCRAPES or self._drop_longest_silent()
            if has_room:
                self._open.add(request)
                self._silent[request] = None
        if has_room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.discard(request)
                self._silent.pop(request, None)

    def is_asked(self, connection: socket.socket) -> bool:
        """Told that a whole request came; False if its connection was given up just now."""
        with self._lock:
            return self._silent.pop(connection, connection) is None

    def _drop_longest_silent(self) -> bool:
        """Ends a connection, which wakes its thread; False if all were asked. Under _lock."""
        longest = next(iter(self._silent), None)
        if longest is None:
            return False
        del self._silent[longest]
        self._open.discard(longest)  # its thread ends
        with contextlib.suppress(OSError):  # its peer was faster
            # Not the method of a TLS socket, which is no matter for two threads.
            socket.socket.shutdown(longest, socket.SHUT_RDWR)
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hangs up or fails a handshake did so by itself."""
        _log.debug("a scrape by %s failed", client_address, exc_info=True)

    def server_bind(self) -> None:
        # Skips HTTPServer's own, which asks DNS for the host's name and may hang.
        super(http.server.HTTPServer, self).server_bind()


def _handler(
    text: Callable[[], bytes], check: Callable[[str | None], None]
) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client to say what it wants, in one piece or the next
        server: _Server

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if not self.server.is_asked(self.connection):
                return
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "expected /metrics")
                return
            try:
                check(self.headers.get("Authorization"))
            except AccessError as error:
                self.send_response(http.HTTPStatus.UNAUTHORIZED)
                self.send_header("WWW-Authenticate", "Bearer")
                self._end(str(error).encode() + b"\n")
                return
            body = text()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self._end(body)

        def _end(self, body: bytes) -> None:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is no news."""

    return Handler
