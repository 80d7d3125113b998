"""Latency figures of the serving benchmark: one device, 500 candidates a request, Poisson arrivals.

`p99_over_md1` holds the server to the queue that it is at best, `simulator_error` holds `xlarank simulate` to
the server. Both are of the same runs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from figures import Figure, Goal, ratio_figure
from open_loop import Played
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

__all__ = ["LOADS", "Point", "measure_points", "p99_over_md1", "simulator_error"]

LOADS = (0.3, 0.6, 0.7, 0.8)

_MD1_LOAD = 0.7
_SIMULATED_LOADS = (0.3, 0.6, 0.8)
_OUTSTANDING = 3
_MIN_REQUESTS = 20
_TRAFFIC = fixed_sizes(500)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run at one load."""

    load: float
    """Of the capacity in closed loop, measured right before."""

    capacity: float
    """Requests a second."""

    played: Played
    means: ServerMeans
    """The server's own, of this run."""

    md1: dict[float, float]
    """Seconds by quantile of an M/D/1 queue with these arrivals, served in 1 / capacity."""

    simulated_mean: float
    """Seconds, by the simulator with the server's profile and these arrivals."""

    @property
    def mean(self) -> float:
        """Seconds, as served."""
        return float(self.played.answered.mean())


def measure_points(
    lab: Lab, served: Served, *, runs: int, seconds: float, loads: Sequence[float] = LOADS
) -> list[Point]:
    """Starts a server and loads it, `runs` times at each load, capacity measured before each run.

    Raises:
      RuntimeError: if a request isn't answered.
    """
    points = []
    with (
        lab.server(served, **HUGE_QUEUE) as ready,
        lab.generator(served, _TRAFFIC, ready) as generator,
    ):
        plan = lab.plan(served)
        for run in range(runs):
            for load in loads if run % 2 == 0 else reversed(loads):
                capacity = generator.closed_loop(
                    range(len(_TRAFFIC.sizes)), outstanding=_OUTSTANDING, seconds=max(1.0, seconds / 8)
                ).rate
                rate = load * capacity
                arrivals, choices = arrivals_of(
                    _TRAFFIC, rate, max(_MIN_REQUESTS, round(rate * seconds)), seed=run
                )
                at = [arrival.at for arrival in arrivals]
                means = server_means(ready["http"])
                played = generator.play(at, choices, timeout=60)
                if not played.is_ok.all():
                    raise RuntimeError(f"expected every request to be answered, got {played.counts}")
                md1 = md1_latencies(at, 1 / capacity)
                points.append(
                    Point(
                        load=load,
                        capacity=capacity,
                        played=played,
                        means=means(),
                        md1={q: float(np.quantile(md1, q)) for q in (0.5, 0.99)},
                        simulated_mean=run_simulation(plan, arrivals).mean_latency,
                    )
                )
    return points


def p99_over_md1(heavy: Sequence[Point], light: Sequence[Point], *, how: str) -> Figure:
    """Of the heavy model; beside it the light one, where generator and gRPC take a good part of the cores."""

    def ratio(points: Iterable[Point], quantile: float) -> Figure:
        chosen = [point for point in points if point.load == _MD1_LOAD]
        return ratio_figure(
            "p99_over_md1",
            [point.played.latency(quantile) for point in chosen],
            [point.md1[quantile] for point in chosen],
            target=1.3,
            goal=Goal.AT_MOST,
            how=f"{how}; {_MD1_LOAD:.0%} of the capacity in closed loop of {_OUTSTANDING}, measured before "
            f"each of {len(chosen)} runs; over an M/D/1 queue with the same arrivals, served in 1 / capacity",
        )

    beside = {"p50": f"{ratio(heavy, 0.5).value:.3f}"}
    beside |= {f"light model, p{q * 100:.0f}": f"{ratio(light, q).value:.3f}" for q in (0.5, 0.99)}
    for name, points in (("heavy", heavy), ("light", light)):
        beside[f"{name} model, medians"] = _stages([p for p in points if p.load == _MD1_LOAD])
    return dataclasses.replace(ratio(heavy, 0.99), beside=beside)


def simulator_error(heavy: Sequence[Point], light: Sequence[Point], *, how: str) -> Figure:
    """How far the simulated mean is off, at the worst load of the heavy model."""
    off, beside = {}, {}
    for name, points in (("heavy", heavy), ("light", light)):
        for load in _SIMULATED_LOADS:
            chosen = [point for point in points if point.load == load]
            ratio = statistics.median(point.simulated_mean / point.mean for point in chosen)
            off[name, load] = abs(ratio - 1)
            simulated, served = (
                1e3 * statistics.median(values)
                for values in ([p.simulated_mean for p in chosen], [p.mean for p in chosen])
            )
            beside[f"{name} model at {load:.0%}"] = (
                f"simulated {simulated:.2f} ms, served {served:.2f} ms: {ratio - 1:+.1%}; {_stages(chosen)}"
            )
    errors = [error for (name, _), error in off.items() if name == "heavy"]
    return Figure(
        figure="simulator_error",
        value=max(errors),
        target=0.25,
        goal=Goal.AT_MOST,
        spread=(min(errors), max(errors)),
        how=f"{how}; mean latency of the simulator, with the profile that the server measured at its start "
        f"and the arrivals of the run, over the served one: how far from 1, the worst of "
        f"{', '.join(f'{load:.0%}' for load in _SIMULATED_LOADS)} load (spread: over loads), medians of runs",
        beside=beside,
    )


def _stages(points: Sequence[Point]) -> str:
    def median_ms(pick: str) -> float:
        return 1e3 * statistics.median(getattr(point.means, pick) for point in points)

    outside = 1e3 * statistics.median(point.mean - point.means.total for point in points)
    stages = ", ".join(f"{name} {median_ms(name):.2f}" for name in ("queue", "gather", "execute", "respond"))
    lag = 1e3 * statistics.median(float(np.quantile(point.played.lags, 0.99)) for point in points)
    capacity = statistics.median(point.capacity for point in points)
    return (
        f"{1e3 / capacity:.2f} ms at capacity; means in ms: {stages}, outside of the engine {outside:.2f}; "
        f"generator p99 late {lag:.2f}"
    )
