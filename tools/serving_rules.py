"""Rules compared: `vs_fixed_delay` (Triton's batching), `affinity_throughput` and `affinity_p99` (spreading).

Mostly simulated, by the server's own scheduler with times that a server measured; where a server can be had
with the other rule, it is compared too.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from figures import Figure, Goal
from open_loop import LoadGenerator
from queue_server import OURS, batcher_of
from serving_lab import (
    HUGE_QUEUE,
    Lab,
    Served,
    arrivals_of,
    fixed_sizes,
    mixed_sizes,
    run_simulation,
)

from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.simulation import Arrival

__all__ = ["LOADS", "RULES", "Curves", "affinity", "serve_rules", "simulate_rules", "vs_fixed_delay"]

RULES = (OURS, "500", "5000")
"""Ours, and Triton's with a delay of so many microseconds."""

LOADS = (0.1, 0.5, 0.8, 0.95)
_PLOTTED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_QUANTILES = (0.5, 0.99)
_SCHEDULES = 3
"""Of arrivals: one has few busy times, and at 95% load they are its p99."""

_SERVED_LOAD = 0.5
_TRAFFIC = mixed_sizes()
_OUTSTANDING = 16
_CLOSED_SECONDS = 0.5

_NUM_DEVICES = 4
_SLO_SERVICES = 5
_STEPS = 8
"""Halvings of the range of loads that is searched."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """Latencies of one model by rule and load."""

    model: str
    seconds: dict[str, dict[float, list[dict[float, float]]]]
    """By rule, load, schedule of arrivals (alike for all rules) and quantile."""

    num_requests: int
    """Of a schedule."""

    def latency(self, rule: str, load: float, quantile: float) -> float:
        """Seconds: the median of all schedules."""
        return statistics.median(run[quantile] for run in self.seconds[rule][load])

    def ratio(self, rule: str, load: float, quantile: float = 0.99) -> float:
        """A rule's latency over ours: the median of all schedules."""
        pairs = zip(self.seconds[rule][load], self.seconds[OURS][load], strict=True)
        return statistics.median(theirs[quantile] / ours[quantile] for theirs, ours in pairs)


def simulate_rules(served: Served, plan: BucketPlan, num_requests: int, *, is_plotted: bool) -> Curves:
    """Every rule at every load, with the same arrivals.

    Args:
      served: the model.
      plan: its measured prices.
      num_requests: of each load of the figure, in several schedules.
      is_plotted: whether the loads between those of the figure are wanted too.
    """
    capacity, num_arrivals = _capacity(plan, num_requests), num_requests // _SCHEDULES
    seconds: dict[str, dict[float, list[dict[float, float]]]] = {rule: {} for rule in RULES}
    for load in _PLOTTED if is_plotted else LOADS:
        for rule in RULES:
            seconds[rule][load] = []
        for seed in range(_SCHEDULES if load in LOADS else 1):
            arrivals, _ = arrivals_of(_TRAFFIC, load * capacity, num_arrivals, seed=seed)
            for rule in RULES:
                result = run_simulation(plan, arrivals, make_batcher=batcher_of(rule))
                seconds[rule][load].append({q: result.latency(q) for q in _QUANTILES})
    return Curves(served.words, seconds, num_arrivals)


def serve_rules(
    lab: Lab, served: Served, *, rounds: int, turns: int, seconds: float
) -> dict[str, list[np.ndarray]]:
    """Servers with each rule take turns at the same arrivals; latencies by rule and turn.

    Many short turns, of servers that are started anew each round: what else the machine does moves a turn's
    p99 by a factor of two, and two servers of one rule differ by a tenth.

    Raises:
      RuntimeError: if a request isn't answered.
    """
    latencies: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    for number in range(rounds):
        seeds = range(number * turns, (number + 1) * turns)
        with ExitStack() as stack:
            generators = {}
            for rule in RULES:
                server = lab.server(served, rule=rule, **HUGE_QUEUE)
                generator = lab.generator(served, _TRAFFIC, stack.enter_context(server))
                generators[rule] = stack.enter_context(generator)
            for generator in generators.values():  # each is warmed up
                _capacity_of(generator)
            for seed in seeds:
                # Who plays right after its capacity was measured is at a disadvantage: each in its turn.
                order = [*RULES[seed % len(RULES) :], *RULES[: seed % len(RULES)]]
                rate = _SERVED_LOAD * _capacity_of(generators[order[0]])
                arrivals, chosen = arrivals_of(_TRAFFIC, rate, max(50, round(rate * seconds)), seed=seed)
                for rule in order:
                    played = generators[rule].play([arrival.at for arrival in arrivals], chosen)
                    if not played.is_ok.all():
                        raise RuntimeError(f"expected every request to be answered, got {played.counts}")
                    latencies[rule].append(played.answered)
    return latencies


def _capacity_of(generator: LoadGenerator) -> float:
    """Requests a second in closed loop."""
    return generator.closed_loop(
        range(len(_TRAFFIC.sizes)),
        outstanding=_OUTSTANDING,
        seconds=_CLOSED_SECONDS,
        warm_seconds=_CLOSED_SECONDS / 2,
    ).rate


