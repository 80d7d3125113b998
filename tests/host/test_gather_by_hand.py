"""The gather of a small model, worked out by hand, and what it refuses."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from xlarank.errors import BucketError, ConfigError, FeatureError
from xlarank.host import Gatherer, Segment, native_available
from xlarank.spec import Bucket, ModelSpec, RankRequest, StringColumn

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")

SPEC = ModelSpec.from_dict(
    {
        "name": "m",
        "features": [
            {"name": "user", "kind": "id", "scope": "context", "table": "small"},
            {"name": "seen", "kind": "sequence", "scope": "context", "table": "small", "max_length": 3},
            {"name": "age", "kind": "dense", "scope": "candidate", "width": 2, "default": 5.0},
            {"name": "tags", "kind": "id_list", "scope": "candidate", "table": "small", "combiner": "mean"},
        ],
        "tables": [{"name": "small", "dim": 2, "rows": 4, "out_of_range": "zero"}],
        "tasks": [{"name": "like"}],
    }
)
TABLES = {"small": np.array([[1, 10], [2, 20], [3, 30], [4, 40]], np.float32)}
BACKENDS = ["numpy", pytest.param("native", marks=needs_native)]


def item_model(**fields):
    return ModelSpec.from_dict(
        {
            "name": "items",
            "features": [{"name": "item", "kind": "id", "scope": "candidate", "table": "t", **fields}],
            "tables": [{"name": "t", "dim": 2, "rows": 4}],
            "tasks": [{"name": "like"}],
        }
    )


def small_request(**features):
    values = {
        "user": 3,
        "seen": [[0, 1, 9, 2]],
        "age": np.array([[1, np.nan], [3, 4]], np.float32),
        "tags": [[], [0, 3, -1]],
    }
    return RankRequest(SPEC, values | features)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_worked_out_by_hand(backend, gather):
    out = gather(Gatherer(SPEC, TABLES, backend=backend), [(small_request(), 0, 2)], Bucket(3, 2))
    np.testing.assert_array_equal(out["context"], [[4, 40], [4, 40]])
    # The last three of [0, 1, 9, 2]; 9 is out of range, reads as zeros and counts as present.
    np.testing.assert_array_equal(out["seen"], [[[2, 20], [0, 0], [3, 30]]] * 2)
    np.testing.assert_array_equal(out["seen.mask"], [[True, True, True]] * 2)
    third = np.float32(3)
    row = [3, 4, np.float32(5) / third, np.float32(50) / third]
    np.testing.assert_array_equal(out["candidate"], [[1, 5, 0, 0], row, row])
    np.testing.assert_array_equal(out["request_of_row"], [0, 0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_past_a_sequence_are_zeros_and_masked(backend, gather):
    request = small_request(seen=[[2]])
    out = gather(Gatherer(SPEC, TABLES, backend=backend), [(request, 0, 1)], Bucket(1, 1))
    np.testing.assert_array_equal(out["seen"], [[[3, 30], [0, 0], [0, 0]]])
    np.testing.assert_array_equal(out["seen.mask"], [[True, False, False]])


def test_a_bucket_that_is_too_small_is_refused(gather):
    gatherer = Gatherer(SPEC, TABLES)
    with pytest.raises(
        BucketError, match=r"bucket 1x1 \(rows x requests\) doesn't hold 2 rows of 1 requests"
    ):
        gather(gatherer, [(small_request(), 0, 2)], Bucket(1, 1))


@pytest.mark.parametrize(("begin", "end"), [(0, 3), (-1, 1), (1, 1), (2, 1)])
def test_a_segment_outside_its_request_is_refused(begin, end, gather):
    with pytest.raises(ConfigError, match=r"segment 0: expected 0 <= begin < end <= 2 candidates, got \["):
        gather(Gatherer(SPEC, TABLES), [(small_request(), begin, end)], Bucket(8, 1))


def test_no_segments_are_refused(outputs):
    gatherer = Gatherer(SPEC, TABLES)
    with pytest.raises(ConfigError, match="expected at least one segment, got none"):
        gatherer.gather([], Bucket(1, 1), outputs(gatherer, Bucket(1, 1)))


def test_a_request_bound_elsewhere_is_refused(outputs):
    gatherer = Gatherer(SPEC, TABLES)
    other = Gatherer(SPEC, TABLES).bind(small_request())
    with pytest.raises(ConfigError, match="segment 0: its request was bound by another gatherer"):
        gatherer.gather([Segment(other, 0, 1)], Bucket(1, 1), outputs(gatherer, Bucket(1, 1)))


def test_a_request_of_another_model_is_refused():
    spec = ModelSpec(name="other", features=SPEC.features, tables=SPEC.tables, tasks=SPEC.tasks)
    with pytest.raises(ConfigError, match="expected a request of model 'other'"):
        Gatherer(spec, TABLES).bind(small_request())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"context": np.zeros((1, 3), np.float32)},
            r"'context': expected float32 of shape \[1, 2\], got float32",
        ),
        ({"context": np.zeros((1, 2), np.float64)}, r"'context': .* got float64 of shape \[1, 2\]"),
        ({"seen": np.zeros((2, 3, 1), np.float32).T}, "'seen': expected a writable C-contiguous array"),
        ({"extra": np.zeros(1)}, r"expected arrays \['candidate', 'context'"),
    ],
)
def test_a_wrong_output_array_is_refused(change, message, outputs):
    gatherer = Gatherer(SPEC, TABLES)
    out = outputs(gatherer, Bucket(2, 1)) | change
    if "seen" in change:
        out["seen"] = np.zeros((1, 2, 3), np.float32).transpose(0, 2, 1)
    with pytest.raises(ConfigError, match=message):
        gatherer.gather([Segment(gatherer.bind(small_request()), 0, 1)], Bucket(2, 1), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_changed_after_the_check_never_read_outside_a_table(backend, outputs):
    spec = item_model()
    ids = np.array([1, 2])
    gatherer = Gatherer(spec, {"t": TABLES["small"]}, backend=backend)
    request = RankRequest(spec, {"item": ids})
    bound = gatherer.bind(request)
    ids[1] = 2**40
    with pytest.raises(FeatureError, match=r"feature 'item': expected ids in \[0, 4\) of table 't'"):
        gatherer.gather([Segment(bound, 0, 2)], Bucket(2, 1), outputs(gatherer, Bucket(2, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_of_an_unused_feature_are_never_resolved(backend, gather):
    spec = item_model()
    ids = np.array([1, 2])
    gatherer = Gatherer(spec, {"t": TABLES["small"]}, backend=backend, unused=["item"])
    request = RankRequest(spec, {"item": ids}, check=gatherer.check)
    ids[1] = 2**40  # the gather of a used one refuses it, as above
    out = gather(gatherer, [(request, 0, 2)], Bucket(3, 1))
    np.testing.assert_array_equal(out.pop("request_of_row"), [0, 0, 0])
    assert out == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_is_checked_whole_whatever_is_unused(backend):
    spec = item_model()
    gatherer = Gatherer(spec, {"t": TABLES["small"]}, backend=backend, unused=["item"])
    with pytest.raises(FeatureError, match=r"feature 'item': expected ids in \[0, 4\)"):
        RankRequest(spec, {"item": [1, 4]}, check=gatherer.check)


_READS_FORBIDDEN_MEMORY = """
import mmap, sys
import numpy as np
from xlarank.host import Gatherer, Segment, aligned_empty
from xlarank.spec import Bucket, ModelSpec, RankRequest
lookups = {
    "user": {"kind": "id", "scope": "context"},
    "seen": {"kind": "sequence", "scope": "context", "max_length": 3},
    "tags": {"kind": "id_list", "scope": "candidate", "combiner": "mean"},
}
spec = ModelSpec.from_dict({
    "name": "m",
    "features": [{"name": "age", "kind": "dense", "scope": "candidate"},
                 *({"name": name, "table": "t", **fields} for name, fields in lookups.items())],
    "tables": [{"name": "t", "dim": 2, "rows": 4}],
    "tasks": [{"name": "like"}],
})
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)  # whoever reads it dies
table = np.frombuffer(memory, np.float32, 8).reshape(4, 2)
request = RankRequest(spec, {"user": 1, "seen": [[1, 2]], "tags": [[3]], "age": [7.0]})
for unused in (lookups, set(lookups) - {sys.argv[2]}):
    gatherer = Gatherer(spec, {"t": table}, backend=sys.argv[1], unused=unused)
    leaves = gatherer.signature.leaves
    out = {leaf.name: aligned_empty(leaf.shape(Bucket(1, 1)), leaf.dtype) for leaf in leaves}
    gatherer.gather([Segment(gatherer.bind(request), 0, 1)], Bucket(1, 1), out)
    print(out["candidate"].tolist(), flush=True)
