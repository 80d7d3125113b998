"""Columns hold strings and bags as they came, and `take` is numpy's indexing for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.spec import Ragged, StringColumn, join_columns, take

_STRINGS = st.lists(st.binary(max_size=5), max_size=6)
_BAGS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=6)
_STRING_BAGS = st.lists(st.lists(st.binary(max_size=3), max_size=3), max_size=5)


def bags_of(ragged):
    values = ragged.values.to_bytes() if isinstance(ragged.values, StringColumn) else ragged.values.tolist()
    ends = np.cumsum(ragged.lengths, dtype=np.int64).tolist()
    return [values[end - n : end] for end, n in zip(ends, ragged.lengths.tolist(), strict=True)]


def rows_for(items, data):
    if not items:
        return np.zeros(0, np.int64)
    return np.array(data.draw(st.lists(st.integers(0, len(items) - 1), max_size=9)), np.int64)


@given(strings=_STRINGS, data=st.data())
def test_strings_are_taken_as_numpy_takes(strings, data):
    rows = rows_for(strings, data)
    taken = take(StringColumn.from_strings(strings), rows)
    assert taken.to_bytes() == [strings[row] for row in rows]
    assert (taken.blob.dtype, taken.offsets.dtype, len(taken)) == (np.uint8, np.int64, len(rows))


@given(bags=_BAGS, data=st.data())
def test_bags_are_taken_as_numpy_takes(bags, data):
    rows = rows_for(bags, data)
    taken = take(Ragged.from_bags(bags), rows)
    assert bags_of(taken) == [bags[row] for row in rows]
    assert (taken.values.dtype, taken.lengths.dtype, len(taken)) == (np.int64, np.int32, len(rows))


@given(bags=_STRING_BAGS, data=st.data())
def test_bags_of_strings_are_taken_as_numpy_takes(bags, data):
    rows = rows_for(bags, data)
    lengths = np.array([len(bag) for bag in bags], np.int32)
    column = Ragged(StringColumn.from_strings([value for bag in bags for value in bag]), lengths)
    assert bags_of(take(column, rows)) == [bags[row] for row in rows]


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_arrays_are_indexed(shape):
    array, rows = np.arange(np.prod(shape)).reshape(shape), np.array([4, 0, 4])
    np.testing.assert_array_equal(take(array, rows), array[rows])


def test_strings_are_packed_as_utf8_and_bytes_as_they_are():
    column = StringColumn.from_strings(["é", b"\xff\x00", ""])
    assert column.to_bytes() == [b"\xc3\xa9", b"\xff\x00", b""]
    assert column.offsets.tolist() == [0, 2, 4, 4]
    assert len(StringColumn.from_strings([])) == 0


@pytest.mark.parametrize("value", [5, None, 1.5, ["a"], np.int64(3)])
def test_only_strings_are_packed_as_strings(value):
    with pytest.raises(TypeError):
        StringColumn.from_strings(["a", value])


def test_a_lone_surrogate_has_no_bytes():
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        StringColumn.from_strings(["\ud800"])


def test_bags_take_ints_or_strings_and_neither_both_nor_floats():
    assert bags_of(Ragged.from_bags([["a"], [], ["b", "c"]])) == [[b"a"], [], [b"b", b"c"]]
    assert bags_of(Ragged.from_bags([np.array([1, 2]), range(1)])) == [[1, 2], [0]]
    for bags in ([[1.5]], [[1], ["a"]], [["a"], [1]], [[None]]):
        with pytest.raises(TypeError):
            Ragged.from_bags(bags)
    with pytest.raises(OverflowError):
        Ragged.from_bags([[2**63]])


@given(parts=st.lists(_STRING_BAGS, min_size=1, max_size=4))
def test_columns_joined_hold_the_rows_of_each_in_order(parts):
    bags = [Ragged.from_bags([[s.hex() for s in bag] for bag in part]) for part in parts]
    no_strings = StringColumn.from_strings([])  # an empty column could be of either kind
    bags = [b if isinstance(b.values, StringColumn) else Ragged(no_strings, b.lengths) for b in bags]
    joined = join_columns(bags)
    assert isinstance(joined, Ragged)
    assert bags_of(joined) == [row for bag in bags for row in bags_of(bag)]
    numbers = [np.arange(len(part)) for part in parts]
    np.testing.assert_array_equal(join_columns(numbers), np.concatenate(numbers))
