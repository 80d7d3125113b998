"""Where a store gets the candidates that it doesn't have: `FeatureSource`, and one over a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xlarank.host.feature_file import FeatureFile

__all__ = ["FeatureRows", "FeatureSource", "FileSource"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRows:
    """Raw candidate features of some ids."""

    ids: np.ndarray
    """[n] int64, distinct."""

    features: Mapping[str, Any]
    """By name, n rows each, as `RankRequest` takes them."""


class FeatureSource(Protocol):
    """What a cache of candidate features stands in front of."""

    def fetch(self, ids: np.ndarray) -> FeatureRows:
        """Rows of those ids that it has, in any order; called by any thread, while a request waits.

        A value that was put into the cache may leave it again at any time, so an update goes to the source
        first and to the cache after.

        Args:
          ids: [m] int64, distinct.

        Raises:
          UnavailableError: if it can't be asked now; the request fails with it.
        """
        ...


class FileSource:
    """The rows of a feature file. Any thread.

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

    def fetch(self, ids: np.ndarray) -> FeatureRows:
        """See `FeatureSource`."""
        names = self._table.schema.names
        columns, missing = self._table.lookup(ids, [True] * len(names))
        return FeatureRows(np.delete(ids, missing), dict(zip(names, columns, strict=True)))
