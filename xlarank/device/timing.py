"""Measures service times on the device that will serve."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from xlarank.device.buffers import BatchBuffers
from xlarank.device.replay import GoldenReplay
from xlarank.device.replica import Replica
from xlarank.spec import Bucket, LatencyProfile

__all__ = ["measure_profile"]

_MAX_RUNS = 7
_BUDGET_SECONDS = 0.1


def measure_profile(
    replica: Replica,
    golden: GoldenReplay,
    buffers: BatchBuffers,
    *,
    on_bucket: Callable[[Bucket], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyProfile:
    """Times every bucket: the median of up to 7 runs or 0.1 s, after one that is not counted.

    Args:
      replica: what is timed.
      golden: fills the batches.
      buffers: written and read here.
      on_bucket: called after each bucket, for progress.
      clock: seconds, monotonic.
    """
    seconds: dict[Bucket, float] = {}
    for bucket in replica.executables:
        leaves = buffers.leaves(bucket)
        golden.fill(leaves, bucket, bucket.rows)
        replica.run(bucket, leaves)
        runs: list[float] = []
        while len(runs) < _MAX_RUNS and sum(runs) < _BUDGET_SECONDS:
            start = clock()
            replica.run(bucket, leaves)
            runs.append(clock() - start)
        seconds[bucket] = max(statistics.median(runs), 1e-9)
        if on_bucket is not None:
            on_bucket(bucket)
    return LatencyProfile(seconds)
