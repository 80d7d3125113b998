"""Rows of an updatable table that several processes look up in and write: `SharedRows`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
from collections.abc import Iterator

import numpy as np

from xlarank.host.memory import huge_empty

__all__ = ["SharedRows"]

_NUM_STAMPS = 1 << 12
"""As in native/stamps.h."""

_HEADER_BYTES = 64
"""Four numbers of 8 bytes: updates, rows that they wrote, when the last ended, whether any has begun."""

_NUMBER_BYTES = 8


class SharedRows:
    """A table's rows, and what keeps its readers and writers apart, in memory of a process and of its forks.

    Readers take no lock: they look at `stamps` (native/stamps.h). Writers of all processes take turns, and
    what one of them is just writing stands in `journal` too: of a process that is killed meanwhile a row
    could be left half written, with a stamp that makes readers wait; `repair`, or the next writer, writes it
    to its end.

    Any thread of any process. Made before the fork.
    """

    def __init__(self, rows: np.ndarray) -> None:
        """
        Args:
          rows: [R, row_bytes] uint8, writable, in shared memory.
        """
        self._rows = rows
        row_bytes = rows.shape[1]
        memory = huge_empty(_HEADER_BYTES + 4 * _NUM_STAMPS + _NUMBER_BYTES + row_bytes, is_shared=True)
        self._counts = memory[:16].view(np.int64)
        self._times = memory[16:24].view(np.float64)
        self._begun = memory[24:32].view(np.int64)  # before any row changes; moves one way
        self.stamps = memory[_HEADER_BYTES:][: 4 * _NUM_STAMPS].view(np.uint32)
        self.journal = memory[_HEADER_BYTES + 4 * _NUM_STAMPS :]
        self._times[0] = time.monotonic()
        self._file = os.memfd_create("xlarank-rows")  # never locked itself: forks share it
        # Of this process alone: a fork's is its own, and locks belong to the files that `writing` opens.
        weakref.finalize(self, os.close, self._file).atexit = False

    @property
    def state(self) -> tuple[int, int, float]:
        """Updates since the load, rows that they wrote, and when the last ended, without one the load.

        The time is of `time.monotonic`, which is one clock for all processes.
        """
        return int(self._counts[0]), int(self._counts[1]), float(self._times[0])

    @property
    def has_updates(self) -> bool:
        """Whether an update has begun since the load: one whose process was killed changed rows, and isn't
        counted."""
        return bool(self._begun[0])

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """An update: keeps other writers out, of this process and of the others. Not twice by one thread."""
        with self._alone():
            self._begun[0] = 1
            yield

    def count(self, num_rows: int) -> int:
        """Counts an update that is complete; returns the table's new version."""
        with self._alone():
            self._counts += np.array([1, num_rows])
            self._times[0] = time.monotonic()
            return int(self._counts[0])

    def repair(self) -> None:
        """Writes to its end what a process that was killed was writing."""
        with self._alone():
            pass

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        # Opened anew, the file is this call's own: its lock keeps threads of this process out as well as
        # other processes, and ends with the owner, however that ends. Record locks are a process's own: the
        # kernel takes threads that wait for different tables for one that waits for itself (EDEADLK).
        file = os.open(f"/proc/self/fd/{self._file}", os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                self._finish()
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a program just being started may have the file yet
        finally:
            os.close(file)

    def _finish(self) -> None:
        """While alone. The journal has a row's number from before its first byte until after its last."""
        number = self.journal[:_NUMBER_BYTES].view(np.int64)
        if not number[0]:
            return
        row = int(number[0]) - 1
        # The writer may have been killed just before the row's stamp was odd, meanwhile, or just after: odd
        # is what readers wait for. All stamps instead of the row's, as nobody else writes any now.
        self.stamps |= 1
        self._rows[row] = self.journal[_NUMBER_BYTES:]
        self.stamps += 1
        number[0] = 0
