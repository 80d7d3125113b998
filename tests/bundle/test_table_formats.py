"""Bundles with tables in every row format: written, read back, refused when they are not what is stated."""

import dataclasses
import json

import bundles
import numpy as np
import pytest

from xlarank.bundle import BundleWriter, TableError, Verify, open_bundle, stored_form
from xlarank.bundle.document import render
from xlarank.bundle.manifest_json import manifest_from_json, manifest_to_json
from xlarank.bundle.tables import digests_file, write_array
from xlarank.errors import BundleError, ConfigError
from xlarank.host import HostTable, decode_rows, encode_rows
from xlarank.spec import RowFormat, TableSpec

VALUES = np.random.default_rng(0).normal(size=(11, 7)).astype(np.float32)


@pytest.fixture(params=RowFormat)
def row_format(request):
    return request.param


@pytest.fixture
def path(tmp_path, row_format):
    return bundles.publish(tmp_path, {"t": encode_rows(VALUES, row_format)})


def replaced(path, array):
    """Puts another array in the table's place, with digests that agree: as an attacker, or a bug, would."""
    file = path / "tables/t.npy"
    _, digests = write_array(file, array)
    (path / digests_file("tables/t.npy")).write_bytes(digests)


@pytest.mark.parametrize(
    ("row_format", "dtype", "width"),
    [
        (RowFormat.FLOAT32, "float32", 7),
        (RowFormat.FLOAT16, "float16", 7),
        (RowFormat.BFLOAT16, "uint16", 7),
        (RowFormat.INT8, "uint8", RowFormat.INT8.row_bytes(7)),
        (RowFormat.INT4, "uint8", RowFormat.INT4.row_bytes(7)),
    ],
)
def test_the_form_on_the_disk_is_one_that_numpy_reads(tmp_path, row_format, dtype, width):
    assert stored_form(TableSpec(name="t", rows=11, dim=7, dtype=row_format)) == (
        np.dtype(dtype),
        (11, width),
    )
    path = bundles.publish(tmp_path, {"t": encode_rows(VALUES, row_format)})
    array = np.load(path / "tables/t.npy", allow_pickle=False)
    assert (array.dtype, array.shape) == (np.dtype(dtype), (11, width))


def test_rows_read_back_bit_for_bit(path, row_format):
    bundle = open_bundle(path)
    (table,) = bundle.spec.tables
    assert table.dtype is row_format
    encoded = encode_rows(VALUES, row_format)
    found = HostTable(bundle.tables()["t"].view(np.uint8), table.dtype, table.dim)
    np.testing.assert_array_equal(found.rows, encoded.rows)
    np.testing.assert_array_equal(decode_rows(found), decode_rows(encoded))
    assert bundle.manifest.table_errors == {"like": TableError(0.0, 0.0, None)}


@pytest.mark.parametrize("position", [130, -1])
def test_a_flipped_byte_is_found_when_opened_and_when_read(path, position):
    file = path / "tables/t.npy"
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"t\.npy: damaged: expected sha256"):
        open_bundle(path)
    table = open_bundle(path, verify=Verify.ALL_BUT_TABLES).table_files()["t"]
    with pytest.raises(BundleError, match=r"t\.npy: damaged: bytes 0 to"):
        table.read_into(np.zeros(table.num_bytes, np.uint8))


def test_a_file_cut_short_is_refused_even_unread(path):
    file = path / "tables/t.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"t\.npy: truncated: expected \d+ bytes, got \d+"):
        open_bundle(path, verify=Verify.SIZES)


def test_rows_without_their_scales_are_refused(tmp_path):
    for row_format in (RowFormat.INT8, RowFormat.INT4):
        rows = encode_rows(VALUES, row_format).rows[:, 8:]
        table = TableSpec(name="t", rows=11, dim=7, dtype=row_format)
        with (
            BundleWriter(tmp_path, "bare") as writer,
            pytest.raises(
                BundleError, match=r"t\.npy: expected an npy file of uint8 \[11, \d+\], .* got .*descr"
            ),
        ):
            bundles.fill(writer, {"t": table}, {"t": np.ascontiguousarray(rows)})


def test_a_header_of_another_format_is_refused(path, row_format):
    """Whatever the digests say: the manifest decides what a file must hold."""
    for other in RowFormat:
        if other is row_format:
            continue
        encoded = encode_rows(VALUES, other)
        spec = TableSpec(name="t", rows=11, dim=7, dtype=other)
        dtype, shape = stored_form(spec)
        replaced(path, encoded.rows.view(dtype))
        manifest = json.loads((path / "manifest.json").read_text())
        for name in ("tables/t.npy", "tables/t.npy.sha256"):
            manifest["files"][name]["bytes"] = (path / name).stat().st_size
        (path / "manifest.json").write_text(render(manifest))
        with pytest.raises(
            BundleError, match=rf"t\.npy: expected an npy file of .* got .*\({shape[0]}, {shape[1]}\)"
        ):
            open_bundle(path, verify=Verify.SIZES)


def test_a_format_that_the_manifest_s_reader_does_not_know_is_named(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["spec"]["tables"][0]["dtype"] = "int2"
    (path / "manifest.json").write_text(render(manifest))
    with pytest.raises(
        BundleError,
        match=r"manifest\.json: spec: table 't': dtype must be one of \['float32', .*; was 'int2'",
    ):
        open_bundle(path)


def test_what_smaller_tables_cost_must_be_stated_for_every_task(tiny_manifest):
    with pytest.raises(ConfigError, match=r"expected table_errors of \['like', 'stay'\], got \{'like': "):
        dataclasses.replace(tiny_manifest, table_errors={"like": TableError(0.0, 0.0, None)})
    tables = tuple(dataclasses.replace(table, dtype=RowFormat.INT8) for table in tiny_manifest.spec.tables)
    smaller = dataclasses.replace(tiny_manifest.spec, tables=tables)
    with pytest.raises(
        ConfigError, match=r"expected table_errors, as tables \['users', 'items'\] aren't float32"
    ):
        dataclasses.replace(tiny_manifest, spec=smaller)
    for wrong in ((-1.0, 0.0), (2.0, 1.0), (0.0, float("inf"))):
        with pytest.raises(ConfigError, match=r"table error: expected finite 0 <= p99 <= max, got"):
            TableError(*wrong, None)


def test_table_errors_read_back(tiny_manifest):
    errors = {"like": TableError(1e-4, 2e-3, -1e-5), "stay": TableError(0.0, 0.0, None)}
    manifest = dataclasses.replace(tiny_manifest, table_errors=errors, version=1)
    document = json.loads(manifest_to_json(manifest))
    assert document["table_errors"]["like"] == {"p99": 1e-4, "max": 2e-3, "auc_loss": -1e-5}
    with pytest.raises(BundleError, match="has no digest of them"):  # read whole, and not published
        manifest_from_json(manifest_to_json(manifest).encode())
