"""One line of JSON a request: `AccessLog`."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import queue
import threading
import time
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank_serving.config import AccessLogConfig
from xlarank_serving.request_record import RequestRecord

__all__ = ["AccessLog", "open_log"]

_log = logging.getLogger(__name__)

_MAX_WAITING = 8192
"""Lines that wait for the disk; beyond that they are dropped and counted, requests don't wait."""

_CLOSE_SECONDS = 5.0
"""How long the lines that wait may take at the end."""

_STDOUT = 1

_SHARE_STEP = 0.6180339887498949
"""Multiples of the golden ratio fill [0, 1) most evenly: so does a share of the requests."""


def open_log(path: Path) -> int:
    """A file to append to, made if need be.

    Raises:
      ConfigError: if it can't be written; nor can a pipe that nobody reads.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        file = os.open(path, flags | os.O_NONBLOCK, 0o666)  # else it would wait for a pipe's reader
    except OSError as error:
        reason = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror or error
        raise ConfigError(f"access log {path}: {reason}") from error
    os.set_blocking(file, True)
    return file


class AccessLog:
    """Writes lines on a thread of its own until closed. A `RequestRecord` observer; any thread.

    Requests that fail are always written; of the others the share that the config says, spread evenly. The
    file is opened anew when it has been moved away or replaced, so that it can be rotated. Lines that can't
    be written, or come faster than they can, are lost; once there is room, a line says how many.
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
        self._is_file = str(self._path) != "-"
        self._position = 0.0  # races between threads only shift the sample
        self._num_lost = 0  # likewise
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        # Used by _thread alone from here on. Without a buffer: one would keep lines that a full disk refused,
        # and refuse to be closed.
        self._file = self._open()
        self._is_cut = False  # within a line
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
            self._num_lost += 1

    def close(self) -> None:
        """Writes what waits, for some seconds at most; the log says how many lines are lost then."""
        end = time.monotonic() + _CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_SECONDS)
        self._thread.join(max(0.0, end - time.monotonic()))
        if num_lost := self._num_lost + self._lines.qsize():
            _log.warning("access log: %d lines were lost", num_lost)

    def _open(self) -> int:
        return open_log(self._path) if self._is_file else _STDOUT

    def _write(self) -> None:
        is_failing = False
        while (line := self._lines.get()) is not None:
            try:
                self._reopen_if_moved()
                if num_lost := self._num_lost:
                    self._append(json.dumps({"dropped_lines": num_lost}))
                    self._num_lost -= num_lost
                self._append(line)
                is_failing = False
            except Exception as error:  # whatever it is, a later line may be written
                self._num_lost += 1
                if not is_failing:
                    _log.warning("access log: lines are lost: %s", error)
                is_failing = True
        if self._is_file:
            _close(self._file)

    def _append(self, line: str) -> None:
        data = f"{line}\n".encode()
        if self._is_cut:
            data = b"\n" + data
        while data:
            data = data[os.write(self._file, data) :]
            self._is_cut = bool(data)

    def _reopen_if_moved(self) -> None:
        if not self._is_file:
            return
        try:
            is_same = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            before, self._file, self._is_cut = self._file, self._open(), False
            _close(before)


def _close(file: int) -> None:
    with contextlib.suppress(OSError):  # the file is closed all the same
        os.close(file)


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
