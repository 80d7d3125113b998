"""The hidden folder in which a version grows, and the one step that makes it visible."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from pathlib import Path

from xlarank.errors import BundleError

__all__ = ["Staging"]

_PREFIX = ".tmp-"
_MAX_TRIES = 100


class Staging:
    """A folder `.tmp-…` in a model's folder, so that a rename can publish it.

    A lock on the folder itself says that its writer lives: the kernel drops it with the process, however
    that ends, and the next writer of the model removes folders that nobody holds. Readers never look at
    them. On a file system without locks nothing is removed.
    """

    def __init__(self, model_folder: Path) -> None:
        """Makes the folder, and the model's if need be.

        Raises:
          OSError: if the file system refuses.
        """
        self._model_folder = model_folder
        self._made_folders = [p for p in (model_folder, model_folder.parent) if not p.exists()]
        self.path, self._lock = _make_locked(model_folder)
        _remove_abandoned(model_folder)

    def publish(self, version: int) -> Path | None:
        """Gives the folder its version's name.

        Returns:
          The version's folder; None if that version exists, with nothing changed.
        """
        target = self._model_folder / str(version)
        # An empty folder would be replaced by the rename, and may be somebody's.
        if target.exists():
            return None
        try:
            os.rename(self.path, target)
        except OSError as error:
            if target.exists():  # published by another writer in between
                return None
            raise BundleError(f"{target}: can't be published: {error.strerror}") from error
        for folder in (self._model_folder, self._model_folder.parent):
            sync_path(folder)
        self._close_lock()
        return target

    def discard(self) -> None:
        """Removes the folder, and the model's and the repository's if this writer made them for nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._close_lock()
        for folder in self._made_folders:
            with contextlib.suppress(OSError):  # not empty: another writer has joined
                folder.rmdir()

    def _close_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sync_path(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_locked(model_folder: Path) -> tuple[Path, int | None]:
    """A new folder and the handle that locks it.

    Raises:
      FileNotFoundError: if the folder vanishes each time, as below a working directory that was removed.
    """
    for _ in range(_MAX_TRIES):
        path = model_folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
        # Start over if another writer, leaving, removes the empty model folder in between, or takes this one,
        # not locked yet, for an abandoned one.
        with contextlib.suppress(FileNotFoundError):
            path.mkdir(parents=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            except OSError:  # a file system without locks
                os.close(handle)
                return path, None
            if _is_at(handle, path):
                return path, handle
            os.close(handle)
    raise FileNotFoundError(errno.ENOENT, "no folder can be made there", str(model_folder))


def _remove_abandoned(model_folder: Path) -> None:
    """Removes the folders of writers that died."""
    for path in model_folder.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its writer may have published it since the listing, which moves the folder and frees the lock.
            if _is_at(handle, path):
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # locked: its writer lives; or a file system without locks
            continue
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open folder is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
