"""The HTTP port beside gRPC's: `HttpServer`. It needs the extra `http`: starlette and uvicorn."""

from __future__ import annotations

import contextlib
import ctypes
import math
import socket
import ssl
import struct
import threading
from collections.abc import Callable

import uvicorn

from xlarank.errors import ConfigError, OverloadError
from xlarank_serving.config import HttpConfig
from xlarank_serving.http_app import Authorize, http_app, refusing
from xlarank_serving.http_connections import BoundedServer, bounded_connections
from xlarank_serving.repository_rpcs import ManagedRepository
from xlarank_serving.service import InferenceService, Repository
from xlarank_serving.threads import ServerThreads
from xlarank_serving.transport import address_of
from xlarank_serving.unread import UnreadAnswers

__all__ = ["HttpServer"]

_BACKLOG = 2048
_GRACE_SECONDS = 1
_MAX_HANDSHAKE_SECONDS = 10.0
_RETRY_SECONDS = 1.0

_HANDSHAKE_SECONDS = 0.3
"""How long a TCP handshake under way may take yet when a port is left to others."""

_LINGER_SECONDS = 1.0
"""How long a connection may then be without a request: one is on its way, perhaps."""

_SO_ATTACH_FILTER = 26

_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""Classic BPF, as (code, jump if true, jump if false, k): drops what has TCP's flag SYN, takes the rest."""

_MAX_BODIES = 16
"""How many of the largest bodies are held at a time: far more of the usual ones, and 1 GiB by default."""


class HttpServer:
    """Listens once constructed, until `stop`; one thread for all connections.

    Attributes:
      port: where.
    """

    def __init__(
        self,
        service: InferenceService,
        repository: Repository,
        threads: ServerThreads,
        config: HttpConfig,
        unread: UnreadAnswers,
        *,
        host: str = "127.0.0.1",
        authorize: Authorize | None = None,
        tls: ssl.SSLContext | None = None,
        manager: ManagedRepository | None = None,
        shares_port: bool = False,
    ) -> None:
        """
        Args:
          service: answers.
          repository: has the index.
          threads: that the answers are made on, gRPC's.
          config: its port, and how much it takes.
          unread: counts what clients haven't read, gRPC's too.
          host: address to listen on.
          authorize: who may call what, see `http_app`.
          tls: certificates; None for plain HTTP.
          manager: the repository once more if those whom `authorize` lets may load and unload models.
          shares_port: whether other processes listen on the port too.

        Raises:
          ConfigError: if the port is in use or the address can't be had.
        """
        max_body_bytes = config.max_body_mib << 20
        app = http_app(
            service,
            repository,
            threads,
            max_body_bytes=max_body_bytes,
            max_bodies_bytes=_MAX_BODIES * max_body_bytes,
            max_receive_seconds=config.max_receive_seconds,
            authorize=authorize,
            manager=manager,
            is_one_of_many=shares_port,
        )
        if config.port is None:
            raise ConfigError("http: expected a port, got none")
        self._host = host
        self._socket = _listen(host, config.port, shares_port)
        self.port: int = self._socket.getsockname()[1]
        options = uvicorn.Config(
            app,
            http=bounded_connections(
                max_connections=config.max_connections,
                idle_seconds=config.idle_seconds,
                max_header_seconds=config.max_receive_seconds,
                max_discarded_bytes=max_body_bytes,
                when_full=refusing(
                    OverloadError(
                        f"the server has {config.max_connections} connections with a request, its limit; try "
                        f"again",
                        retry_after_seconds=_RETRY_SECONDS,
                    )
                ),
                unread=unread,
            ),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",  # below that are what clients send wrong, a line each time
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=config.idle_seconds,
            backlog=_BACKLOG,
        )
        options.load()
        options.ssl = tls
        self._options = options
        self._server = BoundedServer(options, max_handshake_seconds=_MAX_HANDSHAKE_SECONDS)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """host:port."""
        return address_of(self._host, self.port)

    def retire(self, wait: Callable[[float], bool], grace_seconds: float) -> None:
        """Leaves the port to other processes without losing a request.

        Who connects meanwhile comes to them, when TCP tries again a second later; who is connected has one
        more answer, which says that it is the last.

        Args:
          wait: for some seconds; True if there is no more time to wait.
          grace_seconds: as of `stop`.
        """
        _turn_away(self._socket)
        if not wait(_HANDSHAKE_SECONDS):
            self._server.is_leaving = True
            wait(_LINGER_SECONDS)
        self.stop(math.ceil(grace_seconds))

    def drain(self) -> None:
        """From now on each answer says that it is its connection's last. Who connects is still answered."""
        self._server.end_connections()

    def stop(self, grace_seconds: int = _GRACE_SECONDS) -> None:
        """Closes the port; requests under way have so long to be answered. Idempotent."""
        if not self._thread.is_alive():
            return
        _turn_away(self._socket)
        self._options.timeout_graceful_shutdown = grace_seconds
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def _listen(host: str, port: int, shares_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.socket(family)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shares_port:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.bind((host.strip("[]"), port))
            listening.listen(_BACKLOG)  # from now on a client waits rather than being refused
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"rest port {port} on {host}: expected a free port, got {error.strerror or error}"
        ) from error
    return listening


def _turn_away(listening: socket.socket) -> None:
    """Has clients that begin to connect try again; those that have begun come in.

    A listening socket that is closed resets the connections that weren't accepted yet and those in their
    handshake; of those the kernel gives none to another socket of the port by default.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _NO_SYN))
    with contextlib.suppress(OSError):  # another system
        listening.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_NO_SYN), ctypes.addressof(program))
        )
