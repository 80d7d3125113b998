"""Looking at a repository's folder now and then: `Watcher`, `Told`, `Listing`, `folder_stamp`."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from xlarank.bundle import list_versions
from xlarank.errors import BundleError

__all__ = ["Listing", "Stop", "Told", "Watcher", "folder_stamp"]

_log = logging.getLogger(__name__)


class Stop(Protocol):
    """What a watcher waits on between looks; a `threading.Event` is one."""

    def wait(self, timeout: float) -> bool:
        """Waits; True if there is nothing more to do."""
        ...

    def set(self) -> None:
        """Ends the wait of whoever waits, and all later ones."""
        ...


class Watcher:
    """Calls a function every so many seconds, in a thread of its own, until it is stopped.

    Asking beats being told: network file systems tell nobody, and a look costs a few system calls.
    """

    def __init__(
        self, look: Callable[[], None], seconds: float, stop: Stop | None = None, *, what: str = "repository"
    ) -> None:
        """Starts; the first look comes after the first wait.

        Args:
          look: what is called; an exception of it is logged and the next look comes all the same.
          seconds: from the end of a look to the next.
          stop: the clock; a `threading.Event` by default.
          what: is looked at, in words.
        """
        self._what = what
        self._look = look
        self._seconds = seconds
        self._stop = stop or threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"xlarank-{what}-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends after the look that is under way."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._look()
            except Exception:
                _log.exception(
                    "the look at the %s failed; the next one comes in %g s", self._what, self._seconds
                )


class Told:
    """Logs what is so once for as long as it lasts. One thread at a time."""

    def __init__(self, log: logging.Logger, level: int = logging.WARNING) -> None:
        """`log`: where to, at `level`."""
        self._log = log
        self._level = level
        self._told: set[str] = set()

    def tell(self, texts: Iterable[str]) -> None:
        """`texts`: all that is so now."""
        texts = set(texts)
        for text in sorted(texts - self._told):
            self._log.log(self._level, "%s", text)
        self._told = texts


class Listing:
    """Lists a repository again and again, and says once what can't be looked at. One thread at a time."""

    def __init__(self, root: Path) -> None:
        """`root`: folder of ``<model>/<version>``."""
        self._root = root
        self._told = Told(_log, logging.ERROR)

    def look(self) -> dict[str, list[int]] | None:
        """Versions by model, without the models whose folders can't be looked at; None if all can't."""
        unreadable: dict[str, BundleError] = {}
        try:
            found = list_versions(self._root, unreadable)
        except BundleError as error:
            found, unreadable = None, {"": error}
        self._told.tell(
            f"the repository can't be looked at, what is loaded goes on serving: {error}"
            for error in unreadable.values()
        )
        return found


def folder_stamp(folder: Path) -> str | None:
    """Differs once anything in a folder was written, replaced, added or removed; None without a folder.

    Reads no file: names, sizes, inodes and times are what is compared.
    """
    found: list[tuple[object, ...]] = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = os.path.join(parent, name)
            try:
                state = os.stat(path)
            except OSError:  # removed meanwhile, or a link to nothing
                found.append((path,))
                continue
            found.append((path, state.st_ino, state.st_size, state.st_mtime_ns))
    if not found and not folder.is_dir():
        return None
    return hashlib.sha256(repr(found).encode(errors="surrogatepass")).hexdigest()
