"""Version swaps under load: `swap_p99`.

A real `xlarank serve` watches a repository at 60% of its capacity, open loop, while versions are published
into it; one schedule is of all swaps and the pauses between, each as long as the swap before it. A swap's
window is from the version's folder appearing to the version before having ended: reading, compiling, proving,
timing, swapping and draining are all in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from figures import Figure, Goal, ratio_figure
from open_loop import LoadGenerator, Played
from server_process import server_samples, serving
from serving_lab import Lab, Served, arrivals_of, fixed_sizes
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import SERVICE_NAME

__all__ = [
    "COLD",
    "REFRESH",
    "WARM",
    "Swap",
    "SwapRun",
    "measure_swaps",
    "run_swaps",
    "swap_p99",
    "wait_until_alone",
]

COLD, WARM, REFRESH = "cold", "warm", "new weights"
"""A program that nobody has compiled; one whose code is in the bundle or the cache; the one that serves."""

_LOAD = 0.6
_TRAFFIC = fixed_sizes(500)
_OUTSTANDING = 3

_WATCH_SECONDS = 0.2
_LOOK_SECONDS = 0.1
_SETTLE_SECONDS = 1.0
"""After a swap, until what it has delayed is answered: such requests are neither in it nor in the pause."""
_COMPILES = "xlarank_serving_compiles_total"
_NUM_REFRESHES = 6
"""They are short."""

_MAX_SECONDS = 120
"""Of a swap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swap:
    """From the version's folder appearing to the version before having ended, and the pause after that."""

    kind: str
    """`COLD`, `WARM` or `REFRESH`."""

    begin: float
    """On the clock of `Played.began_at`, as the next."""

    end: float
    """Of the swap."""

    pause_begin: float
    pause_end: float
    """The pause after it is as long as the swap, or longer."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class SwapRun:
    """A server's requests while versions came and went."""

    swaps: Sequence[Swap]
    played: Played
    num_compiles: int
    """Programs that were compiled in the serving process meanwhile."""

    @property
    def num_failures(self) -> int:
        """Requests without scores."""
        return int((~self.played.is_ok).sum())

    def latencies(self, begin: float, end: float) -> np.ndarray:
        """[A] seconds of the answered requests that were meant to start from one time on, before another."""
        starts = self.played.began_at + self.played.at[self.played.is_ok]
        return self.played.answered[(begin <= starts) & (starts < end)]


def measure_swaps(
    lab: Lab,
    builds: Sequence[Served],
    *,
    num_warm: int,
    num_cold: int,
    quiet_seconds: float,
    tell: Callable[[str], None],
) -> list[SwapRun]:
    """Swaps through builds of one model, each of another program.

    Args:
      lab: where to work.
      builds: the first is served at the start; at least two.
      num_warm: servers that take code from bundles.
      num_cold: servers that take none, and find no compiled code but that of the first; at least one.
      quiet_seconds: before the first swap, and at least after each.
      tell: what is being done.

    Raises:
      RuntimeError: if a version isn't served.
    """
    first, *others = builds
    warm = [*((WARM, build) for build in others), *[(REFRESH, others[-1])] * _NUM_REFRESHES, (WARM, first)]
    cold = [*((COLD, build) for build in others), (WARM, first)]
    servers = [(warm, ())] * num_warm + [(cold, ("--no-bundle-code",))] * num_cold
    runs = []
    for place, (sequence, options) in enumerate(servers):
        tell(f"swaps, server {place + 1} of {len(servers)}")
        folder = lab.folder / f"swaps-{place}"
        repository = Repository(folder / "repository", first)
        watch = ("--watch-seconds", _WATCH_SECONDS, *options)
        with (
            serving(repository.root, folder / "cache", *watch) as ready,
            lab.generator(first, _TRAFFIC, ready) as generator,
        ):
            runs.append(run_swaps(ready, generator, repository, sequence, quiet_seconds, seed=place))
    return runs


def run_swaps(
    ready: Mapping[str, Any],
    generator: LoadGenerator,
    repository: Repository,
    sequence: Sequence[tuple[str, Served]],
    quiet_seconds: float,
    *,
    seed: int,
) -> SwapRun:
    """Publishes versions one after another while a server that watches the repository is under load.

    Args:
      ready: the server's ready line.
      generator: sends it the traffic.
      repository: has the version that it serves.
      sequence: kinds of swaps, and what to publish.
      quiet_seconds: before the first swap, and at least after each: as long as it took, so that what else the
        machine does meets both alike.
      seed: of the arrivals.

    Raises:
      RuntimeError: if a version isn't served, or a request isn't answered.
    """
    capacity = generator.closed_loop(
        range(len(_TRAFFIC.sizes)), outstanding=_OUTSTANDING, seconds=max(1.0, quiet_seconds)
    ).rate
    longest = quiet_seconds + 2 * len(sequence) * _MAX_SECONDS  # load doesn't end before
    rate = _LOAD * capacity
    arrivals, choices = arrivals_of(_TRAFFIC, rate, math.ceil(rate * longest), seed=seed)
    swaps = []
    with (
        _watching(ready["grpc"], repository.model) as states,
        generator.playing([arrival.at for arrival in arrivals], choices) as played,
    ):
        _look_for(quiet_seconds, states)
        for kind, build in sequence:
            begin = time.monotonic()
            version = repository.publish(build)
            wait_until_alone(version, states)
            end = time.monotonic()
            _look_for(_SETTLE_SECONDS, states)
            pause = time.monotonic()
            _look_for(max(quiet_seconds, end - begin), states)
            swap = Swap(kind=kind, begin=begin, end=end, pause_begin=pause, pause_end=time.monotonic())
            swaps.append(swap)
    (num_compiles,) = [v for name, _, v in server_samples(ready["http"]) if name == _COMPILES]
    run = SwapRun(swaps, played[0], round(float(num_compiles)))
    if run.num_failures:
        raise RuntimeError(
            f"expected every request to be answered while versions swap, got {run.played.counts}"
        )
    return run


