"""`/metrics` over HTTP: `MetricsServer`."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable

from xlarank.errors import ConfigError

__all__ = ["MetricsServer"]

_POLL_SECONDS = 0.1
"""How often the listening thread looks whether it shall stop."""


class MetricsServer:
    """Answers GET /metrics on a thread of its own until closed.

    Prometheus's text format 0.0.4 whatever the scraper would take: OpenMetrics would rename Triton's
    counters. One scrape a thread; they never touch the threads that rank.
    """

    def __init__(self, text: Callable[[], bytes], *, host: str, port: int) -> None:
        """
        Args:
          text: writes the metrics; called once a scrape.
          host: address to listen on.
          port: 0 for a free one.

        Raises:
          ConfigError: if the port is in use or the address can't be had.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._server = _Server((host, port), _handler(text), family=family)
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
    ) -> None:
        self.address_family = family
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Skips HTTPServer's own, which asks DNS for the host's name and may hang.
        super(http.server.HTTPServer, self).server_bind()


def _handler(text: Callable[[], bytes]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client to say what it wants

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "expected /metrics")
                return
            body = text()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is no news."""

    return Handler
