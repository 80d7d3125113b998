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

    They take turns, so that a spell in which the machine is slower isn't in the times of one bucket alone:
    what the batcher decides by is how they compare.

    Args:
      replica: what is timed.
      golden: fills the batches.
      buffers: written and read here.
      on_bucket: called after each bucket's last run, for progress.
      pace: makes each run.
      clock: seconds, monotonic.
    """

    def seconds_of(bucket: Bucket, leaves: Mapping[str, np.ndarray]) -> float:
        start = clock()
        replica.run(bucket, leaves)
        return clock() - start

    def timed(bucket: Bucket) -> float:
        leaves = buffers.leaves(bucket)
        golden.fill(leaves, bucket, bucket.rows)
        return pace(functools.partial(seconds_of, bucket, leaves))

    runs: dict[Bucket, list[float]] = {bucket: [] for bucket in replica.executables}
    for bucket in runs:
        timed(bucket)
    left = list(runs)
    while left:
        for bucket in left:
            runs[bucket].append(timed(bucket))
        done = [
            bucket
            for bucket in left
            if len(runs[bucket]) >= _MAX_RUNS
            or (len(runs[bucket]) >= _MIN_RUNS and sum(runs[bucket]) >= _BUDGET_SECONDS)
        ]
        left = [bucket for bucket in left if bucket not in done]
        if on_bucket is not None:
            for bucket in done:
                on_bucket(bucket)
    return LatencyProfile({bucket: max(statistics.median(taken), 1e-9) for bucket, taken in runs.items()})


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
