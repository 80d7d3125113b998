"""Load beyond what one request at a time would bear: `batching_gain`, `overload_goodput` and its p99."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter

import numpy as np
from figures import Figure, Goal, quantile_figure, ratio_figure
from open_loop import Played
from serving_lab import (
    HUGE_QUEUE,
    Lab,
    Served,
    arrivals_of,
    fixed_sizes,
    server_means,
    small_sizes,
)

from xlarank.runtime.bucket_plan import BucketPlan

__all__ = ["Overload", "batching_gain", "overload_figures", "overload_of"]

_SATURATING = 60
"""Requests under way: less than the threads of the server, more than a batch takes."""

_TIMES_CAPACITY = 3
_SLO_SERVICES = 5
_QUEUE_SERVICES = 3
"""Longest wait, in services of a full bucket: one goes on the service itself, one is left for the rest."""

_OUTSTANDING = 3
_WARM_SHARE = 0.15
"""Of a run of overload, until the queue is as long as it gets."""


def batching_gain(lab: Lab, heavy: Served, *, turns: int, seconds: float, how: str) -> Figure:
    """Requests/s at saturation with batching over without; two servers take turns."""
    traffic = small_sizes()
    rates: dict[str, list[float]] = {"on": [], "off": []}
    rows: list[float] = []
    with (
        lab.server(heavy, **HUGE_QUEUE) as on,
        lab.server(heavy, max_batch_rows=1, **HUGE_QUEUE) as off,
        lab.generator(heavy, traffic, on) as to_on,
        lab.generator(heavy, traffic, off) as to_off,
    ):
        plan = lab.plan(heavy, seconds_a_run=0.0)
        sides = [("on", to_on), ("off", to_off)]
        order = [
            5 * place % len(traffic.sizes) for place in range(len(traffic.sizes))
        ]  # small and large mixed
        for turn in range(turns):
            means = server_means(on["http"])
            for name, generator in sides if turn % 2 == 0 else reversed(sides):
                result = generator.closed_loop(order, outstanding=_SATURATING, seconds=seconds)
                rates[name].append(result.rate)
            rows.append(means().rows_a_batch)
    figure = ratio_figure(
        "batching_gain",
        rates["on"],
        rates["off"],
        target=2.5,
        goal=Goal.AT_LEAST,
        how=f"{how}; {traffic.words}, {_SATURATING} under way, to two servers on one device that take turns "
        f"of {seconds:g} s: requests/s with our batcher over those with one request a batch; {turns} "
        f"turns each",
    )
    beside = {
        "the executable's own ratio": f"{_executable_gain(plan, traffic.sizes):.2f} (measured profile: "
        f"requests alone in their buckets over the same rows in buckets of the knee, {plan.knee_rows} rows)",
        "requests/s, median": ", ".join(f"{name} {statistics.median(rates[name]):.0f}" for name in rates),
        "rows a batch with batching": f"{statistics.median(rows):.0f}",
    }
    return dataclasses.replace(figure, beside=beside)


def _executable_gain(plan: BucketPlan, sizes: tuple[int, ...]) -> float:
    mean_rows = float(np.mean(sizes))
    alone = float(np.mean([plan.run_seconds(size, 1) for size in sizes]))
    num_requests = max(1, int(plan.knee_rows / mean_rows))
    merged = plan.run_seconds(plan.knee_rows, num_requests) / num_requests
    return alone / merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overload:
    """One run at three times the capacity."""

    played: Played
    seconds: float
    """From the first arrival to the last one."""

    capacity: float
    """Requests a second in closed loop, measured right before."""

    service: float
    """Seconds of a full bucket then: gather and execute, by the server's metrics."""

    @property
    def slo(self) -> float:
        """Seconds."""
        return _SLO_SERVICES * self.service

    @property
    def is_counted(self) -> np.ndarray:
        """[A] bool: arrived after warming up."""
        return self.played.at >= _WARM_SHARE * self.seconds

    @property
    def goodput(self) -> float:
        """Requests a second that were answered within the SLO."""
        is_good = self.is_counted & self.played.is_ok & (self.played.latencies <= self.slo)
        return float(is_good.sum()) / ((1 - _WARM_SHARE) * self.seconds)

    @property
    def accepted(self) -> np.ndarray:
        """Latencies of those that were answered, in SLOs."""
        accepted = self.played.latencies[self.is_counted & self.played.is_ok]
        if not accepted.size:
            raise RuntimeError(f"expected answers under overload, got {self.played.counts}")
        return accepted / self.slo


def overload_of(lab: Lab, served: Served, *, runs: int, seconds: float) -> list[Overload]:
    """Starts a server with a queue that suits the SLO, and loads it with three times its capacity.

    Raises:
      RuntimeError: if the generator held requests back, or one fails but by being refused.
    """
    traffic = fixed_sizes(500)
    max_queue_ms = 1e3 * _QUEUE_SERVICES * lab.plan(served).run_seconds(served.ladder.max_rows, 1)
    results = []
    with (
        lab.server(served, max_queue_ms=max_queue_ms) as ready,
        lab.generator(served, traffic, ready) as generator,
    ):
        for run in range(runs):
            means = server_means(ready["http"])
            capacity = generator.closed_loop(
                range(len(traffic.sizes)), outstanding=_OUTSTANDING, seconds=seconds / 4
            ).rate
            last = means()
            # Of a full bucket's rows, where the batcher runs them in several buckets.
            service = last.service * served.ladder.max_rows / last.rows_a_batch
            rate = _TIMES_CAPACITY * capacity
            arrivals, choices = arrivals_of(traffic, rate, round(rate * seconds), seed=run)
            at = [arrival.at for arrival in arrivals]
            played = generator.play(at, choices)
            odd = set(played.counts) - {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
            if odd:
                raise RuntimeError(f"expected answers and refusals, got {played.counts}")
            results.append(Overload(played=played, seconds=at[-1], capacity=capacity, service=service))
    return results


def overload_figures(suffix: str, runs: list[Overload], *, target: float, how: str) -> list[Figure]:
    """Goodput over capacity, and p99 of the accepted over the SLO."""
    counts = sum((run.played.counts for run in runs), Counter[str]())
    lags = [float(np.nanquantile(run.played.lags, 0.99)) for run in runs]
    beside = {
        "status codes": ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
        "capacity and goodput, requests/s": f"{statistics.median(run.capacity for run in runs):.1f} and "
        f"{statistics.median(run.goodput for run in runs):.1f}",
        "SLO, ms": f"{1e3 * statistics.median(run.slo for run in runs):.2f}",
        "generator, p99 late": f"{1e3 * statistics.median(lags):.2f} ms",
    }
    text = (
        f"{how}; 500 candidates a request, Poisson arrivals at {_TIMES_CAPACITY} times the capacity (closed "
        f"loop of {_OUTSTANDING}, measured before each of {len(runs)} runs), max_queue_ms {_QUEUE_SERVICES} "
        f"and SLO {_SLO_SERVICES} times the service time (gather and execute) of a full bucket; the first "
        f"{_WARM_SHARE:.0%} of a run not counted"
    )
    goodput = ratio_figure(
        f"overload_goodput{suffix}",
        [run.goodput for run in runs],
        [run.capacity for run in runs],
        target=target,
        goal=Goal.AT_LEAST,
        how=f"{text}: answers within the SLO a second over the capacity",
        beside=beside,
    )
    p99 = quantile_figure(
        f"overload_p99{suffix}",
        [run.accepted for run in runs],
        [np.ones(1)] * len(runs),
        target=1,
        goal=Goal.AT_MOST,
        how=f"{text}: p99 of the answered over the SLO",
    )
    return [goodput, p99]
