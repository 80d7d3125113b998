"""Latency figures of the serving benchmark: one device, 500 candidates a request, Poisson arrivals.

`p99_over_md1` holds the server to the queue that it is at best, `simulator_error` holds `xlarank simulate` to
the server, as a user would who has a bundle and saw how much the server does in closed loop, and how fast a
request is alone; what is predicted comes after it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from figures import Figure, Goal, quantile_figure
from open_loop import LoadGenerator, Played
from serving_lab import (
    HUGE_QUEUE,
    Lab,
    Served,
    ServerMeans,
    arrivals_of,
    fixed_sizes,
    md1_latencies,
    run_simulation,
    server_means,
)

from xlarank.cli.server_pace import ServerPace, observed_pace
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.spec import QueueConfig

__all__ = ["MD1_LOADS", "SIMULATED_LOADS", "Point", "measure_points", "p99_over_md1", "simulator_error"]

MD1_LOADS = (0.7,)
SIMULATED_LOADS = (0.3, 0.6, 0.8)

_OUTSTANDING = 3
_MIN_REQUESTS = 20

_ALONE_SERVICES = 3
"""From one request to the next, where each is to be alone. Not back to back: pauses are what traffic has, and
cores and timers that have slept take their time."""

_MIN_ALONE = 10

_SATURATING = 16
"""Times the traffic's requests, of a simulated server that is never idle."""

_TRAFFIC = fixed_sizes(500)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run at one load."""

    load: float
    """Of the capacity right before."""

    capacity: float
    """Requests a second in closed loop, measured right before and after: the machine's speed changes."""

    alone: float
    """Seconds of a request that comes when nothing else is there, measured right before."""

    played: Played
    means: ServerMeans
    """The server's own, of this run."""

    md1: np.ndarray
    """[A] seconds in an M/D/1 queue with these arrivals, served in 1 / capacity."""

    pace: ServerPace
    """What capacity and lone requests say."""

    simulated_mean: float
    """Seconds, by the simulator with the bundle's profile, the pace and these arrivals."""

    idle_mean: float
    """The same without the pace."""

    @property
    def mean(self) -> float:
        """Seconds, as served."""
        return float(self.played.answered.mean())


def measure_points(
    lab: Lab, served: Served, *, runs: int, seconds: float, loads: Sequence[float]
) -> list[Point]:
    """Starts a server and loads it, `runs` times at each load.

    Args:
      lab: where to work.
      served: the model.
      runs: at each load.
      seconds: of a run.
      loads: shares of what the server does in closed loop right before.

    Raises:
      RuntimeError: if a request isn't answered.
    """
    points = []
    with (
        lab.server(served, **HUGE_QUEUE) as ready,
        lab.generator(served, _TRAFFIC, ready) as generator,
    ):
        plan = BucketPlan(served.ladder, served.profile)
        for run in range(runs):
            for load in loads if run % 2 == 0 else reversed(loads):
                before = _capacity(generator, seconds)
                alone = _seconds_alone(generator, _ALONE_SERVICES / before, seconds / 4)
                rate = load * before
                arrivals, choices = arrivals_of(
                    _TRAFFIC, rate, max(_MIN_REQUESTS, round(rate * seconds)), seed=run
                )
                at = [arrival.at for arrival in arrivals]
                means = server_means(ready["http"])
                played = generator.play(at, choices, timeout=60)
                if not played.is_ok.all():
                    raise RuntimeError(f"expected every request to be answered, got {played.counts}")
                in_run = means()
                capacity = statistics.harmonic_mean([before, _capacity(generator, seconds)])
                pace = observed_pace(
                    [plan],
                    QueueConfig(**HUGE_QUEUE),
                    _TRAFFIC.sizes * _SATURATING,
                    capacity=capacity,
                    alone_seconds=alone,
                )
                points.append(
                    Point(
                        load=load,
                        capacity=capacity,
                        alone=alone,
                        played=played,
                        means=in_run,
                        md1=md1_latencies(at, 1 / capacity),
                        pace=pace,
                        simulated_mean=run_simulation(plan, arrivals, pace=pace).mean_latency,
                        idle_mean=run_simulation(plan, arrivals).mean_latency,
                    )
                )
    return points


def _capacity(generator: LoadGenerator, seconds: float) -> float:
    """Requests a second in closed loop, measured beside a run of so many seconds."""
    seconds = max(1.0, seconds / 8)
    return generator.closed_loop(range(len(_TRAFFIC.sizes)), outstanding=_OUTSTANDING, seconds=seconds).rate


