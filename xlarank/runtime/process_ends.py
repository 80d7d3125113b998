"""How processes end, and when they are started again: `Backoff`, `MOST_DEATHS`, `how_it_ended`."""

from __future__ import annotations

import signal

__all__ = ["MOST_DEATHS", "Backoff", "how_it_ended"]

MOST_DEATHS = 3
"""So many starts in a row in which a process died for no reason that is known: it may be what it loads."""


class Backoff:
    """How long to wait before a process that has died is started again."""

    FIRST_SECONDS = 1.0
    MOST_SECONDS = 30.0
    WELL_AFTER_SECONDS = 60.0
    """Who has served so long counts as well: its next death is its first."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def after(self, well_seconds: float) -> float:
        """The wait after a death.

        Args:
          well_seconds: since it was ready, or died before; 0 if it never was ready.
        """
        if well_seconds >= self.WELL_AFTER_SECONDS:
            self._seconds = 0.0
        self._seconds = min(self.MOST_SECONDS, max(self.FIRST_SECONDS, 2 * self._seconds))
        return self._seconds


def how_it_ended(code: int) -> str:
    """In words.

    Args:
      code: a status, or less than 0: the signal.
    """
    if code >= 0:
        return f"status {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
