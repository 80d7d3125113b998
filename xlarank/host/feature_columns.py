"""What the kernel's feature table takes and gives, as columns: `FeatureTable`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xlarank.errors import ConfigError, FeatureError
from xlarank.host._extension import native
from xlarank.host.feature_schema import FeatureSchema
from xlarank.spec import Column, Ragged, StringColumn

__all__ = ["FeatureTable", "encode_records", "index_records"]


class FeatureTable:
    """The kernel's store of records by id. Any thread; lookups take no lock and leave the GIL to others.

    Attributes:
      schema: what a record holds.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        limit: int = 0,
        index: np.ndarray | None = None,
        records: np.ndarray | None = None,
    ) -> None:
        """
        Args:
          schema: of the records.
          limit: bytes of memory that records put in may take; 0 for no limit.
          index: [bytes] uint8 of a file's index, mapped; kept, not copied. None for no file.
          records: [bytes] uint8 that it points into.

        Raises:
          ConfigError: if the kernel isn't built.
          ValueError: if the file isn't one that every lookup stays inside of.
        """
        if native is None:
            raise ConfigError("candidate features by id need the native kernel; `pip install .` builds it")
        self.schema = schema
        self._ragged = [kind in ("id_list", "sequence") for _, kind, _, _ in schema.features]
        self._is_text = [dtype == "string" for _, _, dtype, _ in schema.features]
        self._native: Any = native.FeatureTable(schema.native, limit, index, records)

    def lookup(self, ids: np.ndarray, wanted: Sequence[bool]) -> tuple[list[Column], np.ndarray]:
        """Columns of the rows that there are, in the order of ids, and the positions of the others.

        Args:
          ids: [N] int64.
          wanted: one a feature: whether its column is asked for.

        Returns:
          One column a wanted feature, of N - M rows; [M] int64 positions in `ids`, ascending.
        """
        columns, missing = self._native.lookup(ids, list(wanted))
        places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
        return [self._column(place, c) for place, c in zip(places, columns, strict=True)], missing

    def put(self, ids: np.ndarray, columns: Sequence[Column], stamps: np.ndarray | None = None) -> None:
        """Puts rows in: every lookup that begins after the return sees them, or newer ones.

        Args:
          ids: [n] int64; of an id that comes twice the last row stays.
          columns: one a feature, n rows each, in the form of spec/columns.py.
          stamps: of `stamps`, before the rows were read from elsewhere: then those that are there by now, or
            were written to since, are left as they are.

        Raises:
          FeatureError: for a row of more than 2 GiB; none is put in then.
        """
        try:
            self._native.put(ids, _native_columns(columns), stamps)
        except (ValueError, RuntimeError) as error:  # std::length_error arrives as the one or the other
            raise FeatureError(f"feature store: {error}") from error

    def remove(self, ids: np.ndarray) -> int:
        """Takes rows out; returns how many there were."""
        return self._native.remove(ids)

    def stamps(self, ids: np.ndarray) -> np.ndarray:
        """[n] uint64 to hand to `put` with rows that are read after this."""
        return self._native.stamps(ids)

    def stats(self) -> dict[str, int]:
        """rows, rows_in_memory, bytes, hits, misses, evictions, version."""
        return self._native.stats()

    def _column(self, place: int, values: Any) -> Column:
        if self._ragged[place]:
            values, lengths = values
            return Ragged(StringColumn(*values) if self._is_text[place] else values, lengths)
        return StringColumn(*values) if self._is_text[place] else values


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