def swap_p99(runs: Sequence[SwapRun], *, how: str) -> Figure:
    """p99 in the windows of swaps over p99 in the pauses after them, the worst kind of swap."""
    swaps = [(run, swap) for run in runs for swap in run.swaps]
    kinds = [kind for kind in (COLD, WARM, REFRESH) if any(swap.kind == kind for _, swap in swaps)]
    text = (
        f"{how}; {_TRAFFIC.words}, Poisson arrivals at {_LOAD:.0%} of the capacity (closed loop of "
        f"{_OUTSTANDING}, measured before each of {len(runs)} runs), open loop throughout, to `xlarank serve "
        f"--watch-seconds {_WATCH_SECONDS}` on one device while versions are published; p99 of requests that "
        f"start between the version's folder appearing and the version before having ended, over p99 of "
        f"those that start in a pause {_SETTLE_SECONDS:g} s after it, at least as long; no request failed; "
        f"median of swaps (spread: 10th and 90th percentile), the worst of {', '.join(kinds)}"
    )
    figures, beside = {}, {}
    for kind in kinds:
        chosen = [(run, swap) for run, swap in swaps if swap.kind == kind]
        inside = [run.latencies(swap.begin, swap.end) for run, swap in chosen]
        after = [run.latencies(swap.pause_begin, swap.pause_end) for run, swap in chosen]
        figures[kind] = figure = ratio_figure(
            "swap_p99",
            list(map(_p99, inside)),
            list(map(_p99, after)),
            target=1.5,
            goal=Goal.AT_MOST,
            how=f"{text}: {kind}",
        )
        length = statistics.median(swap.seconds for _, swap in chosen)
        low, high = figure.spread
        pooled, pooled_after = np.concatenate(inside), np.concatenate(after)
        beside[f"{kind}, {len(chosen)} swaps of {length:.1f} s"] = (
            f"{figure.value:.3f} ({low:.3f} to {high:.3f}); all together {_words(pooled)}, after them "
            f"{_words(pooled_after)}"
        )
    num_requests = sum(len(run.played.answered) for run in runs)
    beside["failures, compiles in the server"] = (
        f"{sum(run.num_failures for run in runs)} of {num_requests} requests, "
        f"{sum(run.num_compiles for run in runs)} programs"
    )
    return dataclasses.replace(max(figures.values(), key=lambda figure: figure.value), beside=beside)


def _words(latencies: np.ndarray) -> str:
    p50, p99 = 1e3 * np.quantile(latencies, (0.5, 0.99))
    return f"p50 {p50:.2f} and p99 {p99:.2f} ms of {len(latencies)} requests"


def _p99(latencies: np.ndarray) -> float:
    return float(np.quantile(latencies, 0.99))


class Repository:
    """A folder that versions of a model are published into."""

    def __init__(self, root: Path, first: Served) -> None:
        self.root = root
        self.model = first.spec.name
        self._last = 0
        self.publish(first)

    def publish(self, build: Served) -> int:
        """Another version, there whole or not at all; returns its number."""
        self._last += 1
        beside = self.root / self.model / f".{self._last}"
        shutil.copytree(build.bundle, beside, copy_function=os.link)
        beside.rename(beside.with_name(str(self._last)))
        return self._last


States = Callable[[], dict[int, tuple[str, str]]]
"""State and reason by version."""


@contextlib.contextmanager
def _watching(address: str, model: str) -> Iterator[States]:
    """What the server says of a model's versions, cheaply: it is asked while latencies are measured."""
    with grpc.insecure_channel(address) as channel:
        index = channel.unary_unary(
            f"/{SERVICE_NAME}/RepositoryIndex",
            request_serializer=messages.RepositoryIndexRequest.SerializeToString,
            response_deserializer=messages.RepositoryIndexResponse.FromString,
        )

        def states() -> dict[int, tuple[str, str]]:
            answer = index(messages.RepositoryIndexRequest(), timeout=30)
            return {int(m.version): (m.state, m.reason) for m in answer.models if m.name == model}

        yield states


def _look_for(seconds: float, states: States) -> None:
    """Time passes in which the server is asked as often as while it swaps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states()
        time.sleep(_LOOK_SECONDS)


def wait_until_alone(version: int, states: States, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until a version answers and every other has ended.

    Args:
      version: that was published.
      states: asks the server.
      sleep: waits.

    Raises:
      RuntimeError: if that doesn't come to pass.
    """
    end = time.monotonic() + _MAX_SECONDS
    while time.monotonic() < end:
        found = states()
        state, reason = found.get(version, ("", ""))
        if state == "READY" and all(
            other == version or of_other == "UNAVAILABLE" for other, (of_other, _) in found.items()
        ):
            return
        if state == "UNAVAILABLE" and reason:
            raise RuntimeError(f"version {version} isn't served: {reason}")
        sleep(_LOOK_SECONDS)
    raise RuntimeError(f"version {version} isn't alone after {_MAX_SECONDS} s: {found}")
