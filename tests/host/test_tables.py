import dataclasses

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.host import aligned_empty, check_tables, encode_rows
from xlarank.spec import ModelSpec, RowFormat

SPEC = ModelSpec.from_dict(
    {
        "name": "m",
        "features": [{"name": "item", "kind": "id", "scope": "candidate", "table": "t"}],
        "tables": [{"name": "t", "dim": 2, "rows": 3}],
        "tasks": [{"name": "like"}],
    }
)


@pytest.mark.parametrize("alignment", [1, 64, 4096])
@pytest.mark.parametrize("shape", [(), (0, 5), (3,), (7, 3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bool", "int32"])
def test_an_aligned_array_is_an_ordinary_one_at_a_multiple(shape, dtype, alignment):
    array = aligned_empty(shape, dtype, alignment)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert not array.size or array.ctypes.data % alignment == 0  # an empty one has no first byte
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[...] = 1
    assert (array == 1).all()


@pytest.mark.parametrize("alignment", [0, -64, 48])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment):
    with pytest.raises(ConfigError, match=f"alignment must be a power of two; was {alignment}"):
        aligned_empty((1,), "float32", alignment)


def spec_of(row_format):
    table = dataclasses.replace(SPEC.tables[0], dtype=row_format)
    return dataclasses.replace(SPEC, tables=(table,))


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_tables_of_the_spec_pass(row_format):
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    check_tables(spec_of(row_format), {"t": encode_rows(values, row_format)})
    if row_format == "float32":
        check_tables(SPEC, {"t": values})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (encode_rows(np.zeros((3, 2), np.float32), "int4"), r"of shape \[3, 2\], got int4 of shape \[3, 2\]"),
        (encode_rows(np.zeros((2, 2), np.float32), "int8"), r"of shape \[3, 2\], got int8 of shape \[2, 2\]"),
        (
            np.zeros((3, 2), np.float32),
            "rows, got an array of float32; encode_rows makes such rows of float32",
        ),
    ],
)
def test_tables_of_another_format_are_refused(table, message):
    with pytest.raises(ConfigError, match=f"table 't': expected int8 {message}"):
        check_tables(spec_of("int8"), {"t": table})


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_a_damaged_row_is_named(row_format):
    table = encode_rows(np.ones((3, 2), np.float32), row_format)
    table.rows[1, :8] = 0xFF
    with pytest.raises(ConfigError, match="table 't': expected finite floats, row 1 holds NaN or infinity"):
        check_tables(spec_of(row_format), {"t": table})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"model 'm': expected tables \['t'\], got \[\]"),
        ({"u": np.zeros((3, 2), np.float32)}, r"expected tables \['t'\], got \['u'\]"),
        ({"t": np.zeros((3, 2))}, r"table 't': expected float32 of shape \[3, 2\], got float64"),
        ({"t": np.zeros((2, 2), np.float32)}, r"table 't': .* got float32 of shape \[2, 2\]"),
        (
            {"t": np.zeros((2, 3), np.float32).T},
            r"table 't': expected a C-contiguous array, got strides \(4, 12\)",
        ),
        ({"t": [[0.0, 0.0]] * 3}, "table 't': expected a HostTable or a numpy array, got list"),
        (
            {"t": np.array([[0, 0], [1, 2], [np.nan, 0]], np.float32)},
            "table 't': .* row 2 holds NaN or infinity",
        ),
    ],
)
def test_other_tables_are_refused(tables, message):
    with pytest.raises(ConfigError, match=message):
        check_tables(SPEC, tables)
