"""What the kernel's feature table takes and gives, as columns: `FeatureTable`."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xlarank.errors import ConfigError, FeatureError, RequestError, XlarankError
from xlarank.host._extension import native
from xlarank.host.feature_schema import FeatureSchema
from xlarank.spec import Column, Ragged, StringColumn

__all__ = ["FeatureTable", "check_joined_bytes", "encode_records", "index_records", "row_bytes"]


class FeatureTable:
    """The kernel's store of records by id. Any thread; lookups take no lock and leave the GIL to others.

    Attributes:
      schema: what a record holds.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        max_lengths: Sequence[int] = (),
        limit: int = 0,
        index: np.ndarray | None = None,
        records: np.ndarray | None = None,
    ) -> None:
        """
        Args:
          schema: of the records.
          max_lengths: of each feature, 0 for none: of a list a lookup gives the last so many ids. All by
            default.
          limit: bytes of memory that records put in may take; 0 for no limit.
          index: [bytes] uint8 of a file's index, mapped; kept, not copied. None for no file.
          records: [bytes] uint8 that it points into.

        Raises:
          ConfigError: if the kernel isn't built, or there is no memory for the index of that limit.
          ValueError: if the file isn't one that every lookup stays inside of.
        """
        if native is None:
            raise ConfigError("candidate features by id need the native kernel; `pip install .` builds it")
        self.schema = schema
        self._order_of = functools.lru_cache(maxsize=64)(self._find_order)
        try:
            self._native: Any = native.FeatureTable(schema.native, list(max_lengths), limit, index, records)
        except MemoryError:
            raise ConfigError(
                f"feature store: the system has no memory for the index of a cache of {limit} bytes"
            ) from None

    def lookup(
        self, ids: np.ndarray, wanted: Sequence[bool], *, oldest: int = 0, max_bytes: int | None = None
    ) -> tuple[list[Column], np.ndarray]:
        """Columns of the rows that there are, in the order of ids, and the positions of the others.

        Args:
          ids: [N] int64.
          wanted: one a feature: whether its column is asked for.
          oldest: rows in memory that were put in at an earlier time aren't there.
          max_bytes: of the columns, as `row_bytes` counts; no more is allocated. None for any number.

        Returns:
          One column a wanted feature, of N - M rows; [M] int64 positions in `ids`, ascending.

        Raises:
          RequestError: for columns of more bytes.
        """
        try:
            found = self._native.lookup(ids, list(wanted), oldest, max_bytes or 0)
        except MemoryError:
            raise XlarankError(f"feature store: no memory for the features of {len(ids)} ids") from None
        floats, integers, others, missing, num_bytes = found
        check_joined_bytes(len(ids), num_bytes, max_bytes)
        num_rows = len(ids) - len(missing)
        order, forms = self._order_of(tuple(wanted))
        blocks: dict[_Place, Iterator[Any]] = {
            _Place.FLOATS: iter(floats.reshape(order.count(_Place.FLOATS), num_rows, 1)),
            _Place.INTEGERS: iter(integers.reshape(order.count(_Place.INTEGERS), num_rows)),
            _Place.OTHERS: map(_column, forms, others),
        }
        return [next(blocks[place]) for place in order], missing

    def put(
        self,
        ids: np.ndarray,
        columns: Sequence[Column],
        stamps: np.ndarray | None = None,
        *,
        time: int = 0,
        oldest: int = 0,
    ) -> None:
        """Puts rows in: every lookup that begins after the return sees them, or newer ones.

        Args:
          ids: [n] int64; of an id that comes twice the last row stays.
          columns: one a feature, n rows each, in the form of spec/columns.py.
          stamps: of `stamps`, before the rows were read from elsewhere: then those that are there by now, or
            were written to since, are left as they are.
          time: of the rows, in [0, 2**32), in the caller's unit; best never less than before.
          oldest: with stamps, rows of an earlier time count as not there.

        Raises:
          FeatureError: for a row of more than 2 GiB; none is put in then.
          XlarankError: if memory runs out; some of the rows are in then.
        """
        try:
            self._native.put(ids, _native_columns(columns), stamps, time, oldest)
        except (ValueError, RuntimeError) as error:  # std::length_error arrives as the one or the other
            raise FeatureError(f"feature store: {error}") from error
        except MemoryError:
            raise XlarankError(
                f"feature store: no memory for {len(ids)} rows beside its {self.stats()['bytes']} bytes"
            ) from None

    def remove(self, ids: np.ndarray, *, time: int = 0) -> int:
        """Takes rows out; returns how many there were. That a row of a file is out is a row in memory, of a
        time."""
        return self._native.remove(ids, time)

    def stamps(self, ids: np.ndarray) -> np.ndarray:
        """[n] uint64 to hand to `put` with rows that are read after this."""
        return self._native.stamps(ids)

    def stats(self) -> dict[str, int]:
        """rows, rows_in_memory, bytes, hits, misses, evictions, version, oldest (time, -1 without rows in
        memory)."""
        return self._native.stats()

    def _find_order(self, wanted: tuple[bool, ...]) -> tuple[list[_Place], list[tuple[str, str, int]]]:
        """Where the column of each wanted feature is; and kind, dtype and width of those by themselves."""
        forms = [form for form, is_wanted in zip(self.schema.native, wanted, strict=True) if is_wanted]
        order = [_place_of(*form) for form in forms]
        return order, [f for f, place in zip(forms, order, strict=True) if place is _Place.OTHERS]


