"""Requests, devices and queues on a clock of their own: `simulate`.

The scheduler and the batchers are those of the server; only the devices and the clock are made up.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from xlarank.errors import ConfigError, DeadlineError, OverloadError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.model_queue import ModelQueue, Turn
from xlarank.runtime.scheduler import Scheduler
from xlarank.spec import DEFAULT_PRIORITY, RequestOptions
from xlarank.spec.serving import QueueConfig

__all__ = ["Arrival", "SimulationResult", "lone_seconds", "poisson_arrivals", "saturated_rate", "simulate"]


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request."""

    at: float
    """Seconds from the beginning."""

    num_rows: int
    """N >= 1."""

    model: int = 0
    """Number of its model, by the order of the queues."""

    priority: int = DEFAULT_PRIORITY
    timeout: float = math.inf
    """Seconds from its arrival to its deadline."""

    affinity_key: str | None = None


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """What became of the requests of a simulation."""

    latencies: np.ndarray
    """[A] float64 seconds from arrival to answer, by arrival; NaN for one that was not answered."""

    sizes: np.ndarray
    """[A] int64 candidates, by arrival."""

    seconds: float
    """From the first arrival to the last answer."""

    num_refused: int
    """Refused on arrival, because of the queue or of their deadline."""

    num_late: int
    """Dropped from the queue because of their deadline."""

    num_batches: int
    num_rows_run: int
    """Rows of all buckets that ran, padding included."""

    num_candidates_run: int
    """Of those rows, the ones with a candidate, of requests that were dropped later too."""

    busy_seconds: tuple[float, ...]
    """By device."""

    @property
    def is_answered(self) -> np.ndarray:
        """[A] bool."""
        return ~np.isnan(self.latencies)

    @property
    def requests_a_second(self) -> float:
        """Answered, over the whole time."""
        return float(self.is_answered.sum()) / self.seconds

    @property
    def rows_a_second(self) -> float:
        """Candidates of answered requests, over the whole time."""
        return float(self.sizes[self.is_answered].sum()) / self.seconds

    @property
    def padding_share(self) -> float:
        """Rows without a candidate, of all rows that ran."""
        return 1 - self.num_candidates_run / self.num_rows_run if self.num_rows_run else 0.0

    @property
    def utilisation(self) -> float:
        """Busy share of the devices' time."""
        return sum(self.busy_seconds) / (self.seconds * len(self.busy_seconds))

    def latency(self, quantile: float) -> float:
        """Seconds, of the answered ones; NaN when there is none."""
        answered = self.latencies[self.is_answered]
        return float(np.quantile(answered, quantile)) if len(answered) else math.nan

    @property
    def mean_latency(self) -> float:
        """Seconds, of the answered ones; NaN when there is none."""
        answered = self.latencies[self.is_answered]
        return float(answered.mean()) if len(answered) else math.nan

    def goodput(self, slo: float) -> float:
        """Requests a second that were answered within `slo` seconds."""
        return float((self.latencies <= slo).sum()) / self.seconds


def poisson_arrivals(
    rate: float,
    sizes: Callable[[np.random.Generator, int], np.ndarray],
    num_requests: int,
    *,
    seed: int = 0,
    options: Callable[[int], dict] = lambda _: {},
) -> list[Arrival]:
    """Arrivals with exponential gaps.

    Args:
      rate: requests a second.
      sizes: gives [n] candidate counts of n requests.
      num_requests: A.
      seed: of the random numbers.
      options: further fields of the arrival of a number.

    Raises:
      ConfigError: for a rate that isn't > 0.
    """
    if not rate > 0:
        raise ConfigError(f"simulation: rate must be > 0; was {rate}")
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, num_requests)).tolist()
    counts = sizes(rng, num_requests).tolist()
    return [Arrival(at, n, **options(i)) for i, (at, n) in enumerate(zip(times, counts, strict=True))]


def simulate(
    scheduler: Scheduler[int],
    queues: Sequence[ModelQueue[int]],
    arrivals: Iterable[Arrival],
    *,
    service_seconds: Callable[[Turn[int]], float] | None = None,
    overhead_seconds: float = 0.0,
) -> SimulationResult:
    """Runs arrivals through a scheduler.

    Args:
      scheduler: new, with the queues attached.
      queues: of the models, by the number that an arrival has.
      arrivals: by time.
      service_seconds: what a turn takes; by default what its plan says.
      overhead_seconds: that each request takes before it is queued, whatever else there is: decoding, the
        network. Latencies and deadlines count from before it.

    Returns:
      What became of them.
    """
    run = _Run(scheduler, queues, service_seconds or (lambda turn: turn.predicted_seconds), overhead_seconds)
    for arrival in arrivals:
        run.advance(arrival.at)
        run.arrive(arrival)
    run.advance(math.inf)
    return run.result()