def vs_fixed_delay(
    curves: Sequence[Curves], light: Served, served: dict[str, list[np.ndarray]], *, how: str
) -> Figure:
    """Triton's p99 over ours, the worst of all."""
    ratios, beside = [], {}
    for curve in curves:
        for rule in RULES[1:]:
            mine = {load: curve.ratio(rule, load) for load in LOADS}
            ratios += list(mine.values())
            medians = ", ".join(f"{curve.ratio(rule, load, 0.5):.3f}" for load in LOADS)
            beside[f"{curve.model}, {rule} us, simulated"] = (
                ", ".join(f"{load:.0%} {ratio:.3f}" for load, ratio in mine.items()) + f"; p50 {medians}"
            )
    of_turns = {
        rule: {q: np.array([np.quantile(turn, q) for turn in turns]) for q in _QUANTILES}
        for rule, turns in served.items()
    }
    pooled = {rule: np.quantile(np.concatenate(turns), 0.99) for rule, turns in served.items()}
    ours_ms = 1e3 * np.median(of_turns[OURS][0.99])
    for rule in RULES[1:]:
        by_quantile = {q: float(np.median(of_turns[rule][q] / of_turns[OURS][q])) for q in _QUANTILES}
        ratios.append(by_quantile[0.99])
        beside[f"{light.words}, {rule} us, served at {_SERVED_LOAD:.0%}"] = (
            f"{by_quantile[0.99]:.3f}; p50 {by_quantile[0.5]:.3f}; our p99 {ours_ms:.2f} ms; of the requests "
            f"of all turns together {pooled[rule] / pooled[OURS]:.3f}"
        )
    counts = list(map(len, served[OURS]))
    beside["requests of a rule"] = (
        f"simulated {', '.join(f'{_SCHEDULES} x {curve.num_requests}' for curve in curves)} at a load; "
        f"served {sum(counts)}: {', '.join(map(str, counts))}"
    )
    return Figure(
        figure="vs_fixed_delay",
        value=min(ratios),
        target=1,
        goal=Goal.AT_LEAST,
        spread=(min(ratios), max(ratios)),
        how=f"{how}; {_TRAFFIC.words}; p99 of Triton's rule (max_queue_delay 500 us and 5 ms, preferred size "
        f"the largest bucket) over ours: the worst (spread: the best) of {_percents(LOADS)} of our capacity, "
        f"both models, simulated with the measured profiles (median of {_SCHEDULES} schedules "
        f"of arrivals), and of {_SERVED_LOAD:.0%} of the first one's own capacity served (light model; "
        f"{len(served[OURS])} turns, same arrivals, median of ratios)",
        beside=beside,
    )


def affinity(models: Sequence[tuple[Served, BucketPlan]], num_requests: int, *, how: str) -> list[Figure]:
    """What keeping a request on one device gains over spreading it, on four devices."""
    rates, tails, beside = [], [], {}
    for served, plan in models:
        slo = _SLO_SERVICES * plan.run_seconds(plan.ladder.max_rows, 1)
        highest = {
            policy: _highest_load(plan, policy, slo, num_requests) for policy in ("affinity", "spread")
        }
        p99 = {policy: _p99(plan, policy, highest["spread"], num_requests) for policy in highest}
        rates.append(highest["affinity"] / highest["spread"])
        tails.append(p99["affinity"] / p99["spread"])
        beside[served.words] = (
            f"SLO {1e3 * slo:.2f} ms; highest load by affinity {highest['affinity']:.2f}, by spread "
            f"{highest['spread']:.2f}; p99 at the latter {1e3 * p99['affinity']:.2f} and "
            f"{1e3 * p99['spread']:.2f} ms"
        )
    text = (
        f"{how}; simulated: {_NUM_DEVICES} devices with the measured profile, 500 candidates a request, "
        f"Poisson, {num_requests} requests a load, p99 within {_SLO_SERVICES} times the service time of a "
        f"full bucket; affinity over spread (equal parts to every device); heavy model (spread: both models)"
    )
    common: dict[str, Any] = {"beside": beside}
    return [
        Figure(
            figure="affinity_throughput",
            value=rates[0],
            target=1,
            goal=Goal.AT_LEAST,
            spread=(min(rates), max(rates)),
            how=f"{text}: highest load that meets it (Snap reports 1.29)",
            **common,
        ),
        Figure(
            figure="affinity_p99",
            value=tails[0],
            target=1,
            goal=Goal.AT_MOST,
            spread=(min(tails), max(tails)),
            how=f"{text}: p99 at the highest load by which spread meets it (Snap reports 0.5)",
        ),
    ]


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def _highest_load(plan: BucketPlan, policy: str, slo: float, num_requests: int) -> float:
    """Share of what the devices could do if each request ran alone on one."""
    low, high = 0.0, 1.25
    for _ in range(_STEPS):
        load = (low + high) / 2
        low, high = (load, high) if _p99(plan, policy, load, num_requests) <= slo else (low, load)
    if not low:
        raise RuntimeError(f"policy {policy}: no load has a p99 of at most {slo} s")
    return low


def _p99(plan: BucketPlan, policy: str, load: float, num_requests: int) -> float:
    traffic = fixed_sizes(500)
    rate = load * _NUM_DEVICES / plan.seconds(traffic.sizes[0])
    arrivals, _ = arrivals_of(traffic, rate, num_requests, seed=2)
    result = run_simulation(plan, arrivals, num_devices=_NUM_DEVICES, policy=policy)
    return result.latency(0.99) if result.is_answered.all() else math.inf


def _capacity(plan: BucketPlan, num_requests: int) -> float:
    """Requests a second that our rule does when there are always enough."""
    rng = np.random.default_rng(0)
    sizes = rng.choice(np.array(_TRAFFIC.sizes), num_requests)
    result = run_simulation(plan, [Arrival(0.0, int(size)) for size in sizes], max_skip_ms=0)
    return result.requests_a_second
