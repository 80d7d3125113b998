"""What `BundleWriter` publishes, `open_bundle` reads back."""

import dataclasses
import logging

import numpy as np
import pytest

from xlarank.bundle import BundleWriter, Verify, open_bundle
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import Bucket, BucketLadder, ModelSpec, RankRequest

EXPECTED_FILES = {
    "golden.safetensors",
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
}


def test_a_published_bundle_reads_back_as_it_was_written(publish, tmp_path, tiny_manifest, tiny_golden):
    path = publish()
    assert path == tmp_path / "tiny" / "1"
    bundle = open_bundle(path)
    manifest = bundle.manifest
    assert bundle.path == path
    assert bundle.spec == tiny_manifest.spec
    assert manifest.version == 1
    for field in (
        "programs",
        "params",
        "prepare",
        "num_prepared",
        "tolerance",
        "budget",
        "architecture",
        "provenance",
        "fingerprint",
    ):
        assert getattr(manifest, field) == getattr(tiny_manifest, field), field
    assert set(manifest.files) == EXPECTED_FILES
    assert set(manifest.cache_files) == {"cache/jit_f-0123-cache", "cache/more/x"}
    assert [bundle.program(entry) for entry in manifest.programs] == [
        b"program 4x1",
        b"program 4x4",
        b"program 8x8",
    ]
    assert bundle.prepare() == b"\x00\xff"
    assert bundle.text("report.html") == "<p>größer</p>"
    requests, values = bundle.golden()
    assert [request.num_candidates for request in requests] == [2, 3]
    np.testing.assert_array_equal(requests[1].column("user"), tiny_golden[0][1].column("user"))
    np.testing.assert_array_equal(values["scores"]["stay"], [-2, -1, 0, 1, 2])
    assert bundle.cache_files() == [path / "cache/jit_f-0123-cache", path / "cache/more/x"]
    assert (path / "report.html").read_text(encoding="utf-8") == "<p>größer</p>"


def test_the_ladder_and_the_latency_profiles_are_those_of_the_programs(publish):
    manifest = open_bundle(publish()).manifest
    assert manifest.ladder == BucketLadder((Bucket(4, 1), Bucket(4, 4), Bucket(8, 8)))
    assert manifest.latency["cpu"].seconds == {Bucket(4, 1): 0.004, Bucket(4, 4): 0.004, Bucket(8, 8): 0.008}
    assert manifest.latency["gpu"].seconds_of(Bucket(8, 8)) == 1e-4
    assert [program.file for program in manifest.programs if program.bucket == Bucket(4, 4)] == [
        "programs/4x4.bin"
    ]


def test_params_come_in_the_order_of_the_manifest_bit_for_bit(publish):
    params = open_bundle(publish()).params()
    assert list(params) == ["mlp.kernel", "bias", "a.last"]
    assert params["bias"].shape == ()
    np.testing.assert_array_equal(params["mlp.kernel"], np.arange(12, dtype=np.float32).reshape(3, 4) / 7)
    assert np.signbit(params["a.last"]).all()


def test_tables_are_mapped_aligned_and_read_only(publish):
    tables = open_bundle(publish()).tables()
    assert {name: table.shape for name, table in tables.items()} == {"users": (11, 3), "items": (5, 1)}
    for table in tables.values():
        assert table.dtype == np.float32
        assert table.flags.c_contiguous
        assert not table.flags.writeable
        assert not table.flags.owndata
        assert table.ctypes.data % 64 == 0
    np.testing.assert_array_equal(tables["users"], np.arange(33).reshape(11, 3))


def test_numpy_reads_a_table_too(publish):
    path = publish()
    np.testing.assert_array_equal(
        np.load(path / "tables/users.npy", allow_pickle=False), np.arange(33, dtype=np.float32).reshape(11, 3)
    )


def test_a_text_that_is_not_there_or_no_text_is_refused(publish):
    bundle = open_bundle(publish())
    with pytest.raises(BundleError, match=r"tiny/1/tuning.json: can't be read: No such file"):
        bundle.text("tuning.json")
    (bundle.path / "tuning.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"tuning\.json: expected UTF-8"):
        bundle.text("tuning.json")


def test_one_thread_or_many_and_no_verification_read_the_same(publish):
    path = publish()
    for bundle in (
        open_bundle(path, num_threads=1),
        open_bundle(path, num_threads=7),
        open_bundle(path, verify=Verify.SIZES),
    ):
        np.testing.assert_array_equal(bundle.tables()["items"][[0, -1], 0], [-1, 1])
    with pytest.raises(ConfigError, match="num_threads must be >= 1; was 0"):
        open_bundle(path, num_threads=0)


def test_a_bundle_may_have_no_tables_no_params_and_no_cache(tmp_path, tiny_manifest):
    spec = ModelSpec.from_dict(
        {
            "name": "bare",
            "features": [{"name": "x", "kind": "dense", "scope": "candidate"}],
            "tasks": [{"name": "like"}],
        }
    )
    program = dataclasses.replace(
        tiny_manifest.programs[1], max_error={"like": 0}, p99_error={"like": 0}, seconds={}
    )
    manifest = dataclasses.replace(tiny_manifest, spec=spec, programs=(program,), params=())
    with BundleWriter(tmp_path, "bare", 41) as writer:
        writer.add_program("4x4.bin", b"p")
        writer.add_program("prepare.bin", b"p")
        writer.add_params({})
        writer.add_golden(
            [RankRequest(spec, {"x": [1.0]})], {"scores": {"like": np.full(1, 0.5, np.float32)}}
        )
        path = writer.publish(manifest)
    bundle = open_bundle(path)
    assert path == tmp_path / "bare" / "41"
    assert (bundle.tables(), bundle.params(), bundle.cache_files(), bundle.manifest.latency) == (
        {},
        {},
        [],
        {},
    )


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_compiled_code_is_left_out_and_reported_and_nothing_else(publish, caplog, damage):
    path = publish()
    target = path / "cache/jit_f-0123-cache"
    if damage == "flip":
        target.write_bytes(b"machine cod\x00")
    else:
        target.unlink()
    with caplog.at_level(logging.WARNING):
        bundle = open_bundle(path)
        assert bundle.cache_files() == [path / "cache/more/x"]
    assert [record.name for record in caplog.records] == ["xlarank.bundle.reader"]
    expected = "damaged: expected sha256" if damage == "flip" else "missing: expected 12 bytes"
    assert f"{target}: {expected}" in caplog.text


def test_compiled_code_that_the_manifest_does_not_list_is_never_returned(publish):
    path = publish()
    (path / "cache/intruder").write_bytes(b"evil")
    assert path / "cache/intruder" not in open_bundle(path).cache_files()
