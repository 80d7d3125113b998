"""A worker's side of its link to the supervisor: `Supervised`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from xlarank.runtime.processes.messages import (
    AskMetrics,
    LastMetrics,
    MetricsText,
    Policies,
    Ready,
    Retire,
    VersionsElsewhere,
)
from xlarank.spec.versions import ModelPolicy, VersionStatus

__all__ = ["Request", "Supervised", "WorkerRequests"]

ShowElsewhere = Callable[[Sequence[VersionStatus], Sequence[VersionStatus], Sequence[str]], None]
"""`ModelRepository.show_elsewhere`."""


class Request(Protocol):
    """Something that is asked for once, such as a stop."""

    def set(self) -> None:
        """Asks for it."""
        ...

    def is_set(self) -> bool:
        """Whether it was asked for."""
        ...


class Supervised:
    """Says what the supervisor asks, and does what it says, in a thread of its own.

    Without a supervisor nobody would restart a worker or bring it new versions: it drains and ends, at once
    if it is draining already. Any thread may tell.
    """

    def __init__(self, link: Connection) -> None:
        """
        Args:
          link: opened by this process.
        """
        self._link = link
        self._lock = threading.Lock()  # held by who sends
        self._has_said_last = False  # guarded by _lock; moves one way

    def first_policies(self) -> tuple[ModelPolicy, ...] | None:
        """What the supervisor says first, waited for; None if it is gone. Once, before `start`."""
        try:
            message: Policies = self._link.recv()
        except (EOFError, OSError):
            return None
        return message.models

    def start(
        self,
        ready: Mapping[str, Any],
        metrics_text: Callable[[], bytes],
        on_versions_elsewhere: ShowElsewhere,
        on_policies: Callable[[Sequence[ModelPolicy]], None],
        *,
        stop: Request,
        retire: Request,
    ) -> None:
        """Says that the process serves, and listens from now on.

        Args:
          ready: what its ready line says.
          metrics_text: what its /metrics says.
          on_versions_elsewhere: told of all versions that it hasn't, whenever that changes.
          on_policies: told all policies, whenever they change.
          stop: asked for when it is to answer what it has accepted, and end.
          retire: asked for when it is to let its clients go first.
        """
        self.tell(Ready(ready))
        threading.Thread(
            target=self._listen,
            args=(metrics_text, on_versions_elsewhere, on_policies, stop, retire),
            name="xlarank-supervised",
            daemon=True,
        ).start()

    def tell(self, message: object) -> None:
        """Sends a message; a supervisor that is gone is no error."""
        with self._lock, contextlib.suppress(OSError):
            if not self._has_said_last:
                self._link.send(message)

    def say_last(self, metrics_text: bytes) -> None:
        """Says what the process has done in its life; nothing is said after this."""
        self.tell(LastMetrics(metrics_text))
        with self._lock:
            self._has_said_last = True

    def _listen(
        self,
        metrics_text: Callable[[], bytes],
        on_versions_elsewhere: ShowElsewhere,
        on_policies: Callable[[Sequence[ModelPolicy]], None],
        stop: Request,
        retire: Request,
    ) -> None:
        while True:
            try:
                message = self._link.recv()
            except (EOFError, OSError):
                if stop.is_set():
                    os._exit(1)
                stop.set()
                return
            if isinstance(message, AskMetrics):
                self.tell(MetricsText(metrics_text()))
            elif isinstance(message, VersionsElsewhere):
                on_versions_elsewhere(message.awaited, message.idle, message.unserved)
            elif isinstance(message, Policies):
                on_policies(message.models)
            elif isinstance(message, Retire):
                retire.set()
            else:
                stop.set()


class WorkerRequests(Collector):
    """How many requests a worker has answered: whether the processes of a server share the work."""

    def __init__(self, index: int, num_successes: Callable[[], int]) -> None:
        self._labels = {"process": str(index)}
        self._num_successes = num_successes

    def collect(self) -> Sequence[Metric]:
        """For prometheus_client."""
        family = Metric("xlarank_worker_requests", "Requests that a server process has answered", "counter")
        family.add_sample("xlarank_worker_requests_total", self._labels, self._num_successes())
        return [family]

    def describe(self) -> Sequence[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []
