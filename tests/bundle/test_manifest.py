"""`Manifest`: one text form, strict reading, and contradictions refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from xlarank.bundle import FORMAT_VERSION, FileDigest
from xlarank.bundle.document import render
from xlarank.bundle.manifest_json import manifest_from_json, manifest_to_json
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import Bucket


@pytest.fixture
def published(tiny_manifest):
    digest = FileDigest("ab" * 32, 7)
    files = dict.fromkeys(tiny_manifest.required_files, digest)
    return dataclasses.replace(tiny_manifest, version=3, files=files, cache_files={"cache/x": digest})


def edited(manifest, edit):
    """The manifest's bytes after `edit(document)`, its digest made anew."""
    document = json.loads(manifest_to_json(manifest))
    edit(document)
    return render(document).encode()


def test_a_manifest_reads_back_equal_and_renders_the_same(published):
    text = manifest_to_json(published)
    read = manifest_from_json(text.encode())
    assert read == published
    assert manifest_to_json(read) == text
    assert json.loads(text)["format_version"] == FORMAT_VERSION == 5


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, 999, "5", None, True, 5.0])
def test_an_unknown_format_version_is_refused_before_anything_else(published, version):
    data = json.dumps({"format_version": version, "spec": "of another time"}).encode()
    with pytest.raises(
        BundleError, match=rf"m\.json: format version {version!r}; this xlarank reads version 5"
    ):
        manifest_from_json(data, file="m.json")
    document = json.loads(manifest_to_json(published))
    del document["format_version"]
    with pytest.raises(BundleError, match="format version None; this xlarank reads version 5"):
        manifest_from_json(render(document).encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes that are no JSON"),
        (b"\xff\xfe", "no JSON document"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "no JSON document"),
        (b'{"format_version": NaN}', "NaN is no JSON number"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "no JSON document"),
        (b'{"format_version": 5, "digest": "x", "a": 1e999}', "damaged or edited: Out of range"),
        (b'{"format_version": 5}', "damaged or edited: its digest says None"),
    ],
)
def test_what_is_no_manifest_is_refused(data, message):
    with pytest.raises(BundleError, match=rf"m\.json: .*{message}"):
        manifest_from_json(data, file="m.json")


def test_changes_that_keep_every_value_are_found_too(published):
    text = manifest_to_json(published)
    for changed in (
        text + " ",
        text.replace(": ", ":  ", 1),
        text.replace("{", '{"version": 3,', 1),
        text.replace("0.004", "0.0040"),
        text.replace("tiny", "\\u0074iny", 1),
    ):
        assert json.loads(changed) == json.loads(text)
        with pytest.raises(BundleError, match="damaged or edited: "):
            manifest_from_json(changed.encode())


def put(*keys, value):
    """An edit that sets a value deep in the document."""

    def edit(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return edit


def drop(*keys):
    """An edit that removes a key deep in the document."""

    def edit(document):
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return edit


FILE = "params.safetensors"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("colour", value=1), r"m\.json: unknown keys \['colour'\]"),
        (put("programs", 0, "colour", value=1), r"m\.json: programs\[0\]: unknown keys \['colour'\]"),
        (put("budget", "colour", value=1), r"budget: unknown keys"),
        (put("tolerance", "colour", value=1), r"tolerance: unknown keys"),
        (put("files", FILE, "colour", value=1), r"files\['params.safetensors'\]: unknown keys"),
        (put("spec", "colour", value=1), r"spec: model: unknown keys \['colour'\]"),
        (drop("params"), r"'params' is missing"),
        (drop("spec"), r"'spec' is missing"),
        (drop("programs", 1, "precision"), r"programs\[1\]: 'precision' is missing"),
        (put("version", value=True), r"'version': expected int, got True"),
        (put("version", value=0), r"expected a version >= 1, got 0"),
        (put("version", value="3"), r"'version': expected int, got '3'"),
        (put("programs", value={}), r"'programs': expected list, got {}"),
        (put("programs", value=[]), r"expected a program a bucket, got none"),
        (put("programs", 0, value=7), r"programs\[0\]: expected an object, got 7"),
        (put("programs", 0, "rows", value=4.0), r"'rows': expected int, got 4.0"),
        (put("programs", 0, "rows", value=0), r"expected 1 <= requests <= rows"),
        (put("programs", 2, "rows", value=4), r"program 4x8|requests <= rows"),
        (put("programs", 1, "requests", value=1), r"expected distinct ascending buckets, got 4x1, 4x1, 8x8"),
        (
            put("programs", 0, "prepared", value=[3]),
            r"program 4x1: prepared must be places in \[0, 3\); was \[3\]",
        ),
        (put("programs", 0, "prepared", value=[True]), r"'prepared': expected integers, got True"),
        (put("programs", 0, "form", value=3), r"'form': expected str, got 3"),
        (put("unused_features", value=["nobody"]), r"unused_features \['nobody'\] are no features"),
        (put("activations", value="float8"), r"activations must be float32 or bfloat16; was 'float8'"),
        (put("num_prepared", value=2), r"prepared must be places in \[0, 2\); was \[2, 0\]"),
        (put("budget", "max_auc_loss", value=0), r"error budget: max_auc_loss must be > 0; was 0"),
        (drop("architecture"), r"'architecture' is missing"),
        (put("programs", 0, "file", value="4x1.bin"), r"program 4x1: expected a path under programs/"),
        (put("programs", 0, "file", value="programs/4x4.bin"), r"'programs/4x4.bin' is another bucket's"),
        (put("programs", 0, "precision", value=""), r"precision must be one of"),
        (put("programs", 0, "max_error", "like", value=-1), r"expected finite errors >= 0"),
        (put("programs", 0, "max_error", "like", value="0"), r"max_error: 'like': expected a finite number"),
        (put("programs", 0, "max_error", "like", value=10**400), r"'like': expected a finite number"),
        (drop("programs", 0, "max_error", "like"), r"expected max_error of \['like', 'stay'\], got {'stay'"),
        (put("programs", 0, "seconds", "cpu", value=0), r"expected finite seconds > 0"),
        (drop("programs", 1, "seconds", "gpu"), r"program 4x4: expected seconds for \['cpu', 'gpu'\]"),
        (drop("programs", 0, "p99_error", "like"), r"expected p99_error of \['like', 'stay'\], got {'stay'"),
        (put("prepare", value="../p"), r"expected a path inside the bundle, got '../p'"),
        (put("prepare", value=3), r"'prepare': expected str, got 3"),
        (put("params", value=["a", "a"]), r"params must be distinct"),
        (put("params", value=["a", 1]), r"'params': expected strings, got 1"),
        (put("tolerance", "probability", value=0), r"tolerance: expected values > 0"),
        (put("provenance", "created", value=None), r"provenance: 'created': expected str, got None"),
        (put("fingerprint", value=[]), r"'fingerprint': expected dict, got \[\]"),
        (put("files", FILE, "sha256", value="AB" * 32), r"expected 64 hex digits"),
        (put("files", FILE, "bytes", value=-1), r"a size >= 0"),
        (drop("files", FILE), r"names \['params.safetensors'\] but has no digest"),
        (
            put("files", "/etc/passwd", value={"sha256": "0" * 64, "bytes": 1}),
            r"inside the bundle, got '/etc",
        ),
        (put("files", "cache/y", value={"sha256": "0" * 64, "bytes": 1}), r"outside cache/, got 'cache/y'"),
        (put("cache_files", "x", value={"sha256": "0" * 64, "bytes": 1}), r"under cache/, got 'x'"),
        (put("cache_files", "cache/../x", value={"sha256": "0" * 64, "bytes": 1}), r"got 'cache/../x'"),
        (put("spec", "features", value=5), r"spec: "),
        (put("spec", "tables", 0, "dim", value="3"), r"spec: "),
        (drop("spec", "tables", 0, "rows"), r"model 'tiny' is not fitted: rows of table 'users'"),
    ],
)
def test_a_value_that_is_missing_ill_typed_or_contradictory_is_refused_by_name(published, edit, message):
    with pytest.raises(BundleError, match=message) as refusal:
        manifest_from_json(edited(published, edit), file="m.json")
    assert str(refusal.value).startswith("m.json: ")


def test_a_manifest_made_in_memory_is_checked_as_one_read(tiny_manifest):
    with pytest.raises(ConfigError, match="provenance: expected strings, got 'rows': 3"):
        dataclasses.replace(tiny_manifest, provenance={"rows": 3})
    with pytest.raises(
        ConfigError,
        match=r"without prepare, num_prepared must be that of the params and .* devices, 3 \+ 0; was 4",
    ):
        dataclasses.replace(tiny_manifest, prepare=None, num_prepared=4)
    with pytest.raises(ConfigError, match=r"program 4x1: expected finite seconds > 0, got \{'cpu': inf}"):
        dataclasses.replace(tiny_manifest.programs[0], seconds={"cpu": math.inf})
    with pytest.raises(ConfigError, match="version must be >= 0; was -1"):
        dataclasses.replace(tiny_manifest, version=-1)


def test_errors_and_seconds_may_be_numpy_numbers(tiny_manifest):
    program = dataclasses.replace(
        tiny_manifest.programs[0],
        bucket=Bucket(2, 1),
        max_error={"like": np.float32(0.5), "stay": np.float64(0.25)},
        p99_error={"like": np.float32(0.5), "stay": np.float64(0.25)},
        seconds={"cpu": np.float32(2.0), "gpu": 1},
    )
    manifest = dataclasses.replace(tiny_manifest, programs=(program,))
    assert json.loads(manifest_to_json(manifest))["programs"][0]["max_error"] == {"like": 0.5, "stay": 0.25}


def test_a_number_that_json_has_not_is_refused_in_writing():
    with pytest.raises(ConfigError, match="manifest: not a JSON value: Out of range float"):
        render({"format_version": FORMAT_VERSION, "seconds": math.inf})


def test_a_load_may_show_the_tolerance_in_float32_and_twice_the_proven_error_below(tiny_manifest):
    wide = tiny_manifest.programs[0]
    assert tiny_manifest.error_limits(wide) == {"like": 1e-5, "stay": 2e-5}
    low = dataclasses.replace(wide, precision="int8", max_error={"like": 0.004, "stay": 1e-4})
    assert tiny_manifest.error_limits(low) == {"like": 0.008, "stay": 1e-3}
