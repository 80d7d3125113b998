"""Questions for the metrics of all processes, and the answer to them: `Scrapes`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from multiprocessing.connection import Connection

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from xlarank.runtime.processes.messages import AskMetrics, VersionsElsewhere
from xlarank.runtime.processes.metrics_merge import MergedMetrics
from xlarank.runtime.version_metrics import VersionMetrics
from xlarank.spec.versions import ModelPolicy, VersionStatus

__all__ = ["Scrapes", "Worker"]

_WAIT_SECONDS = 2.0
"""How long a scrape waits for a process; of one that hangs the last words count."""


@dataclasses.dataclass
class Worker:
    """A server process, as the supervisor knows it."""

    index: int
    pid: int
    link: Connection | None = None
    is_ready: bool = False
    text: bytes = b""
    """What it last said of itself."""

    told_elsewhere: VersionsElsewhere = dataclasses.field(default_factory=lambda: VersionsElsewhere(()))
    """What it knows of versions that it hasn't."""

    told_policies: tuple[ModelPolicy, ...] | None = None
    """By which it serves; None before its first word from the supervisor."""

    asked_at: float | None = None
    """Since when it owes an answer; None for not."""

    @property
    def is_listening(self) -> bool:
        """Whether it reads what it is told, as far as one knows: what nobody reads would fill the link."""
        return self.link is not None and self.is_ready and self.asked_at is None

    def ask(self, now: float) -> None:
        """Asks it to speak of itself, unless it owes an answer."""
        if self.link is None or not self.is_listening:
            return
        self.asked_at = now
        with contextlib.suppress(OSError):  # it has ended; its link says so next
            self.link.send(AskMetrics())

    def silent_seconds(self, now: float) -> float:
        """How long it has owed an answer."""
        return 0.0 if self.asked_at is None else now - self.asked_at


class Scrapes:
    """Asks the workers for those who scrape, and adds up what they say.

    `text` is for any thread; the rest is for the supervisor's.

    Attributes:
      file: readable when somebody has asked.
      merged: what processes that are gone have counted.
      restarts: of each worker, by index.
      versions: counts of versions that came or failed.
    """

    def __init__(
        self,
        num_workers: int,
        is_up: Callable[[int], bool],
        statuses: Callable[[], Sequence[VersionStatus]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          num_workers: k.
          is_up: whether the worker of an index serves; asked at each scrape.
          statuses: of versions that no worker tells of; likewise.
          clock: seconds, monotonic.
        """
        self._clock = clock
        self.restarts = [0] * num_workers
        self.merged = MergedMetrics()
        self.versions = VersionMetrics(statuses, lambda: 0)
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(self.restarts, is_up))
        self._registry.register(self.versions)
        self.file, self._wake = os.pipe()
        os.set_blocking(self.file, False)
        self._asked: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
        self._round: list[Future[bytes]] = []  # of those that are answered together
        self._unanswered: set[int] = set()  # pids
        self._round_ends_at = 0.0

    @property
    def ends_at(self) -> float:
        """When those who asked are answered at the latest; infinite if nobody has."""
        return self._round_ends_at if self._round else float("inf")

    def text(self) -> bytes:
        """What /metrics answers; nothing if the supervisor is too busy to ask. Any thread."""
        asked: Future[bytes] = Future()
        self._asked.put(asked)
        os.write(self._wake, b"m")
        try:
            return asked.result(_WAIT_SECONDS + 5)
        except FutureTimeoutError:
            return b""

    def see_answer(self, worker: Worker) -> None:
        """A worker has said what it has to say, or never will."""
        worker.asked_at = None
        self._unanswered.discard(worker.pid)

    def see_to(self, workers: Iterable[Worker]) -> None:
        """Begins a round if somebody has asked, and ends it if all is said.

        Args:
          workers: all that there are, those that are ending first.
        """
        with contextlib.suppress(BlockingIOError):
            os.read(self.file, 4096)  # who asked meanwhile is found by the queue
        workers = list(workers)
        self._end_round(workers)
        if not self._round and not self._asked.empty():
            self._begin_round(workers)
            self._end_round(workers)

    def close(self) -> None:
        """Frees the pipe."""
        os.close(self.file)
        os.close(self._wake)

    def _end_round(self, workers: Iterable[Worker]) -> None:
        """If everybody has said what was asked, or no more time is left."""
        if not self._round or (self._unanswered and self._clock() < self._round_ends_at):
            return
        told = [(worker.index, worker.text) for worker in workers]
        text = self.merged.text(told, generate_latest(self._registry))
        for asked in self._round:
            asked.set_result(text)
        self._round = []

    def _begin_round(self, workers: Iterable[Worker]) -> None:
        while not self._asked.empty():
            self._round.append(self._asked.get())
        self._round_ends_at = self._clock() + _WAIT_SECONDS
        self._unanswered = set()
        for worker in workers:
            if worker.silent_seconds(self._clock()) < _WAIT_SECONDS:  # a hung one holds up one scrape
                worker.ask(self._clock())
                if worker.asked_at is not None:
                    self._unanswered.add(worker.pid)


class _Counts(Collector):
    """Which processes serve, and how often each was started again."""

    def __init__(self, restarts: Sequence[int], is_up: Callable[[int], bool]) -> None:
        self._restarts = restarts
        self._is_up = is_up

    def collect(self) -> Sequence[Metric]:
        """For prometheus_client."""
        up = Metric("xlarank_worker_up", "Whether a server process serves", "gauge")
        restarts = Metric(
            "xlarank_worker_restarts", "Times that a server process was started again", "counter"
        )
        for index, count in enumerate(self._restarts):
            labels = {"process": str(index)}
            up.add_sample("xlarank_worker_up", labels, float(self._is_up(index)))
            restarts.add_sample("xlarank_worker_restarts_total", labels, count)
        return [up, restarts]

    def describe(self) -> Sequence[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []
