"""Row formats: what encoding keeps, what it refuses, and that the kernel decodes as NumPy does."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from xlarank.errors import ConfigError
from xlarank.host import HostTable, decode_rows, encode_rows, native_available
from xlarank.host._extension import native
from xlarank.host.plan import native_table
from xlarank.spec import RowFormat

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")
FORMATS = list(RowFormat)
ISAS = ["baseline", "avx2", "avx512"]

# What every format holds: nothing that overflows float16, ranges that fit.
VALUES = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    elements=st.floats(-65000, 65000, width=32) | st.floats(-1, 1, width=32),
)


def error_bound(values, row_format):
    """[R, 1] float64, the largest error that a format may make in each row."""
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    if row_format is RowFormat.FLOAT32:
        return np.zeros_like(largest)
    if row_format is RowFormat.FLOAT16:
        return largest * 2**-11 + 2**-25
    if row_format is RowFormat.BFLOAT16:
        return largest * 2**-8 + 2**-134
    levels = 255 if row_format is RowFormat.INT8 else 15
    span = np.ptp(exact, axis=1, keepdims=True)
    # Half a step, then the roundings of scale, product and sum, and a scale too small for float32.
    return span / levels / 2 + 4 * (span + largest) * 2**-24 + levels * 2**-149


@pytest.mark.parametrize("row_format", FORMATS)
@given(values=VALUES)
def test_a_row_survives_within_the_error_of_its_format(row_format, values):
    table = encode_rows(values, row_format)
    assert (table.format, table.num_rows, table.dim) == (row_format, *values.shape)
    assert table.rows.ctypes.data % 64 == 0
    decoded = decode_rows(table)
    assert (decoded.dtype, decoded.shape) == (np.float32, values.shape)
    assert (np.abs(decoded.astype(np.float64) - values) <= error_bound(values, row_format)).all()
    # Encoding what was decoded changes nothing more, but for the roundings of an affine row.
    again = decode_rows(encode_rows(decoded, row_format))
    assert (np.abs(again.astype(np.float64) - decoded) <= 4 * error_bound(decoded, row_format)).all()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row_format", FORMATS)
@given(values=VALUES, ids=st.lists(st.integers(0, 2**30), max_size=9), lines=st.integers(0, 9))
def test_the_kernel_adds_what_numpy_decodes(isa, row_format, values, ids, lines):
    table = encode_rows(values, row_format)
    rows = np.array(ids, np.int32) % len(values)
    expected = np.zeros((1, table.dim), np.float32)
    for vector in decode_rows(table)[rows]:
        expected += vector
    out = np.full((1, table.dim), np.nan, np.float32)
    try:
        native.pool_rows(native_table(table, lines), rows, len(rows) or 1, out[: bool(ids)], isa)
    except ValueError as error:
        pytest.skip(str(error))
    if ids:
        np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row_format", [RowFormat.FLOAT16, RowFormat.BFLOAT16])
def test_every_number_of_16_bits_is_decoded(isa, row_format):
    dtype = np.dtype(ml_dtypes.bfloat16 if row_format is RowFormat.BFLOAT16 else np.float16)
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)
    with np.errstate(invalid="ignore"):  # NaN that signal
        is_nan = np.isnan(bits.view(dtype))
    bits[is_nan] = 0x7FC0 if row_format is RowFormat.BFLOAT16 else 0x7E00  # one quiet NaN
    table = HostTable(bits.view(np.uint8), row_format, 64)
    expected = bits.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode_rows(table).view(np.uint32), expected.view(np.uint32))
    out = np.empty_like(expected)
    try:
        native.pool_rows(native_table(table, 0), np.arange(len(bits), dtype=np.int32), 1, out, isa)
    except ValueError as error:
        pytest.skip(str(error))
    expected += np.float32(0)  # a sum begins at 0, so that -0 is 0
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 2.0**-14, 65280.0])
def test_a_row_of_equal_values_is_exact(row_format, value):
    values = np.full((3, 5), value, np.float32)
    np.testing.assert_array_equal(decode_rows(encode_rows(values, row_format)), values)


@pytest.mark.parametrize("row_format", [RowFormat.INT8, RowFormat.INT4])
@pytest.mark.parametrize("value", [3.4028235e38, -3.4028235e38, 1e-45, 0.1])
def test_an_affine_row_of_equal_values_is_exact_at_any_size(row_format, value):
    values = np.full((1, 3), value, np.float32)
    np.testing.assert_array_equal(decode_rows(encode_rows(values, row_format)), values)


def test_an_int4_row_worked_out_by_hand():
    table = encode_rows(np.array([[0.5, 8.0, 3.5]], np.float32), "int4")
    # scale 0.5 and bias 0.5; q 0, 15 and 6, the low half of a byte first; padded to 12 bytes.
    header = np.array([0.5, 0.5], np.float32).view(np.uint8).tolist()
    assert table.rows.tolist() == [[*header, 0xF0, 0x06, 0, 0]]
    assert decode_rows(table).tolist() == [[0.5, 8.0, 3.5]]


def test_an_int8_row_worked_out_by_hand():
    table = encode_rows(np.array([[-1.0, 254.0, 9.4]], np.float32), RowFormat.INT8)
    header = np.array([1, -1], np.float32).view(np.uint8).tolist()
    assert table.rows.tolist() == [[*header, 0, 255, 10, 0]]
    assert decode_rows(table).tolist() == [[-1, 254, 9]]


@pytest.mark.parametrize(
    ("row_format", "sizes"),
    [
        ("float32", {1: 4, 64: 256}),
        ("float16", {1: 2, 3: 6, 64: 128}),
        ("bfloat16", {1: 2, 3: 6, 64: 128}),
        ("int8", {1: 12, 4: 12, 5: 16, 64: 72}),
        ("int4", {1: 12, 8: 12, 9: 16, 64: 40, 127: 72}),
    ],
)
def test_bytes_of_a_row(row_format, sizes):
    assert {dim: RowFormat(row_format).row_bytes(dim) for dim in sizes} == sizes


@pytest.mark.parametrize(
    ("values", "row_format", "message"),
    [
        (np.zeros((2, 2)), "int8", r"expected float32 of shape \[R, D\], .* got float64 of shape \[2, 2\]"),
        (np.zeros(3, np.float32), "int8", r"got float32 of shape \[3\]"),
        (np.zeros((0, 2), np.float32), "int8", r"neither of them 0, got float32 of shape \[0, 2\]"),
        ([[1.0]], "int8", "expected a numpy array, got list"),
        (np.array([[1, 2], [3, np.nan]], np.float32), "int4", "row 1 holds NaN or infinity"),
        (np.array([[1, 2], [np.inf, 3]], np.float32), "float32", "row 1 holds NaN or infinity"),
        (
            np.array([[1, 2], [3, 65520]], np.float32),
            "float16",
            "row 1 reaches from 3 to 65520, more than float16 holds",
        ),
        (
            np.array([[1, -3.4028e38]], np.float32),
            "bfloat16",
            r"row 0 reaches from -3.4028e\+38 to 1, more than bfloat16 holds",
        ),
        (
            np.array([[-3e38, 3e38]], np.float32),
            "int8",
            r"row 0 reaches from -3e\+38 to 3e\+38, more than int8 holds",
        ),
    ],
)
def test_values_that_a_format_cannot_hold_are_refused(values, row_format, message):
    with pytest.raises(ConfigError, match=message):
        encode_rows(values, row_format)


def test_many_rows_are_encoded_in_steps_and_named_by_their_number():
    values = np.arange(70_000, dtype=np.float32)[:, None] + np.array([0, 255], np.float32)
    np.testing.assert_array_equal(decode_rows(encode_rows(values, "int8")), values)
    values[69_999, 0] = np.nan
    with pytest.raises(ConfigError, match="row 69999 holds NaN or infinity"):
        encode_rows(values, "int8")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            np.zeros((2, 9), np.uint8),
            r"expected uint8 of shape \[R, 12\] for rows of 3 int8 values, got uint8",
        ),
        (np.zeros((2, 12), np.int8), r"got int8 of shape \[2, 12\]"),
        (np.zeros(12, np.uint8), r"got uint8 of shape \[12\]"),
        (np.zeros((12, 2), np.uint8).T, r"expected C-contiguous rows, got strides \(1, 2\)"),
        (b"rows", "expected rows in a numpy array, got bytes"),
    ],
)
def test_rows_of_another_shape_are_no_table(rows, message):
    with pytest.raises(ConfigError, match=message):
        HostTable(rows, RowFormat.INT8, 3)


def test_a_float_table_shares_the_memory_of_its_array():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    values.flags.writeable = False
    table = HostTable.of_floats(values)
    assert np.shares_memory(table.rows, values)
    np.testing.assert_array_equal(decode_rows(table), values)


@needs_native
@pytest.mark.parametrize(
    ("ids", "ids_a_bag", "out", "message"),
    [
        (np.array([0, 3], np.int32), 1, np.empty((2, 2), np.float32), "an id is out of range"),
        (np.array([-1], np.int32), 1, np.empty((1, 2), np.float32), "an id is out of range"),
        (np.array([0], np.int64), 1, np.empty((1, 2), np.float32), "expected C-contiguous int32 ids"),
        (np.array([0, 1], np.int32), 2, np.empty((2, 2), np.float32), "expected whole bags"),
        (np.array([0, 1], np.int32), 0, np.empty((2, 2), np.float32), "expected at least one id a bag"),
    ],
)
def test_the_kernel_reads_and_writes_nothing_outside(ids, ids_a_bag, out, message):
    table = native_table(HostTable.of_floats(np.zeros((3, 2), np.float32)), 32)
    with pytest.raises(ValueError, match=message):
        native.pool_rows(table, ids, ids_a_bag, out, "auto")


@needs_native
@pytest.mark.parametrize("lines", [0, 2, 64])
def test_every_line_of_the_rows_is_read(lines):
    rows = np.zeros((3, 140), np.uint8)
    rows[:, [0, 64, 128, 139]] = [[1, 2, 3, 4], [10, 20, 30, 40], [50, 60, 70, 80]]
    table = {"rows": rows, "format": "int8", "dim": 132, "lines_ahead": lines, "out_of_range": "error"}
    assert native.read_rows(table, np.array([2, 0, 0], np.int32)) == 260 + 10 + 10