def saturated_rate(plans: Sequence[BucketPlan], config: QueueConfig, sizes: Sequence[int]) -> float:
    """Requests a second that devices answer when there are always more waiting.

    Args:
      plans: their prices, by device.
      config: the rule that batches are made by; nothing is refused.
      sizes: candidates of the requests.
    """
    return _simulate_all(plans, config, [Arrival(0.0, size) for size in sizes]).requests_a_second


def lone_seconds(plans: Sequence[BucketPlan], config: QueueConfig, sizes: Sequence[int]) -> float:
    """Mean latency of requests each of which comes when nothing else is there; see `saturated_rate`."""
    gap = 1 + max(plan.seconds(max(sizes)) for plan in plans)
    arrivals = [Arrival(number * gap, size) for number, size in enumerate(sizes)]
    return _simulate_all(plans, config, arrivals).mean_latency


def _simulate_all(
    plans: Sequence[BucketPlan], config: QueueConfig, arrivals: Sequence[Arrival]
) -> SimulationResult:
    """Of one model, with nothing refused."""
    scheduler: Scheduler[int] = Scheduler(len(plans))
    config = dataclasses.replace(config, max_queue_ms=1e15, max_queued_rows=2**62)
    return simulate(scheduler, [scheduler.attach("model", plans, config)], arrivals)


class _Run:
    """One simulation."""

    def __init__(
        self,
        scheduler: Scheduler[int],
        queues: Sequence[ModelQueue[int]],
        service_seconds: Callable[[Turn[int]], float],
        overhead_seconds: float,
    ) -> None:
        self._scheduler, self._queues = scheduler, queues
        self._service_seconds = service_seconds
        self._overhead_seconds = overhead_seconds
        self._now = 0.0  # on a clock that is behind the arrivals' by the overhead
        self._ends: list[tuple[float, int, Turn[int]]] = []  # a heap
        self._count = itertools.count()
        self._free = set(range(len(queues[0].plans)))
        self._arrivals: list[Arrival] = []
        self._rows_left: list[int] = []
        self._latencies: list[float] = []
        self._num_refused = self._num_late = 0
        self._num_batches = self._num_rows_run = self._num_candidates_run = 0
        self._busy = [0.0] * len(self._free)

    def advance(self, until: float) -> None:
        """Lets everything happen that does before a time."""
        while True:
            next_end = self._ends[0][0] if self._ends else math.inf
            wake_at = self._scheduler.wake_at()
            event = min(next_end, wake_at)
            if event > until or event == math.inf:
                break
            self._now = event
            if next_end == event:
                self._end()
            else:
                self._tell_late()
            self._start()
        if until < math.inf:
            self._now = until

    def arrive(self, arrival: Arrival) -> None:
        """Submits a request."""
        number = len(self._arrivals)
        self._arrivals.append(arrival)
        self._rows_left.append(arrival.num_rows)
        self._latencies.append(math.nan)
        options = RequestOptions(
            priority=arrival.priority,
            deadline=arrival.at + arrival.timeout - self._overhead_seconds,
            affinity_key=arrival.affinity_key,
        )
        try:
            queue = self._queues[arrival.model]
            self._scheduler.submit(queue, number, arrival.num_rows, options, self._now)
        except (DeadlineError, OverloadError):
            self._num_refused += 1
            return
        self._start()

    def result(self) -> SimulationResult:
        """What became of all of it."""
        first = self._arrivals[0].at if self._arrivals else 0.0
        return SimulationResult(
            latencies=np.array(self._latencies),
            sizes=np.array([arrival.num_rows for arrival in self._arrivals], np.int64),
            seconds=max(self._now - first, 1e-9),
            num_refused=self._num_refused,
            num_late=self._num_late,
            num_batches=self._num_batches,
            num_rows_run=self._num_rows_run,
            num_candidates_run=self._num_candidates_run,
            busy_seconds=tuple(self._busy),
        )

    def _end(self) -> None:
        _, _, turn = heapq.heappop(self._ends)
        self._scheduler.finished(turn, self._now)
        self._free.add(turn.device)
        for part in turn.batch.parts:
            self._rows_left[part.item] -= part.num_rows
            if self._rows_left[part.item] == 0:
                waited = self._now - self._arrivals[part.item].at
                self._latencies[part.item] = waited + self._overhead_seconds

    def _tell_late(self) -> None:
        self._num_late += len(self._scheduler.take_late(self._now))

    def _start(self) -> None:
        """Gives every free device what there is for it; what one takes may free what others left to it."""
        while any(list(self._starts())):
            pass
        self._tell_late()
        assert self._scheduler.wake_at() > self._now  # all that was due has been seen to: time goes on

    def _starts(self) -> Iterator[bool]:
        for device in sorted(self._free):
            turn = self._scheduler.next_turn(device, self._now)
            yield turn is not None
            if turn is not None:
                seconds = self._service_seconds(turn)
                self._free.discard(device)
                self._busy[device] += seconds
                self._num_batches += 1
                self._num_rows_run += turn.batch.bucket.rows
                self._num_candidates_run += sum(part.num_rows for part in turn.batch.parts)
                heapq.heappush(self._ends, (self._now + seconds, next(self._count), turn))
