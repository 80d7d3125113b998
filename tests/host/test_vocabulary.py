import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.host import native_available
from xlarank.host.vocabulary import _INDEXES, VocabularyIndex, index_of
from xlarank.spec import StringColumn, Vocabulary

NATIVE = [
    False,
    pytest.param(
        True, marks=pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")
    ),
]
int64s = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
texts = st.text(max_size=3) | st.text("ab\0", max_size=40)


@pytest.mark.parametrize("use_native", NATIVE)
@given(values=st.lists(int64s, unique=True), others=st.lists(int64s))
def test_an_integer_reads_as_one_plus_its_position(use_native, values, others):
    rows = VocabularyIndex(values, use_native=use_native).lookup(np.array(values + others, np.int64))
    expected = {value: 1 + position for position, value in enumerate(values)}
    assert rows.tolist() == [expected.get(value, 0) for value in values + others]
    assert rows.dtype == np.int64


@pytest.mark.parametrize("use_native", NATIVE)
@given(values=st.lists(texts, unique=True), others=st.lists(texts))
def test_a_string_reads_as_one_plus_its_position(use_native, values, others):
    index = VocabularyIndex(values, use_native=use_native)
    rows = index.lookup(StringColumn.from_strings(values + others))
    expected = {value: 1 + position for position, value in enumerate(values)}
    assert rows.tolist() == [expected.get(value, 0) for value in values + others]


@pytest.mark.parametrize("use_native", NATIVE)
def test_a_vocabulary_of_hundreds_of_thousands_is_looked_up_whole(use_native):
    count = 200_000
    ids = np.random.default_rng(0).permutation(count * 3)[:count]
    integers = VocabularyIndex(ids.tolist(), use_native=use_native)
    np.testing.assert_array_equal(integers.lookup(ids), np.arange(1, count + 1))
    strings = [f"item-{value}" for value in ids.tolist()]
    index = VocabularyIndex(strings, use_native=use_native)
    np.testing.assert_array_equal(index.lookup(StringColumn.from_strings(strings)), np.arange(1, count + 1))
    absent = StringColumn.from_strings([f"item-{value}" for value in range(count * 3, count * 3 + 1000)])
    assert not index.lookup(absent).any()


@pytest.mark.parametrize("use_native", NATIVE)
def test_values_of_the_other_type_are_refused(use_native):
    with pytest.raises(TypeError, match="expected int64 values, got StringColumn"):
        VocabularyIndex([1], use_native=use_native).lookup(StringColumn.from_strings(["1"]))
    with pytest.raises(TypeError, match="expected a StringColumn, got ndarray"):
        VocabularyIndex(["1"], use_native=use_native).lookup(np.array([1]))


def test_an_index_is_prepared_once_and_dies_with_its_vocabulary():
    vocabulary = Vocabulary(values=("a", "b"))
    index = index_of(vocabulary)
    assert index_of(vocabulary) is index
    assert index_of(Vocabulary(values=("a", "b"))) is not index
    key = id(vocabulary)
    assert key in _INDEXES
    del vocabulary
    gc.collect()
    assert key not in _INDEXES