def row_bytes(column: Column) -> np.ndarray:
    """[n] int64, bytes of each row of a column as raw contents of tensors hold them, lengths included."""
    if isinstance(column, StringColumn):
        return 4 + np.diff(column.offsets)
    if isinstance(column, np.ndarray):
        return np.full(len(column), column[:1].nbytes, np.int64)
    ends = np.zeros(len(column.values) + 1, np.int64)
    np.cumsum(row_bytes(column.values), out=ends[1:])
    last = np.cumsum(column.lengths, dtype=np.int64)
    return 4 + ends[last] - ends[last - column.lengths]


def check_joined_bytes(num_ids: int, num_bytes: int, max_bytes: int | None) -> None:
    """Raises RequestError if the features of so many ids are more than a request may bring itself."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise RequestError(
            f"candidate_ids: expected at most {max_bytes} bytes of stored features, which is what a request "
            f"may bring itself, got {num_bytes} for {num_ids} ids; send fewer candidates in a request"
        )


def encode_records(
    schema: FeatureSchema, ids: np.ndarray, columns: Sequence[Column]
) -> tuple[np.ndarray, np.ndarray]:
    """Records as a file holds them.

    Args:
      schema: of the columns.
      ids: [n] int64.
      columns: one a feature, n rows each.

    Returns:
      [bytes] uint8 and [n] int64, where each record begins.
    """
    assert native is not None
    return native.encode_records(schema.native, ids, _native_columns(columns))


def index_records(ids: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The index of records by id.

    Args:
      ids: [n] int64.
      places: [n] int64, where the record of each begins.

    Returns:
      [bytes] uint8 and None; or nothing and the two rows of an id that comes twice.
    """
    assert native is not None
    index, first, second = native.index_records(ids, places)
    return index, None if first < 0 else (first, second)


def _native_columns(columns: Sequence[Column]) -> list[Column]:
    return [np.ascontiguousarray(c) if isinstance(c, np.ndarray) else c for c in columns]


class _Place(enum.Enum):
    """Where a lookup of the kernel has a feature's column."""

    FLOATS = enum.auto()
    """One row of a block: dense, of width 1."""

    INTEGERS = enum.auto()
    """One row of a block: an integer id."""

    OTHERS = enum.auto()
    """By itself."""


def _place_of(kind: str, dtype: str, width: int) -> _Place:
    if kind == "dense" and width == 1:
        return _Place.FLOATS
    return _Place.INTEGERS if kind == "id" and dtype == "int64" else _Place.OTHERS


def _column(form: tuple[str, str, int], values: Any) -> Column:
    kind, dtype, width = form
    if kind in ("id_list", "sequence"):
        values, lengths = values
        return Ragged(StringColumn(*values) if dtype == "string" else values, lengths)
    if dtype == "string":
        return StringColumn(*values)
    return values.reshape(-1, width) if kind == "dense" else values
