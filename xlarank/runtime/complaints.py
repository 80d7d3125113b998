"""What may go wrong at every request, for a log that must not grow with them: `Complaints`."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable

__all__ = ["Complaints"]

_SECONDS_A_LINE = 60.0


@dataclasses.dataclass
class _Kind:
    level: int
    text: str = ""
    count: int = 0
    """Since the log heard of it."""

    told_at: float = -math.inf


class Complaints:
    """Logs the first of each kind at once, then one a minute with how many there were. Any thread."""

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
          log: where to.
          clock: seconds, monotonic.
        """
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[Hashable, _Kind] = {}  # guarded by _lock, with what they hold

    def add(
        self,
        line: str,
        *details: object,
        about: Hashable = None,
        error: BaseException | None = None,
        level: int = logging.ERROR,
    ) -> None:
        """Something went wrong.

        Args:
          line: with a place for each of `details`.
          details: may differ within a kind.
          about: such as a model. A kind has one the same line, `about`, and type and origin of `error`.
          error: whose traceback goes with the line; it isn't kept.
          level: of the log.
        """
        text = line % details
        with self._lock:
            kind = self._kinds.setdefault((line, about, type(error), _origin(error)), _Kind(level))
            kind.text = text
            kind.count += 1
            now = self._clock()
            if now - kind.told_at < _SECONDS_A_LINE:
                return
            count, kind.count, kind.told_at = kind.count, 0, now
        self._tell(level, text, count, error)

    def close(self) -> None:
        """Logs what wasn't yet. More may come after it."""
        with self._lock:
            rest = [(kind.level, kind.text, kind.count) for kind in self._kinds.values() if kind.count]
            self._kinds.clear()
        for level, text, count in rest:
            self._tell(level, text, count, None)

    def _tell(self, level: int, text: str, count: int, error: BaseException | None) -> None:
        since = f" ({count} since the last such line)" if count > 1 else ""
        self._log.log(level, "%s%s", text, since, exc_info=error, stacklevel=3)


def _origin(error: BaseException | None) -> tuple[str, int] | None:
    """The line of source that raised it."""
    trace = None if error is None else error.__traceback__
    if trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno
