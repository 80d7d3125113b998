"""Requests kept for later: those that failed and those that were slow: `Captures`."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xlarank.bundle import write_requests
from xlarank.errors import BundleError, ConfigError
from xlarank.runtime.answer import Timings
from xlarank.spec import CaptureConfig, RankRequest

__all__ = ["Capture", "CaptureReason", "Captures"]

_log = logging.getLogger(__name__)


class CaptureReason(enum.StrEnum):
    """Why a request was kept."""

    FAULT = "fault"
    """It made a batch fail wherever that ran."""

    SLOW = "slow"
    """Its answer took long."""


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """A request that was kept."""

    reason: CaptureReason
    model: str
    version: int
    request: RankRequest
    detail: str
    """In words: the fault, or where the time went."""

    at: float
    """Seconds since the epoch."""

    scores: Mapping[str, np.ndarray] | None = None
    """[N] float32 by task, as answered; None for a fault."""


class Captures:
    """Keeps the last requests of each reason. Any thread; a thread of its own writes files."""

    def __init__(self, config: CaptureConfig | None = None) -> None:
        """
        Args:
          config: `CaptureConfig()` by default.

        Raises:
          ConfigError: if the folder can't be made.
        """
        self.config = config or CaptureConfig()
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._kept: dict[CaptureReason, collections.deque[Capture]] = {
            reason: collections.deque(maxlen=self.config.num_kept) for reason in CaptureReason
        }
        # The writer's own: what it wrote, the oldest first.
        self._files: dict[CaptureReason, collections.deque[Path]] = {
            reason: collections.deque() for reason in CaptureReason
        }
        self._to_write: queue.Queue[Capture | None] = queue.Queue(maxsize=max(1, self.config.num_kept))
        self._writer: threading.Thread | None = None
        if self.config.folder is not None and self.config.num_kept:
            self._folder = self.config.folder
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"captures: folder {self._folder}: {error}") from error
            for reason, files in self._files.items():  # what an earlier process left counts too
                files += sorted(self._folder.glob(f"*-{reason}-*.safetensors"), key=_modified)
                self._prune(files)
            self._writer = threading.Thread(target=self._write_all, name="xlarank-captures", daemon=True)
            self._writer.start()

    def is_slow(self, seconds: float) -> bool:
        """Whether a request that took so long is kept."""
        return 0 < self.config.slow_ms < seconds * 1e3

    def keep_slow(
        self,
        model: str,
        version: int,
        request: RankRequest,
        timings: Timings,
        scores: Mapping[str, np.ndarray],
    ) -> None:
        """Keeps a request that was slow."""
        times = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in vars(timings).items())
        self._keep(Capture(CaptureReason.SLOW, model, version, request, times, time.time(), scores))

    def keep_fault(self, model: str, version: int, request: RankRequest, detail: str) -> None:
        """Keeps a request that made its batch fail."""
        self._keep(Capture(CaptureReason.FAULT, model, version, request, detail, time.time()))

    def kept(self) -> list[Capture]:
        """What is in memory, by reason, the oldest first."""
        with self._lock:
            return [capture for captures in self._kept.values() for capture in captures]

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._to_write.put(None)
            self._writer.join()
            self._writer = None

    def _keep(self, capture: Capture) -> None:
        with self._lock:
            self._kept[capture.reason].append(capture)
        if self._writer is not None:
            try:
                self._to_write.put_nowait(capture)
            except queue.Full:  # the disk doesn't follow: requests don't wait for it
                _log.warning("captures: a %s request is kept in memory alone", capture.reason)

    def _write_all(self) -> None:
        number = 0
        while (capture := self._to_write.get()) is not None:
            number += 1
            stem = f"{capture.model}-{capture.version}-{capture.reason}-{int(capture.at * 1e3)}-{number}"
            try:
                self._write(capture, self._folder / f"{stem}.safetensors")
            except (OSError, BundleError) as error:
                _log.warning("captures: %s can't be written: %s", stem, error)

    def _write(self, capture: Capture, path: Path) -> None:
        scores = {} if capture.scores is None else {"scores": dict(capture.scores)}
        facts = {
            "model": capture.model,
            "version": capture.version,
            "reason": capture.reason,
            "detail": capture.detail,
            "at": capture.at,
            "candidates": capture.request.num_candidates,
        }
        # The facts come last: a reader takes a request with facts for whole.
        write_requests(path, [capture.request], scores)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
        self._files[capture.reason].append(path)
        self._prune(self._files[capture.reason])

    def _prune(self, files: collections.deque[Path]) -> None:
        while len(files) > self.config.num_kept:
            old = files.popleft()
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    return path.stat().st_mtime
