"""Columns that plain numpy arrays can't hold: strings and bags."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["Ragged", "StringColumn", "join_columns", "take"]


@dataclasses.dataclass(frozen=True, eq=False)
class StringColumn:
    """Strings back to back; string ``i`` is ``blob[offsets[i]:offsets[i + 1]]``, bytes of any kind."""

    blob: np.ndarray
    """[bytes] uint8."""

    offsets: np.ndarray
    """[n + 1] int64, from 0 to len(blob), non-decreasing."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_strings(cls, strings: Iterable[str | bytes]) -> StringColumn:
        """Packs Python strings (as UTF-8) or bytes.

        Raises:
          UnicodeEncodeError: for a string with a lone surrogate, which has no UTF-8.
          TypeError: for anything but strings and bytes.
        """
        parts = [s.encode() if isinstance(s, str) else s for s in strings]
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.frombuffer(b"".join(parts), np.uint8), offsets)  # join refuses other types

    def to_bytes(self) -> list[bytes]:
        """The strings as Python bytes."""
        blob = self.blob.tobytes()
        return [blob[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """Bags of ids, concatenated: bag ``i`` is the ``lengths[i]`` values after those of bags 0..i-1."""

    values: np.ndarray | StringColumn
    """[V] int64 or strings."""

    lengths: np.ndarray
    """[n] int32, each >= 0; they sum to V."""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_bags(cls, bags: Iterable[Iterable[int]] | Iterable[Iterable[str]]) -> Ragged:
        """Packs lists of ints, or lists of strings.

        Raises:
          TypeError: for values of another type, or of both.
          OverflowError: for an int beyond int64.
        """
        lists: list[list] = [list(bag) for bag in bags]
        lengths = np.array([len(bag) for bag in lists], np.int32)
        flat = [value for bag in lists for value in bag]
        if flat and isinstance(flat[0], (str, bytes)):
            return cls(StringColumn.from_strings(flat), lengths)
        return cls(np.array([operator.index(value) for value in flat], np.int64), lengths)


Column = np.ndarray | StringColumn | Ragged
"""Raw values of one feature for n rows."""


def take(column: Column, rows: np.ndarray) -> Column:
    """Rows of a column by number, as ``array[rows]`` does.

    Args:
      column: n rows.
      rows: [m] integer row numbers in [0, n).

    Returns:
      A column of m rows of the same kind.
    """
    if isinstance(column, np.ndarray):
        return column[rows]
    if isinstance(column, StringColumn):
        begins, sizes = column.offsets[:-1][rows], np.diff(column.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        return StringColumn(column.blob[_spans(begins, sizes, offsets)], offsets)
    begins = np.zeros(len(column) + 1, np.int64)
    np.cumsum(column.lengths, out=begins[1:])
    sizes = column.lengths[rows]
    ends = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    values = take(column.values, _spans(begins[:-1][rows], sizes, ends))
    assert not isinstance(values, Ragged)
    return Ragged(values, sizes)


def join_columns(columns: Sequence[Column]) -> Column:
    """The rows of several columns of one feature, one after the other.

    Args:
      columns: at least one, all of one kind.
    """
    first = columns[0]
    if isinstance(first, Ragged):
        bags = [column for column in columns if isinstance(column, Ragged)]
        values = join_columns([bag.values for bag in bags])
        assert not isinstance(values, Ragged)
        return Ragged(values, np.concatenate([bag.lengths for bag in bags]))
    if isinstance(first, StringColumn):
        strings = [column for column in columns if isinstance(column, StringColumn)]
        starts = np.cumsum([0, *(len(column.blob) for column in strings)])
        ends = [column.offsets[1:] + start for column, start in zip(strings, starts[:-1], strict=True)]
        blob = np.concatenate([column.blob for column in strings])
        return StringColumn(blob, np.concatenate([np.zeros(1, np.int64), *ends]))
    return np.concatenate([column for column in columns if isinstance(column, np.ndarray)])


def _spans(begins: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Indices of the spans ``[begins[i], begins[i] + sizes[i])``, one after the other."""
    return np.arange(ends[-1]) + np.repeat(begins - ends[:-1], sizes)
