"""How local a trace is, in the terms that published traces are described in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec import Ragged

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
    def of(cls, ids_of_tables: Sequence[np.ndarray | Ragged]) -> TraceStatistics:
        """Counts a trace.

        Args:
          ids_of_tables: for each table [V] integers >= 0, the rows that are read, or its bags as `read_trace`
            gives them.

        Raises:
          ConfigError: for anything else; names the table by its place.
        """
        ids = [_ids(place, ids) for place, ids in enumerate(ids_of_tables)]
        counts = np.concatenate([np.empty(0, np.int64), *map(_counts, ids)])
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


def _ids(place: int, ids: Any) -> np.ndarray:
    """[V] int64, checked."""
    try:
        array = np.asarray(ids.values if isinstance(ids, Ragged) else ids)
    except (TypeError, ValueError, OverflowError):
        array = np.asarray(None)
    if array.ndim == 1 and not array.size:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"trace of table {place}: expected integers of shape [V] or a Ragged of them, got {array.dtype} "
            f"of shape {list(array.shape)}"
        )
    if array.min() < 0 or array.max() >= 2**63:
        outside = array.min() if array.min() < 0 else array.max()
        raise ConfigError(f"trace of table {place}: expected ids in [0, 2**63), got {outside}")
    return array.astype(np.int64, copy=False)


def _counts(ids: np.ndarray) -> np.ndarray:
    """How often each distinct id comes, in no order."""
    if ids.size and ids.max() < 4 * ids.size:
        counts = np.bincount(ids)  # many times faster than sorting
        return counts[counts > 0]
    return np.unique(ids, return_counts=True)[1]


def _shares(amounts: np.ndarray) -> tuple[float, ...]:
    return tuple((amounts / max(1, amounts.sum())).tolist())
