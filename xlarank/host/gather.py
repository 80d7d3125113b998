"""Fills the buffers of a batch from raw requests, in one pass: `Gatherer`."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from xlarank.errors import BucketError, ConfigError, FeatureError, RequestError
from xlarank.host._extension import native
from xlarank.host.device_rows import DeviceRows
from xlarank.host.plan import native_plan
from xlarank.host.prefetch import measure_lines_ahead
from xlarank.host.reference import gather_numpy
from xlarank.host.shared_rows import SharedRows
from xlarank.host.tables import HostTable, check_writable, host_tables
from xlarank.host.updates import encode_update
from xlarank.spec import (
    Bucket,
    Column,
    ModelSpec,
    Ragged,
    RankRequest,
    Signature,
    StringColumn,
    check_contents,
)

__all__ = ["BoundRequest", "Gatherer", "Segment"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class BoundRequest:
    """A request made ready for `Gatherer.gather`; keeps its arrays alive."""

    request: RankRequest
    """What was bound."""

    token: object
    """Of the gatherer that bound it."""

    handle: Any
    """The kernel's pointers to its columns; None in NumPy."""

    @property
    def num_candidates(self) -> int:
        """N."""
        return self.request.num_candidates


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """Candidates ``[begin, end)`` of a request, and its context: its share of one batch."""

    request: BoundRequest
    """From `Gatherer.bind`."""

    begin: int
    """First candidate."""

    end: int
    """One past the last candidate; > begin."""


class Gatherer:
    """Preprocesses, looks up, pools and writes the features of a batch, one native call a batch.

    Any thread may call any method; a call that finds the helper threads busy does its work alone. The
    result doesn't depend on the number of threads or on how requests are split, by a bit.

    Attributes:
      spec: the model.
      signature: names and places of what is written.
      backend: "native" or "numpy".
      lines_ahead: distance of the prefetch in cache lines by table; empty in NumPy.
      device_rows: by table, of those that devices hold rows of.
      shared_rows: by table, of those that other processes update too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tables: Mapping[str, HostTable | np.ndarray],
        *,
        num_threads: int = 1,
        backend: str = "auto",
        unused: Collection[str] = (),
        activations: str = "float32",
        lines_ahead: int | None = None,
        device_rows: Sequence[DeviceRows] = (),
        is_updated: bool = True,
        shared_rows: Mapping[str, SharedRows] = MappingProxyType({}),
    ) -> None:
        """Prepares vocabularies and threads, and measures how far to prefetch.

        Args:
          spec: the model, fitted.
          tables: by name, in the format of their TableSpecs; a float32 table may be a C-contiguous array
            [R, D]. Best 64-byte aligned; kept, not copied.
          num_threads: threads that gather, the caller among them; >= 1.
          backend: "native", "numpy" (the slow reference), or "auto": native where it is built.
          unused: names of features that the program doesn't read. A request still brings them and they are
            still checked, but they are neither looked up nor written.
          activations: dtype of the matrices and sequences, "float32" or "bfloat16": preprocessed and pooled
            in float32, then rounded to the nearest, ties to even.
          lines_ahead: cache lines to prefetch ahead in every table, 0 for none; by default measured on the
            tables, some milliseconds for each row size.
          device_rows: rows that devices look up, a table each: their places are written, and the vectors hold
            the share of the other rows.
          is_updated: whether `update_rows` may be called; without it rows of updatable tables may be
            read-only, as while compiling.
          shared_rows: of updatable tables that other processes look up in and update too, by name; takes the
            native kernel.

        Raises:
          ConfigError: if a number is out of range, spec and tables disagree, an updatable table that is
            updated is read-only, `unused`, `activations` or `device_rows` isn't as stated, or the backend
            isn't there.
        """
        spec.check_fitted()
        if num_threads < 1:
            raise ConfigError(f"num_threads must be >= 1; was {num_threads}")
        if backend not in ("auto", "native", "numpy"):
            raise ConfigError(f"backend must be 'auto', 'native' or 'numpy'; was {backend!r}")
        if backend == "native" and native is None:
            raise ConfigError(
                "backend 'native' was asked for but the kernel isn't built; `pip install .` builds it"
            )
        if lines_ahead is not None and lines_ahead < 0:
            raise ConfigError(f"lines_ahead must be >= 0; was {lines_ahead}")
        self.spec = spec
        placements = [rows.placement for rows in device_rows]
        self.signature = Signature.of_model(spec, unused, activations, placements)
        for rows in device_rows:
            rows.check(spec)
        self.device_rows = {rows.placement.table: rows for rows in device_rows}
        self.backend = "numpy" if backend == "numpy" or native is None else "native"
        self.lines_ahead: dict[str, int] = {}
        self._tables = host_tables(spec, tables)
        self._is_updated = is_updated
        if is_updated:
            check_writable(spec, self._tables)
        self.shared_rows = shared_rows
        if shared_rows and self.backend == "numpy":
            raise ConfigError(
                f"tables {sorted(shared_rows)} are updated by several processes, which takes the native "
                f"kernel: build it with `pip install .`, or serve with one process"
            )
        self._token = object()
        self._updates = threading.Lock()  # held by who reads or writes rows in NumPy
        self._has_updates = False  # moves one way, before any row changes
        self._kernel: Any = None
        if self.backend == "native":
            if lines_ahead is None:
                self.lines_ahead = measure_lines_ahead(self._tables)
            else:
                self.lines_ahead = dict.fromkeys(self._tables, lines_ahead)
            self._kernel = native_plan(
                spec,
                self.signature,
                self._tables,
                self.lines_ahead,
                num_threads,
                device_rows=self.device_rows,
                shared_rows=shared_rows,
            )

    @property
    def has_updates(self) -> bool:
        """Whether an update has begun, here or of shared rows: they may not be those that were loaded."""
        return self._has_updates or any(rows.has_updates for rows in self.shared_rows.values())

    def update_rows(self, table: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes rows of an updatable table while others gather.

        Every gather that begins after this returns reads the new values; no gather reads a row in two
        halves. One of the kernel waits for no more than the copy of one row; in NumPy gathers and updates
        take turns. Of a number that is there twice the last wins.

        Args:
          table: its name.
          rows: [K] integers, row numbers in [0, R).
          values: [K, D] floats, finite; encoded in the table's format.

        Raises:
          RequestError: if there is no such table, it isn't updatable, or the arrays aren't as stated; nothing
            is written then.
        """
        if not isinstance(table, str) or table not in self.spec.table_by_name:
            raise RequestError(
                f"model {self.spec.name!r}: expected one of the tables {sorted(self.spec.table_by_name)}, "
                f"got {table!r}"
            )
        if not self._is_updated:
            raise RequestError(
                f"table {table!r} isn't updated here: its gatherer was made with is_updated=False"
            )
        encoded = encode_update(self.spec.table_by_name[table], rows, values)
        numbers = np.asarray(rows).astype(np.int32)
        if not len(numbers):
            return
        self._has_updates = True
        if self._kernel is not None:
            index = [t.name for t in self.spec.tables].index(table)
            shared = self.shared_rows.get(table)
            with contextlib.nullcontext() if shared is None else shared.writing():
                self._kernel.update_rows(index, numbers, encoded.rows)
            return
        with self._updates:
            for number, row in zip(numbers, encoded.rows, strict=True):
                self._tables[table].rows[number] = row

    def device_arrays(self) -> Iterator[np.ndarray]:
        """The rows that devices hold, as they are when their turn comes: an array a
        `Signature.device_tables`, see `DeviceTable`. Each is a copy, made when it is asked for."""
        for table in self.signature.device_tables:
            yield self.device_rows[table.name].array(self._tables[table.name])

    def device_update(self, table: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What devices hold of some rows, as the host has them now.

        Args:
          table: one of `device_rows`.
          rows: [n] row numbers.

        Returns:
          Places on the device [m] int32, and the rows [m, ...] as `device_arrays` has them.
        """
        held = self.device_rows[table]
        places = held.places_of(rows)
        is_held = places >= 0
        dtype = next(t.dtype for t in self.signature.device_tables if t.name == table)
        return places[is_held], self._tables[table].rows[rows[is_held]].view(np.dtype(dtype))

    def check(self, spec: ModelSpec, columns: Sequence[Column]) -> None:
        """A `ContentCheck` for `RankRequest`: what `check_contents` refuses, at native speed.

        Raises:
          FeatureError: as `check_contents`, which has the last word on everything the kernel doesn't accept.
        """
        if self._kernel is not None and spec is self.spec and self._kernel.accepts(columns):
            return
        check_contents(spec, columns)

    def bind(self, request: RankRequest) -> BoundRequest:
        """Makes a request ready for `gather`; once a request, cheap, in the thread that has the request.

        Raises:
          ConfigError: if the request was made for another model.
        """
        if not self.spec.takes_requests_of(request.spec):
            raise ConfigError(
                f"expected a request of model {self.spec.name!r} as gathered here, got one made for "
                f"another spec, of model {request.spec.name!r}: make it with the engine's spec"
            )
        if self._kernel is None:
            return BoundRequest(request, self._token, None)
        handle = self._kernel.bind(request.columns, request.num_candidates)
        if handle is None:
            # Valid but in another form, such as int32 string offsets; or changed since its check.
            columns = tuple(_plain(column) for column in request.columns)
            check_contents(self.spec, columns)
            handle = self._kernel.bind(columns, request.num_candidates)
        if handle is None:
            raise FeatureError(f"{request!r}: its columns changed after they were checked")
        return BoundRequest(request, self._token, handle)

    def gather(self, segments: Sequence[Segment], bucket: Bucket, out: Mapping[str, np.ndarray]) -> None:
        """Writes a batch: context s and the candidates of segment s, for every segment in order.

        Every byte of `out` is written: rows past the total repeat the last valid row, contexts past the
        last repeat the last; positions of a sequence past its length are zeros and their mask False. The
        GIL is released while the kernel works.

        Args:
          segments: at least one, none empty; a context is looked up once a segment.
          bucket: holds them.
          out: one writable C-contiguous array of ``leaf.shape(bucket)`` and ``leaf.dtype`` for each leaf of
            `signature`, and nothing else.

        Raises:
          BucketError: if the bucket doesn't hold the segments.
          ConfigError: for segments or arrays that aren't as stated.
          FeatureError: for an id out of range under policy `error`, which `RankRequest` has refused before.
        """
        self._check_segments(segments, bucket)
        self._check_out(bucket, out)
        if self._kernel is None:
            parts = [(s.request.request, s.begin, s.end) for s in segments]
            with self._updates:
                gather_numpy(self.spec, self.signature, self._tables, parts, out, self.device_rows)
            return
        bad = self._kernel.gather(
            [(s.request.handle, s.begin, s.end) for s in segments],
            bucket.rows,
            bucket.requests,
            [out[leaf.name] for leaf in self.signature.leaves],
        )
        if bad >= 0:
            feature = self.spec.features[bad]
            table = self.spec.table_of(feature)
            raise FeatureError(
                f"feature {feature.name!r}: expected ids in [0, {table.num_rows}) of table {table.name!r}; "
                f"a request was changed after its check"
            )

    def _check_segments(self, segments: Sequence[Segment], bucket: Bucket) -> None:
        if not segments:
            raise ConfigError("gather: expected at least one segment, got none")
        for index, segment in enumerate(segments):
            num_candidates = segment.request.num_candidates
            if not 0 <= segment.begin < segment.end <= num_candidates:
                raise ConfigError(
                    f"gather: segment {index}: expected 0 <= begin < end <= {num_candidates} candidates, "
                    f"got [{segment.begin}, {segment.end})"
                )
            if segment.request.token is not self._token:
                raise ConfigError(f"gather: segment {index}: its request was bound by another gatherer")
        num_rows = sum(segment.end - segment.begin for segment in segments)
        if not bucket.holds(num_rows, len(segments)):
            raise BucketError(
                f"gather: bucket {bucket} (rows x requests) doesn't hold {num_rows} rows of "
                f"{len(segments)} requests"
            )

    def _check_out(self, bucket: Bucket, out: Mapping[str, np.ndarray]) -> None:
        if out.keys() != self.signature.leaf_by_name.keys():
            raise ConfigError(
                f"gather: expected arrays {sorted(self.signature.leaf_by_name)}, got {sorted(out)}"
            )
        for leaf in self.signature.leaves:
            array, shape = out[leaf.name], leaf.shape(bucket)
            if array.shape != shape or array.dtype != leaf.dtype:
                raise ConfigError(
                    f"gather: leaf {leaf.name!r}: expected {leaf.dtype} of shape {list(shape)}, "
                    f"got {array.dtype} of shape {list(array.shape)}"
                )
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ConfigError(f"gather: leaf {leaf.name!r}: expected a writable C-contiguous array")


def _plain(column: Column) -> Column:
    """A column in the dtypes and strides of spec/columns.py."""
    if isinstance(column, Ragged):
        values = _plain(column.values)
        assert not isinstance(values, Ragged)
        return Ragged(values, np.ascontiguousarray(column.lengths, np.int32))
    if isinstance(column, StringColumn):
        blob = np.ascontiguousarray(column.blob, np.uint8)
        return StringColumn(blob, np.ascontiguousarray(column.offsets, np.int64))
    return np.ascontiguousarray(column)
