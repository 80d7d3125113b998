import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.host import split_bytes_tensor
from xlarank.host.strings import split_bytes_tensor_python

SPLITS = [split_bytes_tensor, split_bytes_tensor_python]


def _tensor(strings):
    return b"".join(struct.pack("<I", len(string)) + string for string in strings)


@pytest.mark.parametrize("split", SPLITS)
@given(strings=st.lists(st.binary(max_size=50)))
def test_a_tensor_splits_into_the_strings_it_was_made_of(split, strings):
    column = split(_tensor(strings))
    assert column.to_bytes() == strings
    assert (column.blob.dtype, column.offsets.dtype) == ("uint8", "int64")


@pytest.mark.parametrize("split", SPLITS)
@given(strings=st.lists(st.binary(max_size=9), min_size=1), data=st.data())
def test_a_tensor_cut_inside_an_element_is_refused(split, strings, data):
    raw = _tensor(strings)
    ends = {len(_tensor(strings[:i])) for i in range(len(strings) + 1)}
    cut = data.draw(st.sampled_from([i for i in range(len(raw)) if i not in ends]))
    with pytest.raises(ValueError, match=r"element \d+: expected \d+ bytes.*, \d+ are left"):
        split(raw[:cut])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x01\0\0\0a\x02\0", "element 1: expected 4 bytes of length, 2 are left"),
        (b"\0\0\0\0\x03\0\0\0ab", "element 1: expected 3 bytes, 2 are left"),
        (b"\xff\xff\xff\xff", "element 0: expected 4294967295 bytes, 0 are left"),
    ],
)
def test_the_message_names_the_element(split, raw, message):
    with pytest.raises(ValueError, match=message):
        split(raw)


@pytest.mark.parametrize("split", SPLITS)
def test_a_view_of_a_message_splits(split):
    raw = bytearray(b"xx" + _tensor([b"a", b"", b"bc"]))
    assert split(memoryview(raw)[2:]).to_bytes() == [b"a", b"", b"bc"]
