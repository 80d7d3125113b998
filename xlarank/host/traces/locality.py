"""How local a trace is, in the terms that published traces are described in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["REUSE_EDGES", "TOP_ROWS", "TraceStatistics"]

TOP_ROWS = (10, 100, 1_000, 10_000, 60_000)
"""Numbers of hottest rows whose share of the accesses is told."""

REUSE_EDGES = tuple(2**power for power in range(16))
"""Upper edges of the bins of reuse: (0, 1], (1, 2], (2, 4] to (16384, 32768]; one more is for more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceStatistics:
    """Distinct rows, hot rows and reuse of a trace. Rows of different tables are different rows."""

    num_accesses: int
    """V of all tables."""

    num_unique: int
    """Distinct rows among them."""

    top_shares: Mapping[int, float]
    """By number k of `TOP_ROWS`: share of all accesses that the k hottest rows get; 0 without accesses."""

    row_shares: tuple[float, ...]
    """By bin of `REUSE_EDGES`: share of the distinct rows that are read so many times."""

    access_shares: tuple[float, ...]
    """By bin: share of the accesses that are of such rows."""

    @property
    def unique_share(self) -> float:
        """Distinct rows an access; 0 without accesses."""
        return self.num_unique / max(1, self.num_accesses)

    @classmethod
    def of(cls, ids_of_tables: Sequence[np.ndarray]) -> TraceStatistics:
        """Counts a trace.

        Args:
          ids_of_tables: for each table [V] integers >= 0, the rows that are read.
        """
        counts = np.concatenate([np.empty(0, np.int64), *map(_counts, ids_of_tables)])
        counts = np.sort(counts)[::-1]
        num_accesses = int(counts.sum())
        first = np.concatenate([[0], np.cumsum(counts)])  # first[k]: accesses of the k hottest rows
        bins = np.searchsorted(REUSE_EDGES, counts)
        num_bins = len(REUSE_EDGES) + 1
        return cls(
            num_accesses=num_accesses,
            num_unique=len(counts),
            top_shares={k: int(first[min(k, len(counts))]) / max(1, num_accesses) for k in TOP_ROWS},
            row_shares=_shares(np.bincount(bins, minlength=num_bins)),
            access_shares=_shares(np.bincount(bins, counts, num_bins)),
        )


def _counts(ids: np.ndarray) -> np.ndarray:
    """How often each distinct id comes, in no order."""
    if ids.size and ids.max() < 4 * ids.size:
        counts = np.bincount(ids)  # many times faster than sorting
        return counts[counts > 0]
    return np.unique(ids, return_counts=True)[1]


def _shares(amounts: np.ndarray) -> tuple[float, ...]:
    return tuple((amounts / max(1, amounts.sum())).tolist())
