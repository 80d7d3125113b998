"""grpc.health.v1, with the repository's word on every model: `HealthService`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from xlarank.errors import ModelNotFoundError, OverloadError
from xlarank_serving.parsing import parse, unary_handler
from xlarank_serving.receiving import ReceiveWatch
from xlarank_serving.service import Repository
from xlarank_serving.status import answering
from xlarank_serving.threads import ServerThreads, on_threads

__all__ = ["MAX_WATCHES", "SERVICE_NAME", "HealthService"]

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

MAX_WATCHES = 1024
"""Watch calls that may be open; one more is refused."""

_log = logging.getLogger(__name__)

_REFRESH_SECONDS = 1.0

_RETRY_WATCH_SECONDS = 1.0

_MAX_NAME = 256
"""Characters of a service's name that an open Watch keeps; no model has such a long one."""

_Status = health_pb2.HealthCheckResponse


class HealthService:
    """Health of the server (service "") and of each model (its name).

    A model serves when one of its versions is ready. The repository is asked at every Check, at the start of
    every Watch and, for those that watch, every second by a thread of its own, until `stop`.

    An open Watch holds no thread. What changed is sent by threads that do nothing else, to each watcher one
    status at a time, the newest: who reads nothing holds up such a thread, until its call is ended for it,
    and no other watcher, no Check and no stop.
    """

    def __init__(self, repository: Repository, threads: ServerThreads, sends: ReceiveWatch) -> None:
        """
        Args:
          repository: is asked.
          threads: `health_watches` receive, `health_news` send.
          sends: ends calls that keep a thread of `health_news`.
        """
        self._repository = repository
        self._threads = threads
        self._sends = sends
        self._changed = threading.Condition()
        # All guarded by _changed: of each service that was ever known, open calls, and those of them that a
        # thread sends to, or is about to.
        self._statuses: dict[str | None, Any] = {"": _Status.NOT_SERVING}
        self._watches: set[_Watch] = set()
        self._sending: set[_Watch] = set()
        self._stopping = threading.Event()  # set under _changed
        self._thread = threading.Thread(target=self._follow, name="health", daemon=True)
        self._thread.start()

    @property
    def num_watches(self) -> int:
        """Watch calls that are open."""
        return len(self._watches)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """A handler a method, by name."""

        def watch(data: bytes, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
            answering(lambda data, context: self._watch(data, context, send))(data, context)

        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        types = (health_pb2.HealthCheckRequest, _Status)
        return {
            "Check": unary_handler(health_pb2, "Check", self._check, self._threads.control, types=types),
            "Watch": grpc.unary_stream_rpc_method_handler(
                on_threads(watch, self._threads.health_watches), response_serializer=_Status.SerializeToString
            ),
        }

    def stop(self) -> None:
        """From now on nothing serves. Every watcher who reads hears it, unless that takes long."""
        with self._changed:
            self._stopping.set()
            self._statuses = dict.fromkeys(self._statuses, _Status.NOT_SERVING)
            self._spread()
            self._changed.wait_for(lambda: not self._sending, _REFRESH_SECONDS)
        self._thread.join(_REFRESH_SECONDS)

    def _check(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._refresh()
        with self._changed:
            status = self._statuses.get(request.service)
        if status is None:
            raise ModelNotFoundError(
                f"service {request.service!r} is not found; expected a model's name or ''"
            )
        return _Status(status=status)

    def _watch(self, data: bytes, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
        name = parse(health_pb2.HealthCheckRequest, data).service
        self._refresh()
        watch = _Watch(name if len(name) <= _MAX_NAME else None, context, send)
        with self._changed:
            if len(self._watches) >= MAX_WATCHES:
                raise OverloadError(
                    f"the server has {MAX_WATCHES} open Watch calls, its limit; try again when one has "
                    f"ended, or use Check",
                    retry_after_seconds=_RETRY_WATCH_SECONDS,
                )
            self._watches.add(watch)
        if context.add_callback(functools.partial(self._forget, watch)):
            self._tell(watch)
        else:  # it is over
            self._forget(watch)

    def _forget(self, watch: _Watch) -> None:
        with self._changed:
            self._watches.discard(watch)

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
        with self._changed:
            if self._stopping.is_set():
                return
            before = self._statuses
            self._statuses = dict.fromkeys(before, _Status.NOT_SERVING)  # unloaded
            for name, is_ready in ready.items():
                self._statuses[name] = _Status.SERVING if is_ready else _Status.NOT_SERVING
            if self._statuses != before:
                self._spread()

    def _spread(self) -> None:
        for watch in self._watches:
            self._tell(watch)

    def _tell(self, watch: _Watch) -> None:
        with self._changed:
            if watch not in self._sending and watch.told != self._status_for(watch):
                self._sending.add(watch)
                self._threads.health_news.submit(self._send_news, watch)

    def _send_news(self, watch: _Watch) -> None:
        try:
            while (status := self._news_for(watch)) is not None:
                with self._sends.awaiting(watch.context):
                    watch.send(_Status(status=status))
        except Exception:  # else a stop would wait for it, and it would hear of nothing any more
            _log.exception("health: a watcher can't be told")
            with self._changed:
                self._sending.discard(watch)
                self._changed.notify_all()

    def _news_for(self, watch: _Watch) -> Any:
        """What to send now; None if nothing is left to."""
        with self._changed:
            status = self._status_for(watch)
            if watch in self._watches and watch.told != status:
                watch.told = status
                return status
            self._sending.discard(watch)
            self._changed.notify_all()
            return None

    def _status_for(self, watch: _Watch) -> Any:
        return self._statuses.get(watch.name, _Status.SERVICE_UNKNOWN)


class _Watch:
    """An open call."""

    def __init__(self, name: str | None, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
        self.name = name  # None: no model's
        self.context = context
        self.send = send  # waits until the caller has room
        self.told: Any = None  # of its service; the newest status that was sent or is being sent
