"""Requests and values for their rows in one safetensors file: golden requests and validation samples.

Columns of all requests lie back to back. `num_candidates` [n] int64 holds each request's N; "rows" is their
sum for scope candidate and n for scope context:

    feature.<name>            [rows, K_f] float32, [rows] float32 or int64
    feature.<name>.lengths    [rows] int32: the bag of each row of a list or sequence
    feature.<name>.values     [V] int64: its ids
    feature.<name>.blob       [bytes] uint8: all strings, of rows or of bags, back to back
    feature.<name>.offsets    [rows + 1] or [V + 1] int64: where they begin and end
    values.<group>.<task>     [candidates of all requests] float32
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xlarank.bundle.arrays import read_arrays, write_arrays
from xlarank.errors import BundleError, ConfigError, FeatureError
from xlarank.spec import Column, FeatureSpec, ModelSpec, Ragged, RankRequest, Scope, StringColumn, ValueType

__all__ = ["read_requests", "write_requests"]

_METADATA = {"format": "xlarank.requests", "format_version": "1"}
_GROUP = re.compile(r"[a-z][a-z0-9_]*")


def write_requests(
    path: Path | str, requests: Sequence[RankRequest], values: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Writes requests of one model, and values for their candidates.

    Args:
      path: file to write; replaced once the new one is proven whole.
      requests: at least one, all checked against equal specs.
      values: by group ("scores", "labels", …) and task: [rows] float32, the candidates of all requests in
        order; NaN stands for "unknown".

    Raises:
      ConfigError: if the above doesn't hold.
      BundleError: if the file can't be written.
    """
    path = Path(path)
    if not requests:
        raise ConfigError(f"{path.name}: expected at least one request, got none")
    spec = requests[0].spec
    for position, request in enumerate(requests):
        if request.spec is not spec and request.spec != spec:
            raise ConfigError(
                f"{path.name}: request {position} was checked against another spec "
                f"(model {request.spec.name!r}) than request 0 (model {spec.name!r})"
            )
    counts = np.array([request.num_candidates for request in requests], np.int64)
    arrays = {"num_candidates": counts}
    for position, feature in enumerate(spec.features):
        columns = [request.columns[position] for request in requests]
        arrays |= _pack(f"feature.{feature.name}", columns)
    num_rows = int(counts.sum())
    for group, by_task in values.items():
        if not _GROUP.fullmatch(group):
            raise ConfigError(f"{path.name}: expected a group name of [a-z][a-z0-9_]*, got {group!r}")
        for task, array in by_task.items():
            where = f"{path.name}: {group} of task {task!r}"
            if task not in {t.name for t in spec.tasks}:
                raise ConfigError(f"{where}: the model has no such task; it has {_task_names(spec)}")
            if array.dtype != np.float32 or array.shape != (num_rows,):
                raise ConfigError(
                    f"{where}: expected float32 of shape [{num_rows}], got {array.dtype} of shape "
                    f"{list(array.shape)}"
                )
            arrays[f"values.{group}.{task}"] = array
    write_arrays(path, arrays, _METADATA)


def read_requests(
    path: Path | str, spec: ModelSpec
) -> tuple[list[RankRequest], dict[str, dict[str, np.ndarray]]]:
    """Reads what `write_requests` wrote, checking every request as if it had just arrived.

    Args:
      path: file to read.
      spec: the model; its features are those of the file.

    Returns:
      The requests, and the values as they were given: {group: {task: [rows] float32}}.

    Raises:
      BundleError: names the file, and the feature or task that is missing, unknown or malformed.
    """
    path = Path(path)
    arrays, metadata = read_arrays(path)
    if metadata != _METADATA:
        raise BundleError(f"{path}: expected a file of requests, {_METADATA}, got {metadata}")
    reader = _Reader(path, arrays)
    counts = reader.take("num_candidates", np.int64, (None,))
    # Python's sum: numpy's could wrap around on damaged counts.
    num_requests, num_rows = len(counts), sum(counts.tolist())
    if num_requests == 0 or counts.min() < 0:
        raise BundleError(f"{path}: num_candidates: expected at least one count, each >= 0, got {counts}")
    columns = {
        feature.name: reader.column(feature, num_requests if feature.scope is Scope.CONTEXT else num_rows)
        for feature in spec.features
    }
    values = reader.values(spec, num_rows)
    reader.check_all_taken()
    context_bounds = list(range(num_requests + 1))
    candidate_bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    parts = {
        f.name: _split(columns[f.name], context_bounds if f.scope is Scope.CONTEXT else candidate_bounds)
        for f in spec.features
    }
    requests: list[RankRequest] = []
    for position in range(num_requests):
        features = {name: column[position] for name, column in parts.items()}
        try:
            requests.append(RankRequest(spec, features))
        except FeatureError as error:
            raise BundleError(f"{path}: request {position}: {error}") from error
    return requests, values


