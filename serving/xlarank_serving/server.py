"""The server process's parts put together: `RankingServer`."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc

from xlarank.errors import ConfigError
from xlarank_serving import health, reflection
from xlarank_serving.gate import Gate
from xlarank_serving.health import HealthService
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.metrics_http import MetricsServer
from xlarank_serving.service import InferenceService, Repository
from xlarank_serving.streams import InferStreams
from xlarank_serving.threads import ServerThreads

__all__ = ["RankingServer", "ServerConfig", "stop_on_signals"]

_MIB = 2**20


# Once every ranking request is done: how long those that still arrive are turned away in words, and how long
# open streams (a health Watch, reflection) may stay.
_TURN_AWAY_SECONDS = 0.3
_LAST_GRACE_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server listens."""

    host: str = "127.0.0.1"
    """Address of both ports. The default can't be reached from other machines; 0.0.0.0 can."""

    port: int = 8001
    """gRPC; 0 for a free one."""

    http_port: int = 8002
    """/metrics; 0 for a free one."""

    num_threads: int = 64
    """Requests in decode, in the queue or running at a time; each waits on a thread."""

    max_concurrent_rpcs: int = 1024
    """Calls in progress or waiting for a thread; past this gRPC answers RESOURCE_EXHAUSTED."""

    max_message_mib: int = 64
    """Largest request."""

    grace_seconds: float = 30.0
    """How long a stop waits for accepted requests."""

    def __post_init__(self) -> None:
        for name in ("port", "http_port"):
            if not 0 <= getattr(self, name) < 2**16:
                raise ConfigError(f"server: {name} must be in [0, 65535]; was {getattr(self, name)}")
        for name in ("num_threads", "max_concurrent_rpcs", "max_message_mib"):
            if getattr(self, name) < 1:
                raise ConfigError(f"server: {name} must be >= 1; was {getattr(self, name)}")
        if self.max_message_mib > 2047:
            raise ConfigError(f"server: max_message_mib must be <= 2047; was {self.max_message_mib}")
        if self.grace_seconds < 0:
            raise ConfigError(f"server: grace_seconds must be >= 0; was {self.grace_seconds}")


class HttpPort(Protocol):
    """A port that `RankingServer.stop` closes."""

    @property
    def address(self) -> str: ...

    def stop(self) -> None: ...


HttpStarter = Callable[[InferenceService, Repository, ServerThreads], HttpPort]
"""Makes a port from a server's parts."""


class RankingServer:
    """gRPC and /metrics for a repository. Listens once constructed, until `stop`.

    Attributes:
      port: of gRPC.
      http_port: of /metrics.
      rest: the protocol's own HTTP port, if it was asked for.
    """

    def __init__(
        self,
        repository: Repository,
        metrics_text: Callable[[], bytes],
        config: ServerConfig | None = None,
        *,
        http: HttpStarter | None = None,
    ) -> None:
        """
        Args:
          repository: answers; `stop` closes it.
          metrics_text: what /metrics answers.
          config: `ServerConfig()` by default.
          http: starts the protocol's own HTTP port, a `HttpServer`; None for gRPC alone.

        Raises:
          ConfigError: if a port is in use. The repository is left open then.
        """
        config = config or ServerConfig()
        self._config = config
        self._repository = repository
        self._service = InferenceService(repository)
        self._threads = ServerThreads(config.num_threads)
        self._streams = InferStreams(self._service, self._threads)
        self._health = HealthService(repository)
        self._server = grpc.server(
            self._threads.rank,
            options=[
                ("grpc.so_reuseport", 0),  # by default a second server would share the port silently
                ("grpc.max_receive_message_length", config.max_message_mib * _MIB),
                ("grpc.max_send_message_length", -1),
            ],
            maximum_concurrent_rpcs=config.max_concurrent_rpcs,
        )
        self._register()
        self.port = self._bind()
        try:
            self._http = MetricsServer(metrics_text, host=config.host, port=config.http_port)
        except ConfigError:
            self._server.stop(None).wait()
            self._threads.close()
            raise
        self.http_port = self._http.port
        self.rest = None if http is None else self._start_http(http)
        self._server.start()

    @property
    def address(self) -> str:
        """host:port of gRPC."""
        return _address(self._config.host, self.port)

    @property
    def http_address(self) -> str:
        """host:port of /metrics."""
        return _address(self._config.host, self.http_port)

    def stop(self, grace_seconds: float | None = None) -> None:
        """Takes no more requests, answers those accepted, then closes the repository.

        Args:
          grace_seconds: longest wait for accepted requests; the config's by default. What is left then
            is cancelled.
        """
        grace = self._config.grace_seconds if grace_seconds is None else grace_seconds
        self._service.stop_accepting()
        self._health.stop()
        self._streams.stop()
        self._threads.wait_until_idle(grace)
        if grace:
            time.sleep(_TURN_AWAY_SECONDS)
        if self.rest is not None:
            self.rest.stop()
        self._server.stop(_LAST_GRACE_SECONDS if grace else 0).wait()
        try:
            self._repository.close()
        finally:
            self._threads.close()
            self._http.close()

    def __enter__(self) -> RankingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _register(self) -> None:
        services = {
            SERVICE_NAME: {
                **self._service.handlers(self._threads),
                "ModelStreamInfer": self._streams.handler(),
            },
            health.SERVICE_NAME: self._health.handlers(self._threads),
        }
        services[reflection.SERVICE_NAME] = reflection.reflection_handlers(services, self._threads)
        for name, handlers in services.items():
            generic = grpc.method_handlers_generic_handler(name, handlers)
            if name == SERVICE_NAME:
                generic = Gate(self._service, handlers, self._threads)
            self._server.add_generic_rpc_handlers((generic,))

    def _start_http(self, http: HttpStarter) -> HttpPort:
        try:
            return http(self._service, self._repository, self._threads)
        except ConfigError:
            self._http.close()
            self._server.stop(None).wait()
            self._threads.close()
            raise

    def _bind(self) -> int:
        address = _address(self._config.host, self._config.port)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            port, reason = 0, str(error)
        else:
            reason = "it can't be bound"
        if not port:
            self._server.stop(None).wait()
            self._threads.close()
            raise ConfigError(
                f"grpc port {self._config.port} on {self._config.host}: expected a free port, got: {reason}"
            )
        return port


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Sets the event on SIGTERM or SIGINT; a second one ends the process at once, as without this.

    For the main thread; handlers are put back at the end.
    """
    event = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, before[each])
        event.set()

    for each in signals:
        # None: a handler that Python didn't install.
        before[each] = signal.signal(each, on_signal) or signal.SIG_DFL
    try:
        yield event
    finally:
        for each in signals:
            signal.signal(each, before[each])


def _address(host: str, port: int) -> str:
    host = host.removeprefix("[").removesuffix("]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
