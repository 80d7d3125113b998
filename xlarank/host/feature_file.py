"""Candidate features on disk: `FeatureFile` maps what `FeatureFileWriter` wrote.

A folder of three files:

    features.json   format version, model, schema and its fingerprint, number of rows, size and sha256 of the
                    two others, and last a digest of all that
    index.bin       open addressing by XXH64 of the id, seed 0: id int64, 1 + place of its record uint64, or 0
    records.bin     one record an id: id int64, size uint32, 4 bytes unused, its features (native/records.h)

The last two are mapped and never parsed. The folder is written beside and renamed: a reader sees all of it or
none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from xlarank.errors import BundleError, ConfigError
from xlarank.host.feature_columns import FeatureTable, encode_records, index_records
from xlarank.host.feature_schema import FeatureSchema
from xlarank.spec import Column
from xlarank.spec.files import open_file, read_file

__all__ = ["FeatureFile", "FeatureFileWriter"]

_FORMAT_VERSION = 1
_MANIFEST, _INDEX, _RECORDS = "features.json", "index.bin", "records.bin"
_HASH_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureFile:
    """A file of candidate features, mapped. Immutable; any thread."""

    path: Path
    """Its folder."""

    model: str
    """Name of the model that it was built for."""

    schema: FeatureSchema
    """What a record holds."""

    num_rows: int
    """Ids in it."""

    digest: str
    """Of features.json, and so of all of it."""

    index: np.ndarray
    """[bytes] uint8, mapped."""

    records: np.ndarray
    """[bytes] uint8, mapped."""

    maps: Mapping[str, mmap.mmap]
    """What is mapped, by name in the folder; of an empty file nothing is."""

    @classmethod
    def open(cls, path: Path | str) -> FeatureFile:
        """Maps a file and reads it once, to check it whole.

        Raises:
          BundleError: if it is missing, cut short, damaged or of another format version.
        """
        path = Path(path)
        manifest, digest = _read_manifest(path)
        maps: dict[str, mmap.mmap] = {}
        index, records = (_map(path / name, manifest["files"][name], maps) for name in (_INDEX, _RECORDS))
        schema, num_rows = _schema(manifest), manifest["rows"]
        file = cls(path, manifest["model"], schema, num_rows, digest, index, records, maps)
        found = file.table().stats()["rows"]
        if found != file.num_rows:
            raise BundleError(f"{path / _INDEX}: damaged: expected {file.num_rows} rows, got {found}")
        return file

    def is_replaced(self) -> bool:
        """Whether what lies at the path by now is another file.

        Raises:
          BundleError: if nothing lies there, or it is damaged as far as features.json tells.
        """
        return _read_manifest(self.path)[1] != self.digest

    def check_size(self) -> None:
        """Asks for the sizes of what is mapped, and not of what may have taken its place on the disk since.

        Raises:
          BundleError: if a file is shorter or longer than it was: who reads what it no longer has is killed.
        """
        for name, mapped in self.maps.items():
            num_bytes = mapped.size()
            if num_bytes != len(mapped):
                raise BundleError(f"{self.path / name}: expected {len(mapped)} bytes, got {num_bytes}")

    def table(self, max_lengths: Sequence[int] = ()) -> FeatureTable:
        """A table over it; what is put into one is not seen by another.

        Args:
          max_lengths: as `FeatureTable` takes them.

        Raises:
          BundleError: if a record or the index leads outside of the file.
        """
        try:
            return FeatureTable(self.schema, max_lengths=max_lengths, index=self.index, records=self.records)
        except ValueError as error:
            raise BundleError(f"{self.path}: damaged: {error}") from error


class FeatureFileWriter:
    """Writes a file chunk by chunk; in memory are 16 bytes a row, and at the end the index, 32 to 64 more.

    A context manager; on its way in it removes what writers to the same path left that were killed.

    with FeatureFileWriter(path, schema, model="feed") as writer:
        writer.add(ids, columns)
    """

    def __init__(self, path: Path | str, schema: FeatureSchema, *, model: str) -> None:
        """
        Args:
          path: folder to make.
          schema: of the columns.
          model: name of the model that they are for.

        Raises:
          ConfigError: if something is there, or the folder above isn't.
        """
        self.path = Path(path)
        if self.path.exists():
            raise ConfigError(f"{self.path}: expected a new folder to write to, found something there")
        if not self.path.absolute().parent.is_dir():
            raise ConfigError(f"{self.path}: expected its parent to be a folder, found none")
        self._schema = schema
        self._model = model
        self._beside = self.path.absolute().with_name(f".{self.path.name}.tmp-{os.getpid()}")
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._ids: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._num_rows = 0
        self._records: IO[bytes] | None = None
        self._lock = -1

    def __enter__(self) -> FeatureFileWriter:
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside.mkdir()
        self._lock = os.open(self._beside, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes anything
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_abandoned(self.path.absolute())
        self._records = open(self._beside / _RECORDS, "wb")
        return self

    def add(self, ids: np.ndarray, columns: Sequence[Column]) -> None:
        """Writes rows.

        Args:
          ids: [n] int64.
          columns: one a feature of the schema, n rows each, in the form of spec/columns.py.
        """
        assert self._records is not None, "used outside of its with"
        data, places = encode_records(self._schema, ids, columns)
        self._records.write(data.data)
        self._digest.update(data.data)
        self._num_rows += len(ids)
        self._ids.append(ids.copy())
        self._places.append(places + self._num_bytes)
        self._num_bytes += len(data)

    @property
    def num_rows(self) -> int:
        """Rows written so far."""
        return self._num_rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._records is not None
        try:
            self._records.flush()
            os.fsync(self._records.fileno())
            self._records.close()
            if kind is None:
                self._finish()
        finally:
            self._records.close()
            shutil.rmtree(self._beside, ignore_errors=True)
            os.close(self._lock)

    def _finish(self) -> None:
        ids, places = _joined(self._ids), _joined(self._places)
        index, twice = index_records(ids, places)
        if twice is not None:
            raise ConfigError(
                f"{self.path}: expected every id once, got id {ids[twice[0]]} in rows {twice[0]} and "
                f"{twice[1]} of the data"
            )
        _write(self._beside / _INDEX, index.data)
        files = {
            _INDEX: {"bytes": len(index), "sha256": hashlib.sha256(index.data).hexdigest()},
            _RECORDS: {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()},
        }
        document = {
            "format_version": _FORMAT_VERSION,
            "model": self._model,
            "features": self._schema.features,
            "fingerprint": self._schema.fingerprint,
            "rows": len(ids),
            "files": files,
        }
        text = json.dumps({**document, "digest": _digest_of(document)}, indent=1) + "\n"
        _write(self._beside / _MANIFEST, text.encode())
        os.rename(self._beside, self.path)


def _remove_abandoned(path: Path) -> None:
    """Removes the folders of writers to a path that are gone: none has the number, or the lock."""
    for left in path.parent.glob(glob.escape(f".{path.name}.tmp-") + "*"):
        pid = left.name.rpartition("-")[2]
        if not pid.isdecimal() or Path(f"/proc/{pid}").exists():
            continue
        with contextlib.suppress(OSError):  # locked, or another was faster
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts one after the other, and none of them kept."""
    whole = np.concatenate([np.zeros(0, np.int64), *parts])
    parts.clear()
    return whole


