"""No damaged bundle opens, whichever file it is and however it was damaged; the message names the file."""

import dataclasses
import os
import pickle
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from xlarank.bundle import Bundle, FileDigest, Verify, open_bundle
from xlarank.bundle.digests import digest_of
from xlarank.bundle.manifest_json import manifest_from_json, manifest_to_json
from xlarank.errors import BundleError

FILES = (
    "golden.safetensors",
    "manifest.json",
    "params.safetensors",
    "programs/4x1.bin",
    "programs/4x4.bin",
    "programs/8x8.bin",
    "programs/prepare.bin",
    "report.html",
    "tables/items.npy",
    "tables/items.npy.sha256",
    "tables/users.npy",
    "tables/users.npy.sha256",
)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def remove(path):
    path.unlink()


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "first byte flipped": (lambda path: flip(path, 0), r"damaged|no JSON"),
    "middle byte flipped": (lambda path: flip(path, path.stat().st_size // 2), r"damaged|no JSON"),
    "last byte flipped": (lambda path: flip(path, -1), r"damaged|no JSON"),
    "last byte missing": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"truncated|damaged"),
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
                    r"truncated: expected \d+ bytes, got \d+|no JSON"),
    "emptied": (lambda path: path.write_bytes(b""), r"truncated: expected \d+ bytes, got 0|: 0 bytes"),
    "one byte longer": (lambda path: path.write_bytes(path.read_bytes() + b" "), r"too long|damaged"),
    "removed": (remove, r"missing"),
    "a folder instead": (replace_by_folder, r"expected a file, found a folder"),
    "a pipe instead": (replace_by_pipe, r"expected a file, found a pipe"),
}  # fmt: skip


def test_the_files_damaged_below_are_all_that_a_bundle_has(bundle_path):
    found = {p.relative_to(bundle_path).as_posix() for p in bundle_path.rglob("*") if p.is_file()}
    assert {name for name in found if not name.startswith("cache/")} == set(FILES)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name_with_what_differs(bundle_path, file, damage):
    apply, what_differs = DAMAGES[damage]
    apply(bundle_path / file)
    with pytest.raises(BundleError, match=f"{re.escape(str(bundle_path / file))}: .*({what_differs})"):
        open_bundle(bundle_path)


READS = {
    "golden.safetensors": Bundle.golden,
    "params.safetensors": Bundle.params,
    "programs/4x1.bin": lambda bundle: bundle.program(bundle.manifest.programs[0]),
    "programs/prepare.bin": Bundle.prepare,
    "report.html": lambda bundle: bundle.text("report.html"),
    "tables/items.npy": Bundle.tables,
    "tables/items.npy.sha256": lambda bundle: bundle.table_files()["items"].check_chunk(0),
}


@pytest.mark.parametrize("file", READS)
def test_no_reader_waits_for_what_is_no_file(bundle_path, file):
    bundle = open_bundle(bundle_path)
    replace_by_pipe(bundle_path / file)
    with pytest.raises(BundleError, match=f"{file}: can't be read: expected a file, found a pipe"):
        READS[file](bundle)


def test_every_single_byte_of_the_manifest_counts(bundle_path):
    file = bundle_path / "manifest.json"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        with pytest.raises(BundleError, match=r"damaged|no JSON|format version"):
            manifest_from_json(bytes(damaged))


@pytest.mark.parametrize("damage", ["last byte missing", "one byte longer", "removed"])
@pytest.mark.parametrize("file", [file for file in FILES if file != "manifest.json"])
def test_sizes_are_looked_at_even_without_verification(bundle_path, file, damage):
    DAMAGES[damage][0](bundle_path / file)
    with pytest.raises(BundleError, match=re.escape(str(bundle_path / file))):
        open_bundle(bundle_path, verify=Verify.SIZES)


def test_the_digest_in_the_message_is_the_one_that_the_file_has(bundle_path):
    (bundle_path / "report.html").write_bytes(bytes(len("<p>größer</p>".encode())))
    found = digest_of(bundle_path / "report.html").sha256
    with pytest.raises(BundleError, match=f"damaged: expected sha256 [0-9a-f]{{64}}, got {found}"):
        open_bundle(bundle_path)


def reseal(path, **changes):
    """Makes the manifest agree with changed files, as an attacker would."""
    manifest = manifest_from_json((path / "manifest.json").read_bytes())
    files = {name: digest_of(path / name) for name in manifest.files}
    changes = {"files": files, **changes}
    (path / "manifest.json").write_text(manifest_to_json(dataclasses.replace(manifest, **changes)))


