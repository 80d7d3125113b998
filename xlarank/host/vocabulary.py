"""Looks values up in a vocabulary of any size: `VocabularyIndex`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from xlarank.host._extension import native
from xlarank.host.hashing import hash_strings_numpy
from xlarank.spec import StringColumn, Vocabulary, take

__all__ = ["VocabularyIndex", "index_of"]


class VocabularyIndex:
    """Values of a vocabulary, prepared once for lookups. Immutable; any thread may look up.

    Attributes:
      native: the kernel's open-addressing table, or None in NumPy.
    """

    def __init__(self, values: Sequence[int] | Sequence[str], *, use_native: bool | None = None) -> None:
        """Prepares the lookup; takes time and memory linear in the vocabulary.

        Args:
          values: distinct int64 values, or distinct strings.
          use_native: whether the kernel does the work; where it is built by default.
        """
        if use_native is None:
            use_native = native is not None
        self._is_string = bool(values) and isinstance(values[0], str)
        self._num_values = len(values)
        self.native: Any = None
        if self._is_string:
            strings = StringColumn.from_strings(values)  # type: ignore[arg-type]
            if use_native and native is not None:
                self.native = native.StringVocabulary(strings.blob, strings.offsets)
            else:
                self._strings = strings
                self._sort_strings()
        else:
            integers = np.array(values, np.int64)
            if use_native and native is not None:
                self.native = native.IntVocabulary(integers)
            else:
                self._rows = np.argsort(integers, kind="stable")
                self._keys = integers[self._rows]

    def lookup(self, values: np.ndarray | StringColumn) -> np.ndarray:
        """Row of each value: 1 + its position in the vocabulary, 0 where it isn't there.

        Args:
          values: [V] int64, or V strings.

        Returns:
          [V] int64 in [0, 1 + number of values].
        """
        if not self._num_values:
            return np.zeros(len(values), np.int64)
        if isinstance(values, StringColumn) != self._is_string:
            expected = "a StringColumn" if self._is_string else "int64 values"
            raise TypeError(f"vocabulary: expected {expected}, got {type(values).__name__}")
        if isinstance(values, StringColumn):
            if self.native is not None:
                blob = np.ascontiguousarray(values.blob, np.uint8)
                return self.native.lookup(blob, np.ascontiguousarray(values.offsets, np.int64))
            return self._lookup_strings(values)
        if self.native is not None:
            return self.native.lookup(np.ascontiguousarray(values, np.int64))
        position = np.minimum(np.searchsorted(self._keys, values), self._num_values - 1)
        return np.where(self._keys[position] == values, self._rows[position] + 1, 0)

    def _sort_strings(self) -> None:
        # Sorted by hash, under the first seed that keeps all of them apart: then one comparison of
        # bytes decides a lookup, whatever the strings are.
        for seed in range(2**16):
            hashes = hash_strings_numpy(self._strings, seed)
            self._rows = np.argsort(hashes, kind="stable")
            self._keys = hashes[self._rows]
            self._seed = seed
            if not (self._keys[1:] == self._keys[:-1]).any():
                return
        raise ValueError("vocabulary: its strings collide under every seed; are they distinct?")

    def _lookup_strings(self, column: StringColumn) -> np.ndarray:
        hashes = hash_strings_numpy(column, self._seed)
        position = np.minimum(np.searchsorted(self._keys, hashes), self._num_values - 1)
        entries = self._rows[position]
        sizes = np.diff(column.offsets)
        maybe = (self._keys[position] == hashes) & (np.diff(self._strings.offsets)[entries] == sizes)
        members = np.flatnonzero(maybe)
        ours, theirs = take(self._strings, entries[members]), take(column, members)
        assert isinstance(ours, StringColumn)
        assert isinstance(theirs, StringColumn)
        differs = np.zeros(len(ours.blob) + 1, np.int64)
        np.cumsum(ours.blob != theirs.blob, out=differs[1:])
        equal = differs[ours.offsets[1:]] == differs[ours.offsets[:-1]]
        rows = np.zeros(len(sizes), np.int64)
        rows[members[equal]] = entries[members[equal]] + 1
        return rows


# By identity, because hashing a Vocabulary walks all its values. An entry dies with its Vocabulary, before
# its id can be taken by another.
_INDEXES: dict[int, VocabularyIndex] = {}  # guarded by _LOCK, but for that last removal
_LOCK = threading.Lock()


def index_of(vocabulary: Vocabulary) -> VocabularyIndex:
    """The prepared index of a fitted vocabulary; prepared at the first call, then the same object."""
    key = id(vocabulary)
    with _LOCK:
        index = _INDEXES.get(key)
        if index is None:
            assert vocabulary.values is not None, "vocabulary is not fitted"
            index = _INDEXES[key] = VocabularyIndex(vocabulary.values)
            weakref.finalize(vocabulary, _INDEXES.pop, key, None)
        return index
