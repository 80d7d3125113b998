"""Where a store gets candidates that it doesn't have: `FeatureSource`, `UpdatableSource`, `FileSource`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xlarank.host.feature_file import FeatureFile

__all__ = ["FeatureRows", "FeatureSource", "FileSource", "UpdatableSource"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRows:
    """Raw candidate features of some ids."""

    ids: np.ndarray
    """[n] int64, distinct; in an update an id may come twice, and its last row stays."""

    features: Mapping[str, Any]
    """By name, n rows each, as `RankRequest` takes them."""


class FeatureSource(Protocol):
    """What a cache of candidate features stands in front of."""

    def fetch(self, ids: np.ndarray) -> FeatureRows:
        """Rows of those ids that it has, in any order; called by a few threads of the store, each id by one.

        Requests wait for it, for `fetch_timeout_ms` at most; the answer is kept when it comes later. Give it
        a time limit of its own: until it returns its thread is busy, and requests of its ids are refused.

        A value that was put into the cache may leave it again at any time, so an update goes to the source
        first and to the cache after: by itself where the source is an `UpdatableSource`.

        Args:
          ids: [m] int64, distinct.

        Raises:
          UnavailableError: if it can't be asked now, or an OSError, such as a TimeoutError; the requests fail
            as UNAVAILABLE then, and with anything else as INTERNAL.
        """
        ...


@runtime_checkable
class UpdatableSource(FeatureSource, Protocol):
    """A source that the store writes updates and removals through to, one at a time.

    Both raise UnavailableError or an OSError if it can't be written to now: the cache is left as it was then.
    Give them a time limit: other updates wait.
    """

    def update(self, rows: FeatureRows) -> None:
        """Puts whole rows in, of every stored feature: a fetch that begins after this sees them, or newer."""
        ...

    def remove(self, ids: np.ndarray) -> int:
        """Takes rows out; returns how many there were.

        Args:
          ids: [n] int64.
        """
        ...


class FileSource:
    """The rows of a feature file, and updates in memory in front of them. Any thread.

    Attributes:
      file: it.
    """

    def __init__(self, file: FeatureFile, max_lengths: Sequence[int] = ()) -> None:
        """
        Args:
          file: what it answers from.
          max_lengths: as `FeatureTable` takes them.
        """
        self.file = file
        self._table = file.table(max_lengths)

    @property
    def num_bytes(self) -> int:
        """Memory of the updates; the file's pages are not counted."""
        return self._table.stats()["bytes"]

    def fetch(self, ids: np.ndarray) -> FeatureRows:
        """See `FeatureSource`."""
        names = self._table.schema.names
        columns, missing = self._table.lookup(ids, [True] * len(names))
        return FeatureRows(np.delete(ids, missing), dict(zip(names, columns, strict=True)))

    def update(self, rows: FeatureRows) -> None:
        """See `UpdatableSource`. The columns are in the form of spec/columns.py."""
        self._table.put(rows.ids, [rows.features[name] for name in self._table.schema.names])

    def remove(self, ids: np.ndarray) -> int:
        """See `UpdatableSource`."""
        return self._table.remove(ids)
