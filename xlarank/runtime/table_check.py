"""The content of mapped tables, checked while they serve: `TableCheck`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import numpy as np

from xlarank.bundle import TableFile
from xlarank.errors import BundleError
from xlarank.runtime.background import lower_priority

__all__ = ["TableCheck"]

_log = logging.getLogger(__name__)

_SAMPLES_A_FILE = 4


class TableCheck:
    """Compares every chunk of some files with its digest: a few at once, the others in a thread of its own.

    The thread has the lowest priority and reads the files without mapping them, so that the process's
    resident memory doesn't grow. Any thread may read the properties.
    """

    def __init__(self, files: Iterable[TableFile], *, is_done: bool = False) -> None:
        """
        Args:
          files: of tables.
          is_done: whether their content has been checked already.
        """
        self._files = tuple(files)
        self.num_bytes = sum(file.num_bytes for file in self._files)
        self._num_checked_bytes = self.num_bytes if is_done else 0  # written by one thread at a time
        self._fault: str | None = None  # set once
        self._is_stopping = False  # set once, by any thread
        self._thread: threading.Thread | None = None
        # What is left to check: (file, chunk). Taken from by `sample`, then by the thread.
        self._left = [] if is_done else [(f, c) for f in self._files for c in range(f.num_chunks)]

    @property
    def num_checked_bytes(self) -> int:
        """Bytes found to be as they were written, of `num_bytes`."""
        return self._num_checked_bytes

    @property
    def fault(self) -> str | None:
        """What is wrong with the tables; None as far as is known."""
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

    def start(self) -> None:
        """Checks what is left in the background; once."""
        if not self._left:
            return
        _log.info(
            "%d of %d bytes of mapped tables are checked, the others are checked in the background",
            self.num_checked_bytes,
            self.num_bytes,
        )
        self._thread = threading.Thread(target=self._run, name="xlarank-table-check", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leaves the rest unchecked."""
        self._is_stopping = True
        self.join()

    def join(self) -> None:
        """Waits for the end of the check."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        lower_priority()
        for file, chunk in self._left:
            if self._is_stopping:
                return
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
        _log.info("all %d bytes of mapped tables are checked", self.num_bytes)
