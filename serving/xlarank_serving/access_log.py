"""One line of JSON a request: `AccessLog`."""

from __future__ import annotations

import datetime
import json
import logging
import os
import queue
import sys
import threading
from typing import TextIO

from xlarank.errors import ConfigError
from xlarank_serving.config import AccessLogConfig
from xlarank_serving.request_record import RequestRecord

__all__ = ["AccessLog"]

_log = logging.getLogger(__name__)

_MAX_WAITING = 8192
"""Lines that wait for the disk; beyond that they are dropped and counted, requests don't wait."""

_SHARE_STEP = 0.6180339887498949
"""Multiples of the golden ratio fill [0, 1) most evenly: so does a share of the requests."""


class AccessLog:
    """Writes lines on a thread of its own until closed. A `RequestRecord` observer; any thread.

    Requests that fail are always written; of the others the share that the config says, spread evenly. The
    file is opened anew when it has been moved away or replaced, so that it can be rotated.
    """

    def __init__(self, config: AccessLogConfig) -> None:
        """
        Args:
          config: with a path; "-" is the standard output.

        Raises:
          ConfigError: if the file can't be written.
        """
        assert config.path is not None
        self._path, self._share = config.path, config.share
        self._position = 0.0  # races between threads only shift the sample
        self._num_dropped = 0  # likewise
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        self._file = self._open()
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def __call__(self, record: RequestRecord) -> None:
        """Writes a line, or leaves it out."""
        if record.status == "OK":
            self._position = (self._position + _SHARE_STEP) % 1.0
            if self._position >= self._share:
                return
        try:
            self._lines.put_nowait(line_of(record))
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Writes what waits."""
        self._lines.put(None)
        self._thread.join()
        if self._file is not sys.stdout:
            self._file.close()

    def _open(self) -> TextIO:
        if str(self._path) == "-":
            return sys.stdout
        try:
            return self._path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"access log {self._path}: {error.strerror or error}") from error

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._reopen_if_moved()
                self._file.write(line + "\n")
                if self._num_dropped:
                    dropped, self._num_dropped = self._num_dropped, 0
                    self._file.write(json.dumps({"dropped_lines": dropped}) + "\n")
                if self._file is sys.stdout:
                    self._file.flush()
            except (OSError, ConfigError) as error:
                _log.warning("access log: a line is lost: %s", error)

    def _reopen_if_moved(self) -> None:
        if self._file is sys.stdout:
            return
        try:
            is_same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            file = self._open()  # first: where that fails, the old one stays open
            self._file.close()
            self._file = file


def line_of(record: RequestRecord) -> str:
    """A record as a line of JSON; times in milliseconds."""
    ended = datetime.datetime.fromtimestamp(record.ended_at, datetime.UTC)
    facts: dict[str, object] = {
        "time": ended.isoformat(timespec="milliseconds"),
        "model": record.model,
        "version": record.version,
        "id": record.id,
        "candidates": record.candidates,
        "transport": record.transport,
        "status": record.status,
        "ms": _ms(record.total_seconds),
        "wait_ms": _ms(record.wait_seconds),
        "decode_ms": _ms(record.decode_seconds),
    }
    if record.timings is not None:
        for name in ("queue", "gather", "execute"):
            facts[f"{name}_ms"] = _ms(getattr(record.timings, name))
    if record.message:
        facts["message"] = record.message
    return json.dumps(facts)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
