"""Reading a bundle: `open_bundle`, `Bundle`."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import os
from pathlib import Path

import numpy as np

from xlarank.bundle.arrays import read_arrays
from xlarank.bundle.digests import check_file, check_files
from xlarank.bundle.manifest import (
    DEVICE_ROWS_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    PARAMS_FILE,
    Manifest,
    ProgramEntry,
    table_file,
)
from xlarank.bundle.manifest_json import manifest_from_json
from xlarank.bundle.repository import version_of
from xlarank.bundle.requests import read_requests
from xlarank.bundle.tables import TableFile, stored_form
from xlarank.errors import BundleError
from xlarank.spec import ModelSpec, RankRequest
from xlarank.spec.files import read_file

__all__ = ["Bundle", "Verify", "open_bundle"]

_LOGGER = logging.getLogger(__name__)


class Verify(enum.Enum):
    """What of a bundle's files is read when it is opened, and compared with its sha256."""

    EVERYTHING = enum.auto()
    """Every file but cache/, whose files are checked when they are asked for."""

    ALL_BUT_TABLES = enum.auto()
    """For who reads the tables next, or uses them mapped: `TableFile` checks them as they are read."""

    SIZES = enum.auto()
    """Nothing: only presence, size and the tables' headers are looked at."""


def open_bundle(
    path: Path | str, *, verify: Verify = Verify.EVERYTHING, num_threads: int | None = None
) -> Bundle:
    """Opens one version of a model.

    Args:
      path: the version's folder (`resolve_bundle` finds it).
      verify: how much to read now.
      num_threads: threads that read; None for one a core, at most 4.

    Returns:
      The bundle; its version is the folder's number, or the one it was published as where the folder has
      another kind of name.

    Raises:
      BundleError: if a file is missing, truncated or damaged, or the format version is unknown; names
        the file and what differs.
    """
    path = Path(path)
    file = path / MANIFEST_FILE
    try:
        data = read_file(file)
    except FileNotFoundError:
        raise BundleError(f"{file}: missing: no bundle, or a damaged one") from None
    except OSError as error:
        raise BundleError(f"{file}: can't be read: {error.strerror}") from error
    manifest = manifest_from_json(data, file=str(file))
    if num_threads is None:
        num_threads = min(4, os.cpu_count() or 1)
    unread = {
        Verify.EVERYTHING: frozenset(),
        Verify.ALL_BUT_TABLES: frozenset(table_file(table.name) for table in manifest.spec.tables),
        Verify.SIZES: frozenset(manifest.files),
    }[verify]
    check_files(path, manifest.files, unread=unread, num_threads=num_threads)
    # The folder's name is what listings and clients go by, so a version that was copied to a new number, to
    # roll back to it, is that number.
    version = version_of(path) or manifest.version
    return Bundle(path, dataclasses.replace(manifest, version=version))


class Bundle:
    """A published version, read-only. Threads may share it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Used by `open_bundle`, which checks the files first; raises BundleError for a table's header."""
        self.path = path
        self.manifest = manifest
        self._table_files = {
            table.name: TableFile(path / table_file(table.name), *stored_form(table))
            for table in manifest.spec.tables
        }

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.manifest.spec

    def program(self, entry: ProgramEntry) -> bytes:
        """The exported program of a bucket."""
        return self._read(entry.file)

    def prepare(self) -> bytes | None:
        """The exported program that makes the prepared arrays; None where the params are taken as they
        are."""
        return None if self.manifest.prepare is None else self._read(self.manifest.prepare)

    def text(self, file_name: str) -> str:
        """A file that `BundleWriter.add_text` wrote.

        Raises:
          BundleError: if there is none, or it isn't UTF-8.
        """
        try:
            return self._read(file_name).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.path / file_name}: expected UTF-8: {error}") from error

    def params(self) -> dict[str, np.ndarray]:
        """The dense weights in the order of the manifest; read anew at each call.

        Raises:
          BundleError: if the file's weights aren't those that the manifest names.
        """
        path = self.path / PARAMS_FILE
        arrays, _ = read_arrays(path)
        if set(arrays) != set(self.manifest.params):
            differing = sorted(set(arrays) ^ set(self.manifest.params))
            raise BundleError(
                f"{path}: expected the params that the manifest names; these differ: {differing}"
            )
        return {name: arrays[name] for name in self.manifest.params}

    def device_rows(self) -> dict[str, np.ndarray]:
        """Which rows of split tables devices hold: by table, [K] int32 numbers.

        Raises:
          BundleError: if the file is damaged or contradicts the manifest.
        """
        path, split = self.path / DEVICE_ROWS_FILE, self.manifest.split_tables
        numbers = read_arrays(path)[0] if split else {}
        if set(numbers) != set(split):
            raise BundleError(f"{path}: expected rows of the tables {sorted(split)}, got {sorted(numbers)}")
        return numbers

    def tables(self) -> dict[str, np.ndarray]:
        """Encoded rows by table name, in `stored_form`: read-only, 64-byte aligned, mapped, not yet read."""
        return {name: file.map() for name, file in self._table_files.items()}

    def table_files(self) -> dict[str, TableFile]:
        """The files of the tables by name, to read or check them."""
        return dict(self._table_files)

    def golden(self) -> tuple[list[RankRequest], dict[str, dict[str, np.ndarray]]]:
        """Golden requests, and ``{"scores": {task: [rows] float32}}`` for every task.

        Raises:
          BundleError: if a request is no longer valid, or a task has no scores.
        """
        path = self.path / GOLDEN_FILE
        requests, values = read_requests(path, self.spec)
        scored = values.get("scores", {})
        if missing := [task.name for task in self.spec.tasks if task.name not in scored]:
            raise BundleError(f"{path}: expected scores of every task, got none of {missing}")
        return requests, values

    @functools.cached_property
    def _whole_cache_files(self) -> tuple[Path, ...]:
        whole: list[Path] = []
        for path, digest in self.manifest.cache_files.items():
            try:
                check_file(self.path / path, digest, content=True)
            except BundleError as error:
                _LOGGER.warning("compiled code left out, it will be compiled again: %s", error)
            else:
                whole.append(self.path / path)
        return tuple(whole)

    def cache_files(self) -> list[Path]:
        """Files of compiled code whose sha256 is right.

        They only save time: one that is damaged or missing is left out and logged as a warning, and one that
        the manifest doesn't list is never returned.
        """
        return list(self._whole_cache_files)

    def _read(self, file: str) -> bytes:
        try:
            return read_file(self.path / file)
        except OSError as error:
            raise BundleError(f"{self.path / file}: can't be read: {error.strerror}") from error
