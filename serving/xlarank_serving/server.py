"""The server process's parts put together: `RankingServer`."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from xlarank_serving import admin, health, reflection
from xlarank_serving.access import Authorizer, Gatekeeper
from xlarank_serving.config import ConnectionConfig, HttpConfig, LimitConfig, SecurityConfig, ServerConfig
from xlarank_serving.extras import http_server_type
from xlarank_serving.gate import AdminGate, Gate
from xlarank_serving.health import HealthService
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.metrics_http import MetricsServer
from xlarank_serving.receiving import ReceiveWatch
from xlarank_serving.refusals import Refusals
from xlarank_serving.request_record import Observer
from xlarank_serving.service import InferenceService, Repository
from xlarank_serving.streams import InferStreams
from xlarank_serving.threads import CountingThreadPool, ServerThreads
from xlarank_serving.tls import ServerTls
from xlarank_serving.transport import (
    address_of,
    bind,
    hang_up,
    num_connections,
    server_options,
    stop_listening,
)
from xlarank_serving.unread import UnreadAnswers

if TYPE_CHECKING:
    from xlarank_serving.http_server import HttpServer
    from xlarank_serving.repository_rpcs import ManagedRepository

__all__ = ["SIGNAL_SECONDS", "RankingServer", "StopRequest", "metrics_server", "stop_on_signals"]

# Once every ranking request is done: how long those that still arrive are turned away in words, and how long
# open streams (a health Watch, reflection) may stay.
_TURN_AWAY_SECONDS = 0.3
_LAST_GRACE_SECONDS = 0.2

_MAX_OTHER_RPCS = 1024
"""Calls that don't rank, open watches of health apart, or are being refused: past that gRPC itself refuses,
whatever they are, and doesn't say when to come again."""

_LOOK_SECONDS = 0.1
"""How often a server that lets its clients go looks whether one is left."""