def _write(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest_of(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """What features.json says, and its digest."""
    file = path / _MANIFEST
    try:
        document = json.loads(read_file(file))
    except OSError as error:
        raise BundleError(
            f"{file}: can't be read: {error.strerror}; `xlarank features build` writes feature files"
        ) from error
    except ValueError as error:
        raise BundleError(f"{file}: not a whole JSON document: {error}") from error
    if not isinstance(document, dict) or document.get("format_version") != _FORMAT_VERSION:
        found = document.get("format_version") if isinstance(document, dict) else None
        raise BundleError(
            f"{file}: expected format version {_FORMAT_VERSION}, got {found!r}; build the feature file again"
        )
    # With the right digest it is as it was written, key by key.
    digest = document.pop("digest", None)
    if digest != _digest_of(document):
        raise BundleError(f"{file}: damaged or edited: its digest doesn't match its content")
    return document, digest


def _schema(manifest: Mapping[str, Any]) -> FeatureSchema:
    return FeatureSchema(
        tuple((name, kind, dtype, width) for name, kind, dtype, width in manifest["features"])
    )


def _map(path: Path, expected: Mapping[str, Any], maps: dict[str, mmap.mmap]) -> np.ndarray:
    """The bytes of a file, checked; its mapping is added to the others by its name."""
    try:
        with open_file(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != expected["bytes"]:
                kind = "truncated" if num_bytes < expected["bytes"] else "too long"
                raise BundleError(f"{path}: {kind}: expected {expected['bytes']} bytes, got {num_bytes}")
            if num_bytes == 0:  # nothing can't be mapped
                data: Any = b""
            else:
                data = maps[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BundleError(f"{path}: can't be read: {error.strerror or error}") from error
    array = np.frombuffer(data, np.uint8)
    digest = hashlib.sha256()
    for begin in range(0, num_bytes, _HASH_CHUNK):
        digest.update(array[begin : begin + _HASH_CHUNK].data)
    if digest.hexdigest() != expected["sha256"]:
        raise BundleError(f"{path}: damaged: its sha256 isn't that of features.json")
    return array
