import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from xlarank.host import hash_int64, hash_strings, native_available
from xlarank.host.hashing import hash_int64_numpy, hash_strings_numpy
from xlarank.spec import StringColumn

# Of the specification's own sanity checks: a buffer of bytes from a fixed generator, and two seeds.
_SPEC_PRIME_32 = 2654435761
_SPEC_VECTORS = [
    (0, 0, 0xEF46DB3751D8E999),
    (0, _SPEC_PRIME_32, 0xAC75FDA2929B17EF),
    (1, 0, 0xE934A84ADB052768),
    (1, _SPEC_PRIME_32, 0x5014607643A9B4C3),
    (14, 0, 0x8282DCC4994E35C8),
    (14, _SPEC_PRIME_32, 0xC3BD6BF63DEB6DF0),
    (222, 0, 0xB641AE8CB691C174),
    (222, _SPEC_PRIME_32, 0x20CB8AB7AE10C14A),
]
HASHES = [hash_strings, hash_strings_numpy]


def _spec_buffer(size):
    generator, data = _SPEC_PRIME_32, bytearray()
    for _ in range(size):
        data.append(generator >> 56)
        generator = generator * 11400714785074694797 % 2**64
    return bytes(data)


@pytest.mark.parametrize("hash_column", HASHES)
@pytest.mark.parametrize(("size", "seed", "expected"), _SPEC_VECTORS)
def test_hash_gives_the_vectors_of_the_specification(hash_column, size, seed, expected):
    assert hash_column(StringColumn.from_strings([_spec_buffer(size)]), seed).tolist() == [expected]


@pytest.mark.parametrize("hash_column", HASHES)
@given(strings=st.lists(st.binary(max_size=200)), seed=st.integers(0, 2**64 - 1))
def test_strings_hash_as_the_published_package_has_it(hash_column, strings, seed):
    hashes = hash_column(StringColumn.from_strings(strings), seed)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [xxhash.xxh64_intdigest(string, seed) for string in strings]


@pytest.mark.parametrize("hash_values", [hash_int64, hash_int64_numpy])
@given(values=st.lists(st.integers(-(2**63), 2**63 - 1)), seed=st.integers(0, 2**64 - 1))
def test_integers_hash_as_their_eight_little_endian_bytes(hash_values, values, seed):
    hashes = hash_values(np.array(values, np.int64), seed)
    assert hashes.dtype == np.uint64
    expected = [xxhash.xxh64_intdigest(v.to_bytes(8, "little", signed=True), seed) for v in values]
    assert hashes.tolist() == expected


@pytest.mark.parametrize("hash_column", HASHES)
@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 2], [0, 9], [0, -1, 3]])
def test_offsets_that_leave_the_bytes_are_refused(hash_column, offsets):
    column = StringColumn(np.zeros(3, np.uint8), np.array(offsets, np.int64))
    with pytest.raises(ValueError, match="string offsets that rise from 0"):
        hash_column(column, 0)


@pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")
def test_strided_values_hash_as_their_copy():
    values = np.arange(20)[::3]
    np.testing.assert_array_equal(hash_int64(values, 5), hash_int64_numpy(values.copy(), 5))
