"""Requests kept for later: those that failed and those that were slow: `Captures`."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from xlarank.bundle import write_requests
from xlarank.errors import BundleError, ConfigError
from xlarank.runtime.answer import Timings
from xlarank.runtime.complaints import Complaints
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

    def __init__(
        self, config: CaptureConfig | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
          config: `CaptureConfig()` by default.
          clock: seconds; how often the log hears of the same thing.

        Raises:
          ConfigError: if the folder can't be made.
        """
        self.config = config or CaptureConfig()
        self._changed = threading.Condition()
        # Guarded by _changed, as the next three: the last of each reason, in memory and to be written.
        self._kept = self._last_of_each()
        self._unwritten = self._last_of_each()
        self._is_closed = False  # moves one way
        self._complaints = Complaints(_log, clock=clock)
        self._complain = functools.partial(self._complaints.add, level=logging.WARNING)
        self._writer: threading.Thread | None = None
        if self.config.folder is not None and self.config.num_kept:
            self._folder = self.config.folder
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"captures: folder {self._folder}: {error}") from error
            for reason in CaptureReason:
                self._prune(reason)
            self._writer = threading.Thread(target=self._write_all, name="xlarank-captures", daemon=True)
            self._writer.start()

    def _last_of_each(self) -> dict[CaptureReason, collections.deque[Capture]]:
        return {reason: collections.deque(maxlen=self.config.num_kept) for reason in CaptureReason}

    def is_slow(self, seconds: float) -> bool:
        """Whether a request that took so long, from its arrival, is kept."""
        return 0 < self.config.slow_ms < seconds * 1e3

    def keep_slow(
        self,
        model: str,
        version: int,
        request: RankRequest,
        timings: Timings,
        scores: Mapping[str, np.ndarray],
        before_seconds: float = 0.0,
    ) -> None:
        """Keeps a request that was slow, with its scores and where the time went: before its submit (waiting
        for a thread, being decoded), and from then on."""
        stages = {"before": before_seconds, **vars(timings)}
        times = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in stages.items())
        self._keep(Capture(CaptureReason.SLOW, model, version, request, times, time.time(), scores))

    def keep_fault(self, model: str, version: int, request: RankRequest, detail: str) -> None:
        """Keeps a request that made its batch fail, or was in one that hung."""
        self._keep(Capture(CaptureReason.FAULT, model, version, request, detail, time.time()))

    def kept(self) -> list[Capture]:
        """What is in memory, by reason, the oldest first."""
        with self._changed:
            return [capture for captures in self._kept.values() for capture in captures]

    def close(self) -> None:
        """Writes what is left."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._complaints.close()

    def _keep(self, capture: Capture) -> None:
        with self._changed:
            self._kept[capture.reason].append(capture)
            if self._writer is None:
                return
            unwritten = self._unwritten[capture.reason]
            if len(unwritten) == self.config.num_kept:  # the oldest goes: requests don't wait for the disk
                self._complain(
                    "captures: a request is in memory alone: too many at once, or the disk doesn't follow"
                )
            unwritten.append(capture)
            self._changed.notify()

    def _write_all(self) -> None:
        number = 0
        while (capture := self._next()) is not None:
            number += 1
            when = f"{int(capture.at * 1e3)}-{os.getpid()}-{number}"  # others may write into the folder, too
            stem = f"{capture.model}-{capture.version}-{capture.reason}-{when}"
            try:
                self._write(capture, self._folder / f"{stem}.safetensors")
            except (OSError, BundleError) as error:
                self._complain("captures: a request can't be written: %s: %s", stem, error)

    def _next(self) -> Capture | None:
        """The oldest that is to be written, faults first; waits for one, None at the end."""
        with self._changed:
            while not any(self._unwritten.values()):
                if self._is_closed:
                    return None
                self._changed.wait()
            return next(captures for captures in self._unwritten.values() if captures).popleft()

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
        self._prune(capture.reason)
        if not path.exists():  # another process has removed it for newer ones, perhaps before it had facts
            path.with_suffix(".json").unlink(missing_ok=True)

    def _prune(self, reason: CaptureReason) -> None:
        """Leaves the folder the last of a reason, whichever process wrote them, be it gone or not."""
        name = re.compile(rf".*-{reason}(-\d+)+\.safetensors")
        files = [path for path in self._folder.iterdir() if name.fullmatch(path.name)]
        for old in sorted(files, key=_age_key)[: -self.config.num_kept]:
            facts = old.with_suffix(".json")
            for path in (facts, old, facts):  # its writer may be just writing them
                path.unlink(missing_ok=True)


def _age_key(path: Path) -> tuple[int, int]:
    """Ascending with when it was written; numbers tell those of one process apart that have the same time."""
    try:
        modified = path.stat().st_mtime_ns
    except FileNotFoundError:  # another process has just removed it as one of the oldest
        modified = 0
    return modified, int(path.stem.rpartition("-")[2])