"""


@pytest.mark.parametrize("used", ["user", "seen", "tags"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_of_unused_features_is_never_read(backend, used):
    result = subprocess.run(
        [sys.executable, "-c", _READS_FORBIDDEN_MEMORY, backend, used],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # The second gather reads it for one feature, which shows that reading would be seen.
    assert (result.stdout, result.returncode) == ("[[7.0]]\n", -signal.SIGSEGV), result.stderr


@needs_native
def test_valid_columns_of_other_dtypes_are_bound(gather):
    spec = item_model(dtype="string", preprocessing=["hash"])
    strings = StringColumn.from_strings(["a", "bc", "d"])
    narrow = StringColumn(strings.blob, strings.offsets.astype(np.int32))
    gatherer = Gatherer(spec, {"t": TABLES["small"]}, backend="native")
    expected = gather(gatherer, [(RankRequest(spec, {"item": strings}), 0, 3)], Bucket(3, 1))
    request = RankRequest(spec, {"item": narrow}, check=gatherer.check)
    out = gather(gatherer, [(request, 0, 3)], Bucket(3, 1))
    np.testing.assert_array_equal(out["candidate"], expected["candidate"])


def test_tables_and_arguments_are_checked():
    with pytest.raises(ConfigError, match=r"expected tables \['small'\], got \['big'\]"):
        Gatherer(SPEC, {"big": TABLES["small"]})
    with pytest.raises(ConfigError, match=r"table 'small': expected float32 of shape \[4, 2\]"):
        Gatherer(SPEC, {"small": TABLES["small"][:3]})
    with pytest.raises(ConfigError, match="num_threads must be >= 1; was 0"):
        Gatherer(SPEC, TABLES, num_threads=0)
    with pytest.raises(ConfigError, match=r"backend must be .*; was 'gpu'"):
        Gatherer(SPEC, TABLES, backend="gpu")
    with pytest.raises(ConfigError, match="activations must be 'float32' or 'bfloat16'; was 'float16'"):
        Gatherer(SPEC, TABLES, activations="float16")
    with pytest.raises(
        ConfigError, match=r"model 'm': unused: expected names of its features, got \['aged'\]"
    ):
        Gatherer(SPEC, TABLES, unused=["aged", "age"])
