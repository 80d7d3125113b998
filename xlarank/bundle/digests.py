"""sha256 of files, and its check."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from xlarank.bundle.manifest import FileDigest
from xlarank.errors import BundleError, ConfigError
from xlarank.spec.files import check_kind, open_file

__all__ = ["check_file", "check_files", "digest_of"]


def digest_of(path: Path) -> FileDigest:
    """Size and sha256 of a file, read once. Raises OSError."""
    with open_file(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(sha256, file.tell())


def check_file(path: Path, expected: FileDigest, *, content: bool) -> None:
    """Raises BundleError, naming the file and what differs, unless it is as expected.

    Args:
      path: the file.
      expected: its size and sha256.
      content: whether to read it; the size is looked at in any case.
    """
    try:
        status = os.stat(path)
        check_kind(path, status.st_mode)
        if status.st_size != expected.bytes:
            kind = "truncated" if status.st_size < expected.bytes else "too long"
            raise BundleError(f"{path}: {kind}: expected {expected.bytes} bytes, got {status.st_size}")
        if not content:
            return
        found = digest_of(path)
    except FileNotFoundError:
        raise BundleError(f"{path}: missing: expected {expected.bytes} bytes") from None
    except OSError as error:
        raise BundleError(f"{path}: can't be read: {error.strerror}") from error
    if found != expected:
        raise BundleError(f"{path}: damaged: expected sha256 {expected.sha256}, got {found.sha256}")


def check_files(
    folder: Path, files: Mapping[str, FileDigest], *, unread: Collection[str], num_threads: int
) -> None:
    """`check_file` for every file of a folder; the first one that differs, in their order, is raised.

    Args:
      folder: that the paths are in.
      files: what each must be.
      unread: paths whose size alone is looked at.
      num_threads: threads that read; >= 1.
    """
    if num_threads < 1:
        raise ConfigError(f"num_threads must be >= 1; was {num_threads}")
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        checks = [
            pool.submit(check_file, folder / path, digest, content=path not in unread)
            for path, digest in files.items()
        ]
        try:
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)
