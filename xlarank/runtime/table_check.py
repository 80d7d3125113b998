"""Mapped files, checked while they serve: `TableCheck`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

import numpy as np

from xlarank.bundle import TableFile
from xlarank.errors import BundleError
from xlarank.host import FeatureFile
from xlarank.runtime.background import lower_priority

__all__ = ["TableCheck"]

_log = logging.getLogger(__name__)

_SAMPLES_A_FILE = 4


class TableCheck:
    """Compares every chunk of mapped files with its digest: a few at once, the others in a thread of its own.

    The thread has a lower priority and reads the files without mapping them, so that the process's
    resident memory doesn't grow. When all is checked it goes on comparing the files' sizes: who reads a
    mapped page that its file no longer has is killed by the system (SIGBUS), and a file that is cut short is
    to be a fault before most of its readers get there. A mapped file of candidate features, which was checked
    whole when it was opened, is watched so too. Any thread may read the properties.
    """

    def __init__(
        self, files: Iterable[TableFile], *, num_read_bytes: int = 0, size_check_seconds: float = 1.0
    ) -> None:
        """
        Args:
          files: of mapped tables.
          num_read_bytes: of other tables, whose content was checked as it was read.
          size_check_seconds: between two comparisons of the files' sizes.
        """
        self._files = tuple(files)
        self.num_bytes = num_read_bytes + sum(file.num_bytes for file in self._files)
        self._features: FeatureFile | None = None  # set before the start
        self._num_checked_bytes = num_read_bytes  # written by one thread at a time
        self._fault: str | None = None  # set once
        self._size_check_seconds = size_check_seconds
        self._is_stopping = threading.Event()
        self._is_checked = threading.Event()  # content: to its end, or to a fault
        self._thread: threading.Thread | None = None
        # What is left to check: (file, chunk). Taken from by `sample`, then by the thread.
        self._left = [(f, c) for f in self._files for c in range(f.num_chunks)]

    @property
    def num_checked_bytes(self) -> int:
        """Bytes found to be as they were written, of `num_bytes`."""
        return self._num_checked_bytes

    @property
    def fault(self) -> str | None:
        """What is wrong with the files; None as far as is known."""
        return self._fault

    def sample(self) -> None:
        """Checks a few chunks of each file, the first and the last among them.

        Raises:
          BundleError: for the first one that is damaged.
        """
        picked = {
            (file, int(chunk))
            for file in self._files
            for chunk in np.linspace(0, file.num_chunks - 1, _SAMPLES_A_FILE).round()
        }
        for file, chunk in picked:
            self._num_checked_bytes += file.check_chunk(chunk)
        self._left = [item for item in self._left if item not in picked]

    def watch(self, features: FeatureFile) -> None:
        """Compares the sizes of that one's files too, from `start` on."""
        self._features = features

    def start(self) -> None:
        """Checks what is left in the background, then the sizes until `stop`; once."""
        if not self._files and self._features is None:
            return
        if self._files:
            _log.info(
                "%d of %d bytes of mapped tables are checked, the others are checked in the background",
                self.num_checked_bytes,
                self.num_bytes,
            )
        self._thread = threading.Thread(target=self._run, name="xlarank-table-check", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leaves the rest unchecked."""
        self._is_stopping.set()
        if self._thread is not None:
            self._thread.join()

    def join(self) -> None:
        """Waits until the content is checked."""
        if self._thread is not None:
            self._is_checked.wait()

    def check_sizes(self) -> bool:
        """Compares the size of every file in use with what it was; a wrong one is a `fault`.

        Returns:
          Whether all are right.
        """
        try:
            for file in self._files:
                file.check_size()
            if self._features is not None:
                self._features.check_size()
        except BundleError as error:
            self._fault = str(error)
            _log.error("a file in use is damaged: %s", error)
            return False
        return True

    def _run(self) -> None:
        lower_priority()
        try:
            self._check_content()
        finally:
            self._is_checked.set()
        while self._fault is None and not self._is_stopping.wait(self._size_check_seconds):
            self.check_sizes()

    def _check_content(self) -> None:
        sizes_due = 0.0
        for file, chunk in self._left:
            if self._is_stopping.is_set():
                return
            if time.monotonic() >= sizes_due:
                if not self.check_sizes():
                    return
                sizes_due = time.monotonic() + self._size_check_seconds
            try:
                self._num_checked_bytes += file.check_chunk(chunk)
            except BundleError as error:
                if not file.path.exists():
                    # Removed as no longer wanted; what is mapped stays as it was.
                    _log.warning("%s was removed: the rest of the tables stays unchecked", file.path)
                    return
                self._fault = str(error)
                _log.error("a table in use is damaged: %s", error)
                return
        if self._files:
            _log.info("all %d bytes of mapped tables are checked", self.num_bytes)