class _Mine:
    """Unpickling it would run code."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_a_pickle_in_place_of_an_array_is_refused_unread(bundle_path):
    table = bundle_path / "tables/items.npy"
    np.save(table, np.array([_Mine()], dtype=object), allow_pickle=True)
    reseal(bundle_path)
    with pytest.raises(BundleError, match=r"items\.npy: expected an npy file of float32 \[5, 1\], .*'\|O'"):
        open_bundle(bundle_path)
    table.write_bytes(pickle.dumps(_Mine()))
    reseal(bundle_path)
    with pytest.raises(BundleError, match=r"items\.npy: expected an npy file .* got bytes b'\\x80"):
        open_bundle(bundle_path)


@pytest.mark.parametrize("file", ["params.safetensors", "golden.safetensors"])
def test_a_pickle_in_place_of_safetensors_is_refused_unread(bundle_path, file):
    (bundle_path / file).write_bytes(pickle.dumps(_Mine()))
    reseal(bundle_path)
    bundle = open_bundle(bundle_path)
    with pytest.raises(BundleError, match=f"{file}: not a whole safetensors file"):
        bundle.params() if file.startswith("params") else bundle.golden()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((6, 1), np.float32), r"'shape': \(5, 1\), }; got .*'shape': \(6, 1\)"),
        (np.zeros((5, 1), np.float64), r"got .*'descr': '<f8'"),
        (np.zeros((5, 1), ">f4"), r"got .*'descr': '>f4'"),
        (np.zeros((5,), np.float32), r"got .*'shape': \(5,\)"),
        (np.asfortranarray(np.zeros((5, 2), np.float32)), r"got .*'fortran_order': True"),
    ],
)
def test_a_table_of_another_shape_or_type_than_the_spec_states_is_refused(bundle_path, table, message):
    np.save(bundle_path / "tables/items.npy", table)
    reseal(bundle_path)
    with pytest.raises(
        BundleError, match=r"items\.npy: expected an npy file of float32 \[5, 1\].*" + message
    ):
        open_bundle(bundle_path)


def test_a_table_shorter_than_its_header_says_is_refused(bundle_path):
    table = bundle_path / "tables/users.npy"
    table.write_bytes(table.read_bytes()[:-4])
    reseal(bundle_path)
    with pytest.raises(BundleError, match=r"users\.npy: expected 260 bytes of float32 \[11, 3\], got 256"):
        open_bundle(bundle_path)


def test_params_that_are_not_those_of_the_manifest_are_refused(bundle_path):
    arrays = {name: np.zeros(1, np.float32) for name in ("mlp.kernel", "bias", "other")}
    save_file(arrays, bundle_path / "params.safetensors")
    reseal(bundle_path)
    with pytest.raises(BundleError, match=r"params\.safetensors: .* these differ: \['a.last', 'other'\]"):
        open_bundle(bundle_path).params()
    arrays = {name: np.zeros(1, np.int16) for name in ("mlp.kernel", "bias", "a.last")}
    save_file(arrays, bundle_path / "params.safetensors")
    reseal(bundle_path)
    with pytest.raises(BundleError, match=r"array 'a\.last': expected one of .*'F32'.*, got I16"):
        open_bundle(bundle_path).params()


def test_golden_requests_of_another_spec_are_refused(bundle_path, tiny_spec):
    fewer_users = dataclasses.replace(tiny_spec, tables=(
        dataclasses.replace(tiny_spec.tables[0], rows=10), tiny_spec.tables[1]
    ))  # fmt: skip
    np.save(bundle_path / "tables/users.npy", np.zeros((10, 3), np.float32))
    reseal(bundle_path, spec=fewer_users)
    with pytest.raises(BundleError, match=r"golden\.safetensors: request 1: feature 'user': expected ids in"):
        open_bundle(bundle_path).golden()


def test_a_manifest_that_lists_too_little_is_refused(bundle_path):
    digest = FileDigest("0" * 64, 1)
    reseal(bundle_path, files={"report.html": digest})
    with pytest.raises(BundleError, match=r"manifest\.json: names \['params.safetensors', .* no digest"):
        open_bundle(bundle_path)


def test_tables_may_be_left_to_who_reads_them_and_nothing_else(bundle_path):
    flip(bundle_path / "tables/users.npy", -1)
    file = open_bundle(bundle_path, verify=Verify.ALL_BUT_TABLES).table_files()["users"]
    with pytest.raises(BundleError, match=r"users\.npy: damaged: bytes 0 to 260"):
        file.read_into(np.zeros(file.num_bytes, np.uint8))
    flip(bundle_path / "tables/users.npy.sha256", 0)
    with pytest.raises(BundleError, match=r"users\.npy\.sha256: damaged: expected sha256"):
        open_bundle(bundle_path, verify=Verify.ALL_BUT_TABLES)