class RankingServer:
    """gRPC and /metrics for a repository. Listens once constructed, until `stop`.

    Attributes:
      port: of gRPC.
      http_port: of /metrics, if it is answered here.
      rest: the protocol's own HTTP port, if it was asked for.
    """

    def __init__(
        self,
        repository: Repository,
        metrics_text: Callable[[], bytes] | None,
        config: ServerConfig | None = None,
        *,
        limits: LimitConfig | None = None,
        connections: ConnectionConfig | None = None,
        security: SecurityConfig | None = None,
        http: HttpConfig | None = None,
        manager: ManagedRepository | None = None,
        default_timeout_seconds: float = math.inf,
        observers: Sequence[Observer] = (),
        is_one_of_many: bool = False,
        on_drained: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          repository: answers; `stop` closes it.
          metrics_text: what /metrics answers; None for nothing, as it is answered elsewhere.
          config: where to listen; it and the others are their defaults where they aren't given.
          limits: how much a caller may send.
          connections: how long clients may stay.
          security: who may call.
          http: the protocol's own HTTP port; off by default.
          manager: the repository once more if callers with an admin token may load and unload models.
          default_timeout_seconds: longest that a request may take which asks for no less.
          observers: logs and traces, told of every ranking request.
          is_one_of_many: whether other processes listen on the same ports: what would change this one alone
            is refused.
          on_drained: called by `stop` when every request is answered, before the repository is closed.

        Raises:
          ConfigError: if a port is in use, certificates or tokens aren't right, or HTTP's libraries aren't
            installed. The repository is left open then.
        """
        config = config or ServerConfig()
        limits = limits or LimitConfig()
        security = security or SecurityConfig()
        self._config = config
        self._on_drained = on_drained
        self._is_retiring = False  # moves one way
        self._repository = repository
        authorizer = Authorizer(security)
        tls = ServerTls(security) if security.has_tls else None
        self._service = InferenceService(
            repository,
            limits=limits,
            default_timeout_seconds=default_timeout_seconds,
            observers=observers,
        )
        with contextlib.ExitStack() as undo:
            self._threads = ServerThreads(config.num_threads)
            undo.callback(self._threads.close)
            self._unread = UnreadAnswers()
            stream_seconds = config.stream_idle_seconds or math.inf
            # By the pool whose threads wait; the service's refusals are of ranking requests alone.
            self._receive_watches: dict[CountingThreadPool, ReceiveWatch] = {}
            for pool, seconds, refusals in (
                (self._threads.rank, limits.max_receive_seconds, self._service.refusals),
                (self._threads.control, limits.max_receive_seconds, Refusals()),
                (self._threads.health_watches, limits.max_receive_seconds, Refusals()),
                (self._threads.health_news, limits.max_receive_seconds, Refusals()),
                (self._threads.reflection, stream_seconds, Refusals()),
                (self._threads.streams, stream_seconds, Refusals()),
            ):
                watch = ReceiveWatch(seconds, pool, refusals)
                undo.callback(watch.close)
                self._receive_watches[pool] = watch
            self._streams = InferStreams(
                self._service,
                self._threads,
                self._unread,
                self._receive_watches[self._threads.streams],
                max_idle_seconds=stream_seconds,
            )
            self._health = HealthService(
                repository, self._threads, self._receive_watches[self._threads.health_news]
            )
            undo.callback(self._health.stop)
            ranking = self._receive_watches[self._threads.rank]
            self._service.count_open(lambda: self._threads.rank.num_open, lambda: ranking.num_stalled)
            self._server = grpc.server(
                self._threads.rank,
                options=server_options(limits, connections or ConnectionConfig(), shares_port=is_one_of_many),
                maximum_concurrent_rpcs=limits.max_concurrent_rpcs + health.MAX_WATCHES + _MAX_OTHER_RPCS,
                interceptors=[
                    Gatekeeper(authorizer, self._threads, self._service.refusals),
                    AdminGate(self._threads.administration, self._threads.refusals),
                ],
            )
            undo.callback(lambda: self._server.stop(None).wait())
            self._is_one_of_many = is_one_of_many
            self._register(manager if authorizer.answers_administration else None, authorizer)
            self.port = bind(self._server, "grpc", config.host, config.port, tls)
            self._http: MetricsServer | None = None
            if metrics_text is not None:
                self._http = metrics_server(metrics_text, config, security, authorizer, tls)
                undo.callback(self._http.close)
            self.rest: HttpServer | None = None
            if http is not None and http.port is not None:
                self.rest = http_server_type()(
                    self._service,
                    repository,
                    self._threads,
                    http,
                    self._unread,
                    host=config.host,
                    authorize=authorizer.check_method,
                    tls=None if tls is None or security.plain_http else tls.http_context(),
                    manager=manager if authorizer.answers_administration else None,
                    shares_port=is_one_of_many,
                )
            undo.pop_all()
        self.http_port = None if self._http is None else self._http.port
        self._server.start()

    @property
    def refusals(self) -> Refusals:
        """For /metrics: requests that failed before an engine had them."""
        return self._service.refusals

    @property
    def address(self) -> str:
        """host:port of gRPC."""
        return address_of(self._config.host, self.port)

    @property
    def http_address(self) -> str | None:
        """host:port of /metrics, if it is answered here."""
        return None if self.http_port is None else address_of(self._config.host, self.http_port)

    def retire(self, wait: Callable[[float], bool]) -> None:
        """Lets clients go to the other processes of the port: listens no more, answers all the same but for
        administration, which must reach the processes that stay, and returns when each connection has come to
        its age (`ConnectionConfig.max_age_seconds`) and is gone.

        Args:
          wait: for some seconds; True if there is no more time to wait.
        """
        self._is_retiring = True
        stop_listening(self.port)
        if self.rest is not None:
            self.rest.retire(wait, self._config.grace_seconds)
        while num_connections(self.port) and not wait(_LOOK_SECONDS):
            pass

    def stop(self, grace_seconds: float | None = None) -> None:
        """Takes no more requests, answers those accepted, then closes the repository.

        Args:
          grace_seconds: longest wait for accepted requests; the config's by default. What is left then
            is answered UNAVAILABLE, whatever its device is at, or cancelled.
        """
        grace = self._config.grace_seconds if grace_seconds is None else grace_seconds
        if self.rest is not None:
            self.rest.drain()  # before anything is refused: a client shall ask elsewhere, or at least anew
        self._service.stop_accepting()
        self._health.stop()
        self._streams.stop()
        if not self._threads.wait_until_idle(grace):
            self._repository.abandon(f"the server is stopping, and the answer didn't come within {grace:g} s")
            self._threads.wait_until_idle(_LAST_GRACE_SECONDS)
        if grace:
            time.sleep(_TURN_AWAY_SECONDS)
        if self.rest is not None:
            self.rest.stop()
        hang_up(self.port)
        self._server.stop(_LAST_GRACE_SECONDS if grace else 0).wait()
        try:
            self._on_drained()
            self._repository.close()
        finally:
            for watch in self._receive_watches.values():
                watch.close()
            self._threads.close()
            if self._http is not None:
                self._http.close()

    def __enter__(self) -> RankingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _register(self, manager: ManagedRepository | None, authorizer: Authorizer) -> None:
        inference = self._service.handlers(
            self._threads, manager=manager, is_one_of_many=self._is_one_of_many
        )
        services = {
            SERVICE_NAME: inference | {"ModelStreamInfer": self._streams.handler()},
            health.SERVICE_NAME: self._health.handlers(),
        }
        if authorizer.answers_administration:
            services[admin.SERVICE_NAME] = admin.handlers(
                self._repository,
                self._threads.administration,
                manager=manager,
                is_one_of_many=self._is_one_of_many,
                is_ending=lambda: self._is_retiring,
            )
        services[reflection.SERVICE_NAME] = reflection.reflection_handlers(
            services, self._threads, self._receive_watches[self._threads.reflection]
        )
        for name, handlers in services.items():
            handlers = {
                method: self._unread.watched(self._watched(each)) for method, each in handlers.items()
            }
            generic = grpc.method_handlers_generic_handler(name, handlers)
            if name == SERVICE_NAME:
                streams = self._receive_watches[self._threads.streams]
                generic = Gate(self._service, handlers, self._threads, streams)
            self._server.add_generic_rpc_handlers((generic,))

    def _watched(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """A method of one request that waits for it no longer than others may be kept from its thread."""
        method = handler.unary_unary or handler.unary_stream
        pool: Any = getattr(method, "experimental_thread_pool", None)
        watch = self._receive_watches.get(pool)
        return handler if watch is None else watch.watched(handler)


def metrics_server(
    text: Callable[[], bytes],
    config: ServerConfig,
    security: SecurityConfig,
    authorizer: Authorizer | None = None,
    tls: ServerTls | None = None,
) -> MetricsServer:
    """/metrics as a server's config has it; what isn't given of the security is made.

    Raises:
      ConfigError: if the port is in use, or certificates or tokens aren't right.
    """
    authorizer = authorizer or Authorizer(security)
    if tls is None and security.has_tls:
        tls = ServerTls(security)
    return MetricsServer(
        text,
        host=config.host,
        port=config.http_port,
        tls=None if security.plain_http else tls,
        check=authorizer.check_metrics,
    )


SIGNAL_SECONDS = 1.0
"""How long a wait of the main thread may go without running handlers of signals."""


class StopRequest:
    """Set by a signal handler, waited for by the main thread.

    Not a `threading.Event`: its lock isn't reentrant, and a handler that runs while the main thread holds it,
    just going to wait, would wait for itself for ever. Writing into a pipe takes no lock.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._is_set = False  # moves one way

    def set(self) -> None:
        """Ends the wait, now or when it comes. For a signal handler, too."""
        if not self._is_set:
            self._is_set = True
            os.write(self._writer, b"x")

    def fileno(self) -> int:
        """A file that becomes readable when it is set."""
        return self._reader

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for so many seconds, or for ever; whether it was set.

        A signal that comes to another thread, or as the system call begins, doesn't end the call, and Python
        runs the handler when it is over: so none lasts longer than a second.
        """
        poll = select.poll()  # select() takes no file from the 1024th on
        poll.register(self._reader, select.POLLIN)
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self._is_set and (left := end - time.monotonic()) > 0:
            poll.poll(math.ceil(1e3 * min(left, SIGNAL_SECONDS)))
        return self._is_set

    def close(self) -> None:
        """Frees the pipe."""
        os.close(self._reader)
        os.close(self._writer)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Sets the request on SIGTERM or SIGINT; a second one ends the process at once, as without this.

    For the main thread; handlers are put back at the end.
    """
    request = StopRequest()
    signals = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, before[each])
        request.set()

    for each in signals:
        # None: a handler that Python didn't install.
        before[each] = signal.signal(each, on_signal) or signal.SIG_DFL
    try:
        yield request
    finally:
        for each in signals:
            signal.signal(each, before[each])
        request.close()
