"""Leaves of bfloat16: every float32 is rounded as ml_dtypes rounds it, wherever it comes from."""

import ml_dtypes
import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.host import Gatherer, Segment, native_available
from xlarank.spec import Bucket, ModelSpec, Ragged, RankRequest

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")
BACKENDS = ["numpy", pytest.param("native", marks=needs_native)]

WIDTH = 96
BITS = np.add.outer(
    np.arange(2**16, dtype=np.uint32) << 16, np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
)
EDGES = BITS.view(np.float32).reshape(-1, WIDTH)  # [4096, 96] every upper half, with lower ones at all edges
# A NaN that signals is quiet after arithmetic, and NumPy would warn of it.
QUIET = np.where(np.isnan(EDGES), np.float32(np.nan), EDGES)


def model(**feature):
    tables = [{"name": "t", "dim": WIDTH, "rows": len(EDGES)}] if "table" in feature else []
    feature = {"name": "f", "scope": "candidate"} | feature
    return ModelSpec.from_dict(
        {"name": "m", "features": [feature], "tables": tables, "tasks": [{"name": "like"}]}
    )


def rounded(backend, gather, spec, tables, values):
    """The bits of the only leaf of floats, for one request of the feature `f`."""
    gatherer = Gatherer(spec, tables, backend=backend, activations="bfloat16")
    request = RankRequest(spec, {"f": values})
    rows = request.num_candidates
    out = gather(gatherer, [(request, 0, rows)], Bucket(rows, 1))
    leaf = gatherer.signature.leaves[0]
    assert out[leaf.name].dtype == ml_dtypes.bfloat16
    return out[leaf.name].view(np.uint16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_worked_out_by_hand(backend, gather):
    values = {
        1.0: 1.0,
        1 + 2**-8: 1.0,  # half way between 1 and 1 + 2^-7: to the even one
        1 + 3 * 2**-8: 1 + 2**-6,
        1 + 2**-8 + 2**-23: 1 + 2**-7,
        -(1 + 2**-8): -1.0,
        3.4e38: np.inf,
        2.0**-133: 2.0**-133,  # the smallest
        2.0**-134: 0.0,
        2.0**-134 + 2.0**-149: 2.0**-133,
        -(2.0**-149): -0.0,
    }
    column = np.array([list(values)], np.float32)
    spec = model(kind="dense", width=len(values))
    expected = np.array([list(values.values())], np.float32).view(np.uint32) >> 16
    np.testing.assert_array_equal(rounded(backend, gather, spec, {}, column), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("feature", "table"),
    [
        ({"kind": "id"}, EDGES),
        ({"kind": "id_list", "combiner": "sum"}, QUIET),
        ({"kind": "id_list", "combiner": "mean"}, QUIET),
        ({"kind": "sequence", "max_length": 1}, EDGES),
        ({"kind": "sequence", "max_length": 2}, EDGES),
    ],
)
def test_every_upper_half_of_a_table_is_rounded_as_ml_dtypes_does(backend, feature, table, gather):
    ids = np.arange(len(table))
    is_id = feature["kind"] == "id"
    spec = model(table="t", **feature)
    with np.errstate(invalid="ignore"):  # NaN that signal
        values = ids if is_id else Ragged(ids, np.ones(len(ids), np.int32))
        bits = rounded(backend, gather, spec, {"t": table}, values)
        # A sum starts at 0, so that -0 is 0 there.
        expected = (table + np.float32(0) if feature["kind"] == "id_list" else table).astype(
            ml_dtypes.bfloat16
        )
    if feature["kind"] == "sequence":
        assert not bits[:, 1:].any()
        bits = bits[:, 0]
    np.testing.assert_array_equal(bits, expected.view(np.uint16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_upper_half_of_a_dense_value_is_rounded_as_ml_dtypes_does(backend, gather):
    finite = np.where(np.isfinite(EDGES), EDGES, np.float32(0))
    bits = rounded(backend, gather, model(kind="dense", width=WIDTH), {}, finite)
    np.testing.assert_array_equal(bits, finite.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_preprocessing_makes_infinite_stays_so(backend, gather):
    steps = [{"op": "standardise", "mean": 0, "std": 1e-38}, {"op": "clip", "low": -1e39, "high": 1e39}]
    spec = model(kind="dense", preprocessing=steps, default=-8.0)
    column = np.array([[9], [-9], [np.nan], [0]], np.float32)
    np.testing.assert_array_equal(
        rounded(backend, gather, spec, {}, column), [[0x7F80], [0xFF80], [0xFF80], [0]]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_array_for_a_bfloat16_leaf_is_refused(backend, outputs):
    spec = model(kind="dense")
    gatherer = Gatherer(spec, {}, backend=backend, activations="bfloat16")
    segment = Segment(gatherer.bind(RankRequest(spec, {"f": [1.0]})), 0, 1)
    out = outputs(gatherer, Bucket(1, 1)) | {"candidate": np.zeros((1, 1), np.float32)}
    with pytest.raises(ConfigError, match=r"'candidate': expected bfloat16 of shape \[1, 1\], got float32"):
        gatherer.gather([segment], Bucket(1, 1), out)
