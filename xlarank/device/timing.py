"""Measures service times on the device that will serve."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

from xlarank.device.buffers import BatchBuffers
from xlarank.device.pace import Pace, at_once
from xlarank.device.replay import GoldenReplay
from xlarank.device.replica import Replica
from xlarank.spec import Bucket, LatencyProfile

__all__ = ["measure_profile", "time_in_turns"]

Key = TypeVar("Key", bound=Hashable)

_MIN_RUNS, _MAX_RUNS = 3, 7
_BUDGET_SECONDS = 0.1


def measure_profile(
    replica: Replica,
    golden: GoldenReplay,
    buffers: BatchBuffers,
    *,
    on_bucket: Callable[[Bucket], None] | None = None,
    pace: Pace = at_once,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyProfile:
    """Times every bucket: the median of 3 runs, or of up to 7 within 0.1 s, after one that is not counted.

    Args:
      replica: what is timed.
      golden: fills the batches.
      buffers: written and read here.
      on_bucket: called after each bucket, for progress.
      pace: makes each run.
      clock: seconds, monotonic.
    """

    def seconds_of(bucket: Bucket, leaves: Mapping[str, np.ndarray]) -> float:
        start = clock()
        replica.run(bucket, leaves)
        return clock() - start

    seconds: dict[Bucket, float] = {}
    for bucket in replica.executables:
        leaves = buffers.leaves(bucket)
        golden.fill(leaves, bucket, bucket.rows)
        timed = functools.partial(seconds_of, bucket, leaves)
        pace(timed)
        runs: list[float] = []
        while len(runs) < _MIN_RUNS or (len(runs) < _MAX_RUNS and sum(runs) < _BUDGET_SECONDS):
            runs.append(pace(timed))
        seconds[bucket] = max(statistics.median(runs), 1e-9)
        if on_bucket is not None:
            on_bucket(bucket)
    return LatencyProfile(seconds)


_MIN_ROUNDS = 7
_MAX_ROUNDS = 31


def time_in_turns(
    runs: Mapping[Key, Callable[[], object]],
    *,
    budget_seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Times several things by running each once a round, after one round that is not counted.

    Args:
      runs: what to call, by name.
      budget_seconds: rounds go on for about this long, but for 7 at least and 31 at most.
      clock: seconds, monotonic.

    Returns:
      Seconds by name, equally many of each; neighbours in time stand at the same place.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    begin = clock()
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and clock() - begin > budget_seconds:
            break
        for key, run in runs.items():
            start = clock()
            run()
            seconds[key].append(max(clock() - start, 1e-9))
    return seconds
