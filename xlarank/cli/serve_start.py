"""A server put together from its config: `running_server`. Imports JAX and gRPC."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from xlarank_serving.admin import AdminServer
from xlarank_serving.server import RankingServer, StopRequest, stop_on_signals
from xlarank_serving.threads import short_turns

from xlarank.cli.lines import say
from xlarank.cli.serve_config import NO_REPOSITORY, ServeConfig
from xlarank.cli.serve_file import ConfigFile
from xlarank.cli.table_memory import table_progress
from xlarank.errors import ConfigError
from xlarank.runtime import Captures, Metrics, ModelRepository
from xlarank.runtime.loading import host_threads_of
from xlarank.runtime.tables import HeldTables
from xlarank.runtime.watching import Watcher

if TYPE_CHECKING:
    from xlarank_serving.access_log import AccessLog
    from xlarank_serving.tracing import Tracer

__all__ = ["RunningServer", "bound_stop", "followed_policies", "running_server"]

_LAST_SECONDS = 20.0
"""After the grace period of a stop, until a process that hangs in it is ended."""


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    server: RankingServer
    repository: ModelRepository
    metrics: Metrics

    ready: dict[str, Any]
    """What the ready line says."""

    stop: StopRequest
    """Set by a signal."""

    admin: AdminServer | None = None
    """On its own port, if it was asked for."""

    def retire(self, wait: Callable[[float], bool]) -> None:
        """Lets clients go to the processes that replace this one: see `RankingServer.retire`. Those that
        change the server go first, or what they change would be gone with this process."""
        if self.admin is not None:
            self.admin.stop()
        self.server.retire(wait)


@contextlib.contextmanager
def running_server(
    config: ServeConfig,
    held: HeldTables | None = None,
    *,
    on_drained: Callable[[Metrics], None] = lambda _: None,
) -> Iterator[RunningServer]:
    """A server until the end of the block, which it drains at.

    Args:
      config: everything that it may be told.
      held: tables that another process has loaded; the server is then one of many on its ports, and /metrics
        is not its own affair.
      on_drained: told at the end, when all that was accepted is answered.

    Raises:
      XlarankError: for ports, options or a repository that can't be served.
    """
    is_one_of_many = held is not None
    metrics = Metrics()
    timeout_ms = config.queue.default_timeout_ms
    with contextlib.ExitStack() as outer:
        outer.enter_context(short_turns())
        observers = [outer.enter_context(contextlib.closing(each)) for each in _observers(config)]
        captures = outer.enter_context(contextlib.closing(Captures(config.captures)))
        repository = _open_repository(config, metrics, captures, held)
        if held is not None:
            held.loading = None  # what fails from now on is no version's fault
        stop = outer.enter_context(stop_on_signals())  # while models load, a signal ends the process at once
        try:
            server = RankingServer(
                repository,
                None if is_one_of_many else metrics.text,
                config.server,
                limits=config.limits,
                connections=config.connections,
                security=config.security,
                http=config.http,
                manager=repository,
                default_timeout_seconds=timeout_ms / 1e3 if timeout_ms else math.inf,
                observers=observers,
                is_one_of_many=is_one_of_many,
                on_drained=lambda: on_drained(metrics),
            )
        except ConfigError:
            repository.close()
            raise
        metrics.register(server.refusals)
        # The administrative port ends last: a load that it has under way ends when the repository closes.
        with contextlib.ExitStack() as stack, server:
            admin = None
            models = [f"{name}/{version}" for name, version, _ in repository.models()]
            ready = {"grpc": server.address, "http": server.http_address, "models": models}
            if server.rest is not None:
                ready["rest"] = server.rest.address
            if config.server.admin_port is not None:
                admin = AdminServer(
                    repository, config.server.admin_port, manager=repository, is_one_of_many=is_one_of_many
                )
                ready["admin"] = stack.enter_context(admin).address
            yield RunningServer(server, repository, metrics, ready, stop, admin)


@contextlib.contextmanager
def followed_policies(file: ConfigFile, repository: ModelRepository) -> Iterator[None]:
    """Within the block the file's policies are the repository's, if that is watched.

    In a thread of its own, which no load holds up; nobody waits for its end: the file may be on a file system
    that is gone.
    """

    def look() -> None:
        policies = file.changed_policies()
        if policies is not None:
            repository.set_policies(policies)

    seconds, stop = file.config.versions.watch_seconds, threading.Event()
    if seconds is not None:
        Watcher(look, seconds, stop, what="config file")
    try:
        yield
    finally:
        stop.set()


def bound_stop(config: ServeConfig) -> None:
    """From now on the process ends within the grace period and some seconds, whatever hangs in its stop, a
    driver's thread at the interpreter's exit included: with the stacks of all threads, and status 1."""
    faulthandler.dump_traceback_later(config.server.grace_seconds + _LAST_SECONDS, exit=True)


def _observers(config: ServeConfig) -> list[AccessLog | Tracer]:
    """Logs and traces that are asked for, open; the last is to be closed first."""
    observers: list[AccessLog | Tracer] = []
    if config.tracing.endpoint is not None:  # whose collector may not answer
        from xlarank_serving.extras import tracer_type

        observers.append(tracer_type()(config.tracing))
    if config.access_log.path is not None:
        from xlarank_serving.access_log import AccessLog

        observers.append(AccessLog(config.access_log))
    return observers


def _open_repository(
    config: ServeConfig, metrics: Metrics, captures: Captures, held: HeldTables | None
) -> ModelRepository:
    models = config.models
    if models.repository is None:
        raise ConfigError(NO_REPOSITORY)
    with table_progress() as on_table_bytes:
        return ModelRepository.open(
            models.repository,
            num_devices=models.devices,
            platforms=models.platform_options,
            host_threads=host_threads_of(models.host_threads, config.processes.num_processes),
            compile_cache=models.compile_cache,
            use_bundle_code=models.bundle_code,
            table_memory=config.tables.memory,
            allow_reference_gather=models.allow_reference_gather,
            metrics=metrics,
            features=config.features.files,
            versions=config.versions,
            queue=config.queue,
            captures=captures,
            faults=config.faults,
            on_progress=lambda step: say(f"loading {step}"),
            on_table_bytes=on_table_bytes,
            held=held,
        )
