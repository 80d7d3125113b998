"""How often the tables of an engine were updated, and when last: `TableVersions`."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from xlarank.host import SharedRows

__all__ = ["TableVersion", "TableVersions"]


@dataclasses.dataclass(frozen=True)
class TableVersion:
    """State of one table."""

    version: int
    """Updates since the bundle was loaded."""

    num_rows: int
    """Rows that these updates wrote; a row that was written twice counts twice."""

    age_seconds: float
    """Since the last of them; since the load if there was none."""


class TableVersions:
    """Counts the updates of the updatable tables. Any thread."""

    def __init__(
        self,
        tables: Iterable[str],
        *,
        shared: Mapping[str, SharedRows] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          tables: names.
          shared: of those that several processes update; what each of them did counts for all.
          clock: seconds, monotonic.
        """
        self._shared = shared
        self._clock = clock
        self._lock = threading.Lock()
        now = clock()
        # Guarded by _lock: updates, rows and the time of the last, by table.
        self._states: dict[str, tuple[int, int, float]] = dict.fromkeys(tables, (0, 0, now))

    def advance(self, table: str, num_rows: int) -> int:
        """Counts an update that is complete; returns the table's new version."""
        if table in self._shared:
            return self._shared[table].count(num_rows)
        with self._lock:
            version, rows, _ = self._states[table]
            self._states[table] = (version + 1, rows + num_rows, self._clock())
            return version + 1

    def now(self) -> dict[str, TableVersion]:
        """By table."""
        with self._lock:
            states, now = dict(self._states), self._clock()
        states |= {table: shared.state for table, shared in self._shared.items()}
        return {
            table: TableVersion(version, rows, max(0.0, now - at))
            for table, (version, rows, at) in states.items()
        }
