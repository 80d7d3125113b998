"""Writing a bundle: `BundleWriter`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from xlarank.bundle.arrays import write_arrays
from xlarank.bundle.digests import digest_of
from xlarank.bundle.manifest import (
    CACHE_FOLDER,
    DEVICE_ROWS_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    PARAMS_FILE,
    PROGRAMS_FOLDER,
    FileDigest,
    Manifest,
    table_file,
)
from xlarank.bundle.manifest_json import manifest_from_json, manifest_to_json
from xlarank.bundle.reader import Bundle
from xlarank.bundle.repository import versions_in
from xlarank.bundle.requests import write_requests
from xlarank.bundle.staging import Staging, sync_path
from xlarank.bundle.tables import digests_file, write_array
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import RankRequest

__all__ = ["BundleWriter"]

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_STORED_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, np.uint16, np.uint8))
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class BundleWriter:
    """Writes one version of a model beside its published ones, and publishes it with one rename.

    Used as a context manager by one thread: leaving it without `publish`, by an exception or not, leaves
    nothing behind.

        with BundleWriter(repository, spec.name) as writer:
            file = writer.add_program("plain-8x1.bin", data)
            ...
            path = writer.publish(Manifest(...))
    """

    def __init__(self, repository: Path | str, model: str, version: int | None = None) -> None:
        """Says what is going to be written; `__enter__` makes the folder.

        Args:
          repository: folder of models; made if missing.
          model: the model's name, that of its spec.
          version: None for 1 + the highest there is.

        Raises:
          ConfigError: for a name or a version that can't be a folder.
        """
        if not _MODEL_NAME.fullmatch(model):
            raise ConfigError(f"bundle: expected a model name of [A-Za-z0-9_.-], got {model!r}")
        if version is not None and not 1 <= version < 10**18:
            raise ConfigError(f"bundle of {model!r}: version must be in [1, 10**18); was {version}")
        self._model_folder = Path(repository) / model
        self._model = model
        self._version = version
        self._staging: Staging | None = None  # None before __enter__ and after publish
        self._digests: dict[str, str] = {}  # by path: sha256 of what a file must hold
        self._param_names: set[str] | None = None

    def __enter__(self) -> BundleWriter:
        """Makes the hidden folder, and removes those of writers that died.

        Raises:
          BundleError: if the version exists already, or the folder can't be made.
        """
        if self._version is not None and (self._model_folder / str(self._version)).exists():
            raise self._exists_already()
        try:
            self._staging = Staging(self._model_folder)
        except OSError as error:
            raise BundleError(f"{self._model_folder}: can't be written: {error.strerror}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._staging is not None:
            self._staging.discard()
            self._staging = None

    @property
    def staging(self) -> Path:
        """The hidden folder."""
        if self._staging is None:
            raise ConfigError(f"bundle of {self._model!r}: the writer isn't open, or has published already")
        return self._staging.path

    @property
    def cache_dir(self) -> Path:
        """Folder for compiled code; made by the first look at it. What lies there at `publish` goes along."""
        folder = self.staging / CACHE_FOLDER
        folder.mkdir(exist_ok=True)
        return folder

    def add_program(self, file_name: str, data: bytes) -> str:
        """Writes an exported program; returns its path in the bundle, for the manifest."""
        return self._add_bytes(f"{PROGRAMS_FOLDER}/{_checked(file_name)}", data)

    def add_text(self, file_name: str, text: str) -> str:
        """Writes a file for people, such as report.html, as UTF-8; returns its path in the bundle."""
        return self._add_bytes(_checked(file_name), text.encode())

    def add_params(self, params: Mapping[str, np.ndarray]) -> str:
        """Writes the dense weights, of any dtype of `write_arrays`; returns the path in the bundle.

        Raises:
          ConfigError: names a weight of another dtype.
        """
        if "" in params:
            raise ConfigError(f"bundle of {self._model!r}: expected every param to have a name")
        target = self._new_file(PARAMS_FILE)
        write_arrays(target, params, {"format": "xlarank.params", "format_version": "1"})
        self._digests[PARAMS_FILE] = digest_of(target).sha256
        self._param_names = set(params)
        return PARAMS_FILE

    def add_table(self, name: str, table: np.ndarray) -> str:
        """Writes a table as a stream; returns its path in the bundle.

        Args:
          name: of the table.
          table: encoded rows in the `stored_form` of the manifest's spec, which `publish` compares; [R, D]
            float32 for a float32 table.

        Raises:
          ConfigError: for an array that is the form of no row format.
        """
        if table.ndim != 2 or table.dtype not in _STORED_DTYPES:
            allowed = ", ".join(dtype.name for dtype in _STORED_DTYPES)
            raise ConfigError(
                f"table {name!r}: expected an array [R, n] of {allowed}, got {table.dtype} of shape "
                f"{list(table.shape)}"
            )
        path = table_file(_checked(name))
        self._digests[path], digests = write_array(self._new_file(path), table)
        self._add_bytes(digests_file(path), digests)
        return path

    def add_device_rows(self, numbers: Mapping[str, np.ndarray]) -> str:
        """Writes which rows of split tables devices hold; returns the path in the bundle.

        Args:
          numbers: by table, [K] int32 row numbers, ascending.
        """
        target = self._new_file(DEVICE_ROWS_FILE)
        write_arrays(target, numbers, {"format": "xlarank.device_rows", "format_version": "1"})
        self._digests[DEVICE_ROWS_FILE] = digest_of(target).sha256
        return DEVICE_ROWS_FILE

    def add_golden(
        self, requests: Sequence[RankRequest], values: Mapping[str, Mapping[str, np.ndarray]]
    ) -> str:
        """Writes golden requests and their reference scores; returns the path in the bundle.

        Args:
          requests: at least one.
          values: ``{"scores": {task: [rows] float32}}`` for every task, the candidates of all requests in
            order; other groups, such as "labels", may come along.

        Raises:
          ConfigError: if a task has no scores, or `write_requests` refuses.
        """
        target = self._new_file(GOLDEN_FILE)
        if requests:
            tasks = [task.name for task in requests[0].spec.tasks]
            scored = values.get("scores", {})
            if missing := [task for task in tasks if task not in scored]:
                raise ConfigError(
                    f"{GOLDEN_FILE}: expected scores of the tasks {tasks}, got none of {missing}"
                )
        write_requests(target, requests, values)
        self._digests[GOLDEN_FILE] = digest_of(target).sha256
        return GOLDEN_FILE

    def publish(self, manifest: Manifest) -> Path:
        """Hashes every file, writes the manifest, waits for the disk, and renames.

        Args:
          manifest: without version, files and cache_files, which are filled in here.

        Returns:
          The version's folder.

        Raises:
          BundleError: if the version asked for exists, or a file on the disk isn't what was added.
          ConfigError: if the manifest doesn't fit what was added.
        """
        self._check_fits(manifest)
        files, cache_files = self._digest_files()
        manifest = dataclasses.replace(manifest, files=files, cache_files=cache_files)
        # What no reader could use is never published.
        staged = Bundle(self.staging, manifest)
        staged.golden()
        staged.params()
        for folder, _, names in os.walk(self.staging):
            for name in names:
                sync_path(Path(folder) / name)
            sync_path(Path(folder))
        while True:
            version = self._version or 1 + max(versions_in(self._model_folder), default=0)
            self._write_manifest(dataclasses.replace(manifest, version=version))
            assert self._staging is not None
            target = self._staging.publish(version)
            if target is not None:
                self._staging = None
                return target
            if self._version is not None:
                raise self._exists_already()

    def _check_fits(self, manifest: Manifest) -> None:
        where = f"bundle of {self._model!r}"
        if manifest.spec.name != self._model:
            raise ConfigError(f"{where}: the manifest is of model {manifest.spec.name!r}")
        if missing := [path for path in manifest.required_files if path not in self._digests]:
            raise ConfigError(f"{where}: the manifest needs {missing}, which were not added")
        if self._param_names != set(manifest.params):
            raise ConfigError(
                f"{where}: the manifest orders the params {sorted(manifest.params)}, "
                f"those added are {sorted(self._param_names or ())}"
            )

    def _digest_files(self) -> tuple[dict[str, FileDigest], dict[str, FileDigest]]:
        """Digests of the files on the disk, outside and under cache/, compared with what was added."""
        files: dict[str, FileDigest] = {}
        cache_files: dict[str, FileDigest] = {}
        for target in sorted(self.staging.rglob("*")):
            if not target.is_file() or target == self.staging / MANIFEST_FILE:
                continue
            path = target.relative_to(self.staging).as_posix()
            digest = digest_of(target)
            if digest.sha256 != self._digests.get(path, digest.sha256):
                raise BundleError(f"{target}: reads back different from what was written")
            (cache_files if path.startswith(f"{CACHE_FOLDER}/") else files)[path] = digest
        return files, cache_files

    def _write_manifest(self, manifest: Manifest) -> None:
        path = self.staging / MANIFEST_FILE
        path.write_text(manifest_to_json(manifest))
        if manifest_from_json(path.read_bytes(), file=str(path)) != manifest:
            raise BundleError(f"{path}: reads back different from what was written")
        sync_path(path)
        sync_path(self.staging)

    def _add_bytes(self, path: str, data: bytes) -> str:
        self._new_file(path).write_bytes(data)
        self._digests[path] = hashlib.sha256(data).hexdigest()
        return path

    def _new_file(self, path: str) -> Path:
        """Where a file goes; its folder is made."""
        target = self.staging / path
        if path in self._digests or path in (MANIFEST_FILE, CACHE_FOLDER):
            raise ConfigError(f"bundle of {self._model!r}: {path!r} is there already or the writer's own")
        target.parent.mkdir(exist_ok=True)
        return target

    def _exists_already(self) -> BundleError:
        return BundleError(
            f"{self._model_folder / str(self._version)}: exists already; a published version never changes: "
            f"leave the version out to get the next one"
        )


def _checked(file_name: str) -> str:
    if not _FILE_NAME.fullmatch(file_name):
        raise ConfigError(f"bundle: expected a file name of [A-Za-z0-9_.+-], got {file_name!r}")
    return file_name