class _Reader:
    """Takes arrays out of a file's dict, checking dtype and shape of each."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        self._path = path
        self._arrays = arrays

    def take(self, name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> np.ndarray:
        """An array of this dtype and shape, where None is any size."""
        array = self._arrays.pop(name, None)
        text = f"{np.dtype(dtype)} of shape {['any' if size is None else size for size in shape]}"
        if array is None:
            raise BundleError(f"{self._path}: {name!r} is missing: expected {text}")
        fits = array.dtype == dtype and array.ndim == len(shape)
        fits = fits and all(e is None or e == g for e, g in zip(shape, array.shape, strict=True))
        if not fits:
            raise BundleError(
                f"{self._path}: {name!r}: expected {text}, got {array.dtype} of shape {list(array.shape)}"
            )
        return array

    def column(self, feature: FeatureSpec, num_rows: int) -> Column:
        """The rows of a feature in all requests."""
        name = f"feature.{feature.name}"
        is_string = feature.dtype is ValueType.STRING
        if feature.is_ragged:
            lengths = self.take(f"{name}.lengths", np.int32, (num_rows,))
            num_values = int(lengths.sum(dtype=np.int64))
            if num_values < 0 or (lengths < 0).any():
                raise BundleError(f"{self._path}: '{name}.lengths': expected lengths >= 0, got {lengths}")
            if is_string:
                return Ragged(self._strings(name, num_values), lengths)
            return Ragged(self.take(f"{name}.values", np.int64, (num_values,)), lengths)
        if is_string:
            return self._strings(name, num_rows)
        dtype = np.float32 if feature.dtype is ValueType.FLOAT32 else np.int64
        return self.take(name, dtype, (num_rows,) if feature.is_lookup else (num_rows, feature.width))

    def values(self, spec: ModelSpec, num_rows: int) -> dict[str, dict[str, np.ndarray]]:
        """{group: {task: [rows] float32}}, tasks in the order of the spec."""
        groups = sorted({name.split(".")[1] for name in self._arrays if re.match(r"values\.[^.]+\.", name)})
        return {
            group: {
                task: self.take(f"values.{group}.{task}", np.float32, (num_rows,))
                for task in _task_names(spec)
                if f"values.{group}.{task}" in self._arrays
            }
            for group in groups
        }

    def check_all_taken(self) -> None:
        """Refuses arrays that the spec has no place for."""
        if self._arrays:
            raise BundleError(f"{self._path}: the model has no place for {sorted(self._arrays)}")

    def _strings(self, name: str, num_strings: int) -> StringColumn:
        offsets = self.take(f"{name}.offsets", np.int64, (num_strings + 1,))
        blob = self.take(f"{name}.blob", np.uint8, (None,))
        if offsets[0] != 0 or offsets[-1] != len(blob) or (offsets[1:] < offsets[:-1]).any():
            raise BundleError(
                f"{self._path}: '{name}.offsets': expected offsets that rise from 0 to {len(blob)} bytes, "
                f"got {offsets}"
            )
        return StringColumn(blob, offsets)


def _pack(name: str, columns: Sequence[Column]) -> dict[str, np.ndarray]:
    """Columns of one feature, back to back, as named arrays."""
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    if arrays:
        return {name: np.concatenate(arrays)}
    strings = [column for column in columns if isinstance(column, StringColumn)]
    if strings:
        sizes = np.concatenate([np.diff(column.offsets) for column in strings])
        offsets = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        blob = np.concatenate([column.blob for column in strings])
        return {f"{name}.blob": blob, f"{name}.offsets": offsets}
    bags = [column for column in columns if isinstance(column, Ragged)]
    values = _pack(name, [bag.values for bag in bags])
    if name in values:
        values = {f"{name}.values": values[name]}
    return {f"{name}.lengths": np.concatenate([bag.lengths for bag in bags]), **values}


def _split(column: Column, bounds: Sequence[int]) -> list[Column]:
    """Rows ``[bounds[i], bounds[i + 1])`` of a column, as views."""
    spans = list(itertools.pairwise(bounds))
    if isinstance(column, np.ndarray):
        return [column[a:b] for a, b in spans]
    if isinstance(column, StringColumn):
        ends = column.offsets
        return [
            StringColumn(column.blob[ends[a] : ends[b]], column.offsets[a : b + 1] - ends[a])
            for a, b in spans
        ]
    ends = np.concatenate([[0], np.cumsum(column.lengths, dtype=np.int64)])
    values = _split(column.values, [int(ends[bound]) for bound in bounds])
    bags: list[Column] = []
    for part, (a, b) in zip(values, spans, strict=True):
        assert not isinstance(part, Ragged)
        bags.append(Ragged(part, column.lengths[a:b]))
    return bags


def _task_names(spec: ModelSpec) -> list[str]:
    return [task.name for task in spec.tasks]
