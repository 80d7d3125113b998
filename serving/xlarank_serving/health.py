"""grpc.health.v1, with the repository's word on every model: `HealthService`."""

from __future__ import annotations

import logging
import threading
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from xlarank_serving.service import Repository
from xlarank_serving.threads import ServerThreads, on_threads

__all__ = ["SERVICE_NAME", "HealthService"]

SERVICE_NAME = health.SERVICE_NAME

_log = logging.getLogger(__name__)

_REFRESH_SECONDS = 1.0

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthService:
    """Health of the server (service "") and of each model (its name).

    A model serves when one of its versions is ready. The repository is asked at every Check, at the start of
    every Watch and, for those that watch, every second by a thread of its own, until `stop`.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._statuses: dict[str, Any] = {}  # guarded by _lock; last told to _servicer
        self._servicer = health.HealthServicer()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="health", daemon=True)
        self._thread.start()

    def handlers(self, threads: ServerThreads) -> dict[str, grpc.RpcMethodHandler]:
        """A handler a method, by name."""

        def check(request: Any, context: grpc.ServicerContext) -> Any:
            self._refresh()
            return self._servicer.Check(request, context)

        def watch(request: Any, context: grpc.ServicerContext, send_response_callback: Any = None) -> Any:
            self._refresh()
            return self._servicer.Watch(request, context, send_response_callback)

        # An open Watch holds no thread once its request has come: the servicer calls back when there is news.
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        codec: dict[str, Any] = {
            "request_deserializer": health_pb2.HealthCheckRequest.FromString,
            "response_serializer": health_pb2.HealthCheckResponse.SerializeToString,
        }
        return {
            "Check": grpc.unary_unary_rpc_method_handler(on_threads(check, threads.control), **codec),
            "Watch": grpc.unary_stream_rpc_method_handler(on_threads(watch, threads.health_watches), **codec),
        }

    def stop(self) -> None:
        """From now on nothing serves, and every watcher hears it."""
        self._stopping.set()
        self._servicer.enter_graceful_shutdown()
        self._thread.join(_REFRESH_SECONDS)

    def _follow(self) -> None:
        while not self._stopping.wait(_REFRESH_SECONDS):
            try:
                self._refresh()
            except Exception:  # watchers would hear of nothing any more
                _log.exception("health: the repository can't be asked")

    def _refresh(self) -> None:
        ready: dict[str, bool] = {"": self._repository.is_ready}
        for name, _, is_ready in self._repository.models():
            ready[name] = ready.get(name, False) or is_ready
        with self._lock:
            for name in self._statuses.keys() - ready.keys():
                ready[name] = False  # unloaded
            for name, is_ready in ready.items():
                status = _SERVING if is_ready else _NOT_SERVING
                if self._statuses.get(name) != status:
                    self._statuses[name] = status
                    self._servicer.set(name, status)
