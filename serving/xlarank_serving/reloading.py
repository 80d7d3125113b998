"""Files that may change while a server runs: `Reloaded`, `file_stamp`."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from xlarank.errors import ConfigError

__all__ = ["Reloaded", "file_stamp", "read_file"]

_log = logging.getLogger(__name__)

_Value = TypeVar("_Value")


class Reloaded(Generic[_Value]):
    """What was made of some files, made anew when one of them has changed. Any thread.

    Where the new content is wrong (a certificate whose key isn't there yet, a file cut short), the last good
    value stays and the log says so, once a change.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], _Value]) -> None:
        """
        Args:
          paths: whose change is looked for, at every `get`: a microsecond each.
          load: reads them; ConfigError if they aren't right.

        Raises:
          ConfigError: as `load`, this first time.
        """
        self._paths = tuple(paths)
        self._load = load
        self._lock = threading.Lock()
        self._stamps = self._look()  # guarded by _lock; before the files are read: a change is never missed
        self._value = load()  # written under _lock, read by any thread

    def get(self) -> _Value:
        """The newest good value."""
        self._refresh()
        return self._value

    def _refresh(self) -> None:
        """Reads the files if they have changed since the last look."""
        stamps = self._look()
        # Whoever loses reads the last value; the winner reads the files.
        if stamps == self._stamps or not self._lock.acquire(blocking=False):
            return
        try:
            if stamps == self._stamps:
                return
            self._stamps = stamps
            try:
                self._value = self._load()
            except ConfigError as error:
                _log.error("the last good version stays in use: %s", error)
                return
            _log.warning("read again: %s", ", ".join(map(str, self._paths)))
        finally:
            self._lock.release()

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(file_stamp(path) for path in self._paths)


def read_file(what: str, path: Path) -> bytes:
    """The bytes of a file.

    Raises:
      ConfigError: if it can't be read; opens with `what`, the option that names it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: can't be read: {error.strerror}") from error


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Differs once a file was written or replaced; None without one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