def _seconds_alone(generator: LoadGenerator, spacing: float, seconds: float) -> float:
    """Mean latency of requests that come one at a time, so many seconds from one to the next."""
    count = max(_MIN_ALONE, round(seconds / spacing))
    choices = [number % len(_TRAFFIC.sizes) for number in range(count)]
    played = generator.play([number * spacing for number in range(count)], choices, timeout=60)
    return float(played.answered.mean())


def p99_over_md1(heavy: Sequence[Point], light: Sequence[Point], *, how: str) -> Figure:
    """Of the heavy model; beside it the light one, where generator and gRPC take a good part of the cores."""

    def ratio(points: Iterable[Point], quantile: float) -> Figure:
        chosen = [point for point in points if point.load == MD1_LOADS[0]]
        return quantile_figure(
            "p99_over_md1",
            [point.capacity * point.played.answered for point in chosen],  # in services
            [point.capacity * point.md1 for point in chosen],
            quantile=quantile,
            target=1.3,
            goal=Goal.AT_MOST,
            how=f"{how}; {MD1_LOADS[0]:.0%} of the capacity in closed loop of {_OUTSTANDING}, measured "
            f"before and after each of {len(chosen)} runs with the generator on the same cores; over an "
            f"M/D/1 queue with the same arrivals, served in 1 / capacity; latencies in such services",
        )

    figure = ratio(heavy, 0.99)
    beside = dict(figure.beside) | {"p50": f"{ratio(heavy, 0.5).value:.3f}"}
    for quantile in (0.5, 0.99):
        of_light = ratio(light, quantile)
        (requests,) = of_light.beside.values()
        beside[f"light model, p{quantile * 100:.0f}"] = f"{of_light.value:.3f}; requests {requests}"
    for name, points in (("heavy", heavy), ("light", light)):
        beside[f"{name} model, medians"] = _stages(points)
    return dataclasses.replace(figure, beside=beside)


def simulator_error(demo: Sequence[Point], others: Mapping[str, Sequence[Point]], *, how: str) -> Figure:
    """How far the simulated mean of the demo model is off, at the worst load; beside it other models."""
    off, beside = [], {}
    for name, points in (("demo", demo), *others.items()):
        for load in sorted({point.load for point in points}):
            chosen = [point for point in points if point.load == load]
            ratios = {
                field: statistics.median(getattr(point, field) / point.mean for point in chosen)
                for field in ("simulated_mean", "idle_mean")
            }
            if name == "demo":
                off.append(abs(ratios["simulated_mean"] - 1))
            simulated, served, alone, overhead = (
                1e3 * statistics.median(values)
                for values in (
                    [point.simulated_mean for point in chosen],
                    [point.mean for point in chosen],
                    [point.alone for point in chosen],
                    [point.pace.overhead_seconds for point in chosen],
                )
            )
            beside[f"{name} model at {load:.0%}"] = (
                f"simulated {simulated:.2f} ms, served {served:.2f} ms: {ratios['simulated_mean'] - 1:+.1%} "
                f"(with the bundle's times alone {ratios['idle_mean'] - 1:+.1%}); slowdown "
                f"{statistics.median(point.pace.slowdown for point in chosen):.2f}, alone {alone:.2f} ms, "
                f"overhead {overhead:.2f}; {_stages(chosen)}"
            )
    return Figure(
        figure="simulator_error",
        value=max(off),
        target=0.25,
        goal=Goal.AT_MOST,
        spread=(min(off), max(off)),
        how=f"{how}; mean latency of the simulator over the served one, with the bundle's own times, as "
        f"--capacity what the server did in closed loop of {_OUTSTANDING} right before and after, as "
        f"--alone-ms the latency of requests {_ALONE_SERVICES} services apart, and the arrivals of the run: "
        f"how far from 1, the worst of {', '.join(f'{load:.0%}' for load in SIMULATED_LOADS)} of that "
        f"capacity (spread: over loads), medians of runs",
        beside=beside,
    )


def _stages(points: Sequence[Point]) -> str:
    def median_ms(pick: str) -> float:
        return 1e3 * statistics.median(getattr(point.means, pick) for point in points)

    outside = 1e3 * statistics.median(point.mean - point.means.total for point in points)
    stages = ", ".join(f"{name} {median_ms(name):.2f}" for name in ("queue", "gather", "execute", "respond"))
    lag = 1e3 * statistics.median(float(np.quantile(point.played.lags, 0.99)) for point in points)
    capacity = statistics.median(point.capacity for point in points)
    rows = statistics.median(point.means.rows_a_batch for point in points)
    return (
        f"{1e3 / capacity:.2f} ms at capacity; means in ms: {stages}, outside of the engine {outside:.2f}; "
        f"{rows:.0f} rows a batch; generator p99 late {lag:.2f}"
    )
