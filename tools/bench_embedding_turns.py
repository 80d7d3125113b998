"""Pooled lookups in turns: one process, one shape of tables, every pooling and hotness asked for.

    python tools/bench_embedding_turns.py 8x2Mx64 ours torch --poolings 1,20 --hotness random --seconds 2

They take turns in bursts of calls, on batches that no cache still holds. The first half of a burst isn't
timed: it wakes the threads and, on a virtual machine, brings back to the cache what translates the addresses
of the tables, megabytes of it. OpenMP's threads, torch's and fbgemm's, sleep when they wait: spinning they
would win 10% on an idle machine and lose many times that where another process wants a core. One thread is
measured in its CPU time, which other programs disturb least; more in wall time.

The last line of the output is a JSON list of cells: ``pooling``, ``hotness``, ``num_rows`` looked up a call
and, by lookup, ``ms``: milliseconds a call of each burst, neighbours in time at the same place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from embedding_lookups import LOOKUPS, NUM_BAGS, NUM_THREADS, SHAPES, Lookup, Shape, draw_ids

from xlarank.host.traces import Hotness

__all__ = ["measure"]

_BYTES_OF_BATCHES = 256 << 20
"""Of the rows that all batches of a cell read: many times what caches hold, if they differ."""

_MIN_BATCHES = 8
_BURST_S = 0.08
"""Of which the second half is timed."""

_MIN_TURNS = 3


def measure(
    shape: Shape,
    names: list[str],
    poolings: list[int],
    presets: list[Hotness],
    seconds: float,
    num_threads: int = NUM_THREADS,
) -> list[dict[str, Any]]:
    """Times lookups in turns.

    Args:
      shape: of the tables.
      names: of `LOOKUPS`.
      poolings: P, ids a bag.
      presets: how uneven the ids are.
      seconds: a cell, set-up not counted.
      num_threads: of each lookup; 1 is measured in CPU time.

    Returns:
      The cells, see the top of this file.

    Raises:
      AssertionError: if a lookup gives other vectors than the first.
    """
    num_batches = {pooling: _num_batches(shape, pooling) for pooling in poolings}
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    cells = []
    for hotness in presets:
        drawn = draw_ids(shape, hotness, max(n * NUM_BAGS * pooling for pooling, n in num_batches.items()))
        for pooling, num in num_batches.items():
            ids = drawn[:, : num * NUM_BAGS * pooling].reshape(shape.num_tables, num, NUM_BAGS, pooling)
            ids = np.ascontiguousarray(ids.swapaxes(0, 1))
            lookups = {name: LOOKUPS[name](shape, ids, num_threads) for name in names}
            _check(lookups, shape, pooling)
            cells.append(
                {
                    "pooling": pooling,
                    "hotness": hotness.value,
                    "num_rows": ids[0].size,
                    "ms": _take_turns(lookups, num, seconds, clock),
                }
            )
    return cells


def _num_batches(shape: Shape, pooling: int) -> int:
    bytes_a_batch = shape.num_tables * NUM_BAGS * pooling * shape.row_bytes
    return max(_MIN_BATCHES, -(-_BYTES_OF_BATCHES // bytes_a_batch))


def _take_turns(
    lookups: dict[str, Lookup], num_batches: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in lookups}
    deadline = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < deadline or turn < _MIN_TURNS:
        for place, (name, look_up) in enumerate(lookups.items()):
            # Apart by batches, so that none finds its rows in the cache of another.
            first = turn + place * num_batches // len(lookups)
            batches = itertools.cycle((first + step) % num_batches for step in range(num_batches))
            _burst(look_up, batches, clock)
            samples[name].append(1e3 * _burst(look_up, batches, clock))
        turn += 1
    return samples


def _burst(look_up: Lookup, batches: Iterator[int], clock: Callable[[], float]) -> float:
    """Seconds a call, of calls for half a burst and at least one."""
    begin = clock()
    for number in itertools.count(1):
        look_up(next(batches))
        elapsed = clock() - begin
        if elapsed >= _BURST_S / 2:
            return elapsed / number
    raise AssertionError("unreachable")


def _check(lookups: dict[str, Lookup], shape: Shape, pooling: int) -> None:
    """The same vectors from all, rows of few bits as close as they can be: values here lie within 5 of 0."""
    expected = None
    for name, look_up in lookups.items():
        found = look_up(1)
        if found is None:
            continue  # reads rows and pools nothing
        tables = found if isinstance(found, list) else [found]
        found = np.concatenate([np.asarray(table) for table in tables], axis=1)
        expected = found.copy() if expected is None else expected
        both = {*name.split("_"), *next(iter(lookups)).split("_")}
        step = 0.7 if "int4" in both else 0.05 if "int8" in both else 1e-5
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=step * pooling, err_msg=name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("lookups", nargs="+", choices=list(LOOKUPS), metavar="lookup")
    parser.add_argument("--poolings", default="1,20,150", help="ids a bag (%(default)s)")
    parser.add_argument("--hotness", default=",".join(h.value for h in Hotness), help="presets (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="a cell (%(default)s)")
    parser.add_argument("--threads", type=int, default=NUM_THREADS, help="of each lookup (%(default)s)")
    args = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is imported
    poolings = [int(word) for word in args.poolings.split(",")]
    presets = [Hotness(word) for word in args.hotness.split(",")]
    cells = measure(SHAPES[args.shape], args.lookups, poolings, presets, args.seconds, args.threads)
    for cell in cells:
        medians = {name: statistics.median(samples) for name, samples in cell["ms"].items()}
        shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items())
        print(f"pooling {cell['pooling']}, {cell['hotness']}: {shown}")
    print(json.dumps(cells))


if __name__ == "__main__":
    main()
