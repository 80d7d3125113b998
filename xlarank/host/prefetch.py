"""How far in front of a lookup to prefetch: measured on the tables at load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from xlarank.host._extension import native
from xlarank.host.plan import native_table
from xlarank.host.tables import HostTable
from xlarank.spec import RowFormat

__all__ = ["DEFAULT_LINES", "DISTANCES", "fastest", "measure_lines_ahead"]

DEFAULT_LINES = 64
"""Distance in cache lines where none is measured; never far from the best on machines seen so far."""

DISTANCES = (0, 8, 16, 32, 64, 128)
"""Distances in cache lines that are measured."""

_BUDGET_S = 0.006
_MIN_ROUNDS = 4
_MIN_BYTES = 1 << 25
"""A smaller table lives in the caches, where the distance decides nothing."""

_MIN_GAIN = 0.1
"""The default stays unless another distance is faster by this share: less is noise, and decides nothing."""

_IDS_A_BAG = 16
_BAGS = 64


def measure_lines_ahead(tables: Mapping[str, HostTable]) -> dict[str, int]:
    """The distance for each table by name, in lines; equal formats and row sizes share one measurement.

    Takes some milliseconds for each of those, in this thread. Pages of a mapped file that aren't in memory
    are so slow that nothing is learnt in this time: the default then.
    """
    largest: dict[tuple[RowFormat, int], HostTable] = {}
    for table in tables.values():
        kind = (table.format, table.rows.shape[1])
        if kind not in largest or table.num_rows > largest[kind].num_rows:
            largest[kind] = table
    chosen = {kind: _measure(table) for kind, table in largest.items()}
    return {name: chosen[table.format, table.rows.shape[1]] for name, table in tables.items()}


def fastest(
    work: Callable[[int], object],
    distances: Sequence[int],
    *,
    budget_s: float,
    min_gain: float = _MIN_GAIN,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The distance at which `work` takes the least time, by medians of rounds through all distances.

    Args:
      work: called with a distance.
      distances: lines, `DEFAULT_LINES` among them.
      budget_s: seconds; the round that passes it is the last.
      min_gain: the default stays unless another is faster by this share.
      clock: seconds.

    Returns:
      One of `distances`; the default if the budget holds too few rounds, or none is clearly faster.
    """
    samples: dict[int, list[float]] = {distance: [] for distance in distances}
    begin = now = clock()
    while now - begin < budget_s:
        for distance in distances:
            work(distance)
            then, now = now, clock()
            samples[distance].append(now - then)
    if len(samples[DEFAULT_LINES]) < _MIN_ROUNDS:
        return DEFAULT_LINES
    medians = {distance: statistics.median(taken) for distance, taken in samples.items()}
    best = min(medians, key=lambda distance: medians[distance])
    return best if medians[best] < (1 - min_gain) * medians[DEFAULT_LINES] else DEFAULT_LINES


def _measure(table: HostTable) -> int:
    assert native is not None
    if table.rows.nbytes < _MIN_BYTES:
        return DEFAULT_LINES
    pool_rows = native.pool_rows
    rng = np.random.default_rng(0)
    out = np.empty((_BAGS, table.dim), np.float32)
    forms = {distance: native_table(table, distance) for distance in DISTANCES}

    def work(distance: int) -> None:
        ids = rng.integers(table.num_rows, size=_BAGS * _IDS_A_BAG, dtype=np.int32)
        pool_rows(forms[distance], ids, _IDS_A_BAG, out, "auto")

    return fastest(work, DISTANCES, budget_s=_BUDGET_S)
