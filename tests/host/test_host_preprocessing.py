import math

import numpy as np
import pytest
import xxhash

from xlarank.errors import FeatureError
from xlarank.host import model_inputs, to_dense, to_rows, truncate
from xlarank.spec import FeatureSpec, ModelSpec, Ragged, StringColumn


def _dense(**fields):
    return FeatureSpec(**{"name": "f", "kind": "dense", "scope": "candidate", **fields})


def _lookup(out_of_range="error", rows=5, **fields):
    """A model of one lookup feature, and the feature."""
    spec = ModelSpec.from_dict(
        {
            "name": "m",
            "features": [{"name": "f", "kind": "id", "scope": "candidate", "table": "t", **fields}],
            "tables": [{"name": "t", "dim": 2, "rows": rows, "out_of_range": out_of_range}],
            "tasks": [{"name": "like"}],
        }
    )
    return spec, spec.features[0]


def test_dense_operations_apply_in_order():
    feature = _dense(
        preprocessing=(
            {"op": "clip", "low": 0, "high": 10},
            "log1p",
            {"op": "standardise", "mean": 1, "std": 2},
        )
    )
    values = to_dense(feature, np.array([[-5], [3], [99]], np.float32))
    expected = [[(math.log1p(x) - 1) / 2] for x in (0, 3, 10)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert values.dtype == np.float32


def test_standardise_takes_a_mean_and_std_a_column():
    feature = _dense(width=2, preprocessing=({"op": "standardise", "mean": [1, 2], "std": [2, 4]},))
    np.testing.assert_array_equal(to_dense(feature, np.array([[5, 4]], np.float32)), [[2, 0.5]])


def test_nan_reads_as_the_default_before_the_operations():
    feature = _dense(default=7.0, preprocessing=({"op": "clip", "low": 0, "high": 5},))
    np.testing.assert_array_equal(to_dense(feature, np.array([[np.nan], [1]], np.float32)), [[5], [1]])


def test_the_input_of_to_dense_is_left_alone():
    values = np.array([[np.nan], [3]], np.float32)
    to_dense(_dense(default=1.0, preprocessing=("log1p",)), values)
    np.testing.assert_array_equal(values, [[np.nan], [3]])


def test_a_hashed_id_is_xxh64_mod_rows():
    spec, feature = _lookup(rows=1000, preprocessing=[{"op": "hash", "seed": 9}])
    ids = [0, 1, -1, 2**40]
    expected = [xxhash.xxh64_intdigest(i.to_bytes(8, "little", signed=True), 9) % 1000 for i in ids]
    assert to_rows(spec, feature, np.array(ids)).tolist() == expected
    spec, feature = _lookup(rows=1000, dtype="string", preprocessing=[{"op": "hash", "seed": 9}])
    expected = [xxhash.xxh64_intdigest(s, 9) % 1000 for s in (b"", b"abc")]
    assert to_rows(spec, feature, StringColumn.from_strings(["", "abc"])).tolist() == expected


def test_a_vocabulary_counts_from_one_and_gives_strangers_row_zero():
    spec, feature = _lookup(preprocessing=[{"op": "vocabulary", "values": [30, 10, 20]}])
    assert to_rows(spec, feature, np.array([10, 20, 30, 40, -1])).tolist() == [2, 3, 1, 0, 0]


def test_a_bucket_is_the_number_of_boundaries_up_to_the_value():
    spec, feature = _lookup(
        default=2.5, preprocessing=["log1p", {"op": "bucketise", "boundaries": [0, math.log1p(2.5)]}]
    )
    values = np.array([-0.5, 0, 1, 3, np.nan], np.float32)
    assert to_rows(spec, feature, values).tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("zero", [-1, 0, 4, -1]),
        ("clip", [0, 0, 4, 4]),
        (
            "hash",
            [
                xxhash.xxh64_intdigest((-7).to_bytes(8, "little", signed=True), 0) % 5,
                0,
                4,
                xxhash.xxh64_intdigest((5).to_bytes(8, "little"), 0) % 5,
            ],
        ),
    ],
)
def test_ids_out_of_range_follow_the_policy_of_the_table(policy, expected):
    spec, feature = _lookup(out_of_range=policy)
    assert to_rows(spec, feature, np.array([-7, 0, 4, 5])).tolist() == expected


def test_ids_out_of_range_are_refused_under_policy_error():
    spec, feature = _lookup()
    with pytest.raises(
        FeatureError, match=r"feature 'f': expected ids in \[0, 5\) of table 't', got 5 at position 1"
    ):
        to_rows(spec, feature, np.array([4, 5]))


@pytest.mark.parametrize("strings", [False, True])
def test_truncation_keeps_the_last_ids_of_each_bag(strings):
    _, feature = _lookup(kind="sequence", max_length=2)
    bags = [[1, 2, 3], [], [4], [5, 6]]
    kept = [2, 3, 4, 5, 6]
    if strings:
        ragged = truncate(feature, Ragged.from_bags([[str(i) for i in bag] for bag in bags]))
        assert isinstance(ragged.values, StringColumn)
        assert ragged.values.to_bytes() == [str(i).encode() for i in kept]
    else:
        ragged = truncate(feature, Ragged.from_bags(bags))
        np.testing.assert_array_equal(ragged.values, kept)
    np.testing.assert_array_equal(ragged.lengths, np.array([2, 0, 1, 2], np.int32), strict=True)


def test_bags_within_the_limit_are_not_copied():
    _, feature = _lookup(kind="sequence", max_length=3)
    ragged = Ragged.from_bags([[1, 2, 3], []])
    assert truncate(feature, ragged) is ragged
    _, feature = _lookup(kind="id_list", combiner="sum")
    assert truncate(feature, ragged) is ragged


@pytest.mark.parametrize(
    ("bags", "limit", "expected"),
    [
        ([[1], [2, 3, 4]], None, [[1, -1, -1], [2, 3, 4]]),
        ([[1], [2, 3, 4]], 2, [[1, -1], [3, 4]]),
        ([[1], [2]], 3, [[1, -1, -1], [2, -1, -1]]),
        ([[], []], None, [[-1], [-1]]),
        ([], None, np.zeros((0, 1))),
    ],
)
def test_bags_are_left_aligned_and_padded(bags, limit, expected):
    spec, _ = _lookup(kind="id_list", combiner="sum", max_length=limit)
    values = np.array([value for bag in bags for value in bag], np.int64)
    inputs = model_inputs(spec, [Ragged(values, np.array([len(bag) for bag in bags], np.int32))])
    np.testing.assert_array_equal(inputs["f"], np.array(expected, np.int32), strict=True)
    lengths = [min(len(bag), limit or 99) for bag in bags]
    np.testing.assert_array_equal(inputs["f.lengths"], np.array(lengths, np.int32), strict=True)


def test_a_sequence_without_rows_keeps_its_length():
    spec, _ = _lookup(kind="sequence", max_length=4)
    inputs = model_inputs(spec, [Ragged(np.zeros(0, np.int64), np.zeros(0, np.int32))])
    assert inputs["f"].shape == (0, 4)


def test_the_model_inputs_of_ids_are_int32_rows():
    spec, _ = _lookup(out_of_range="zero")
    inputs = model_inputs(spec, [np.array([3, 9])])
    np.testing.assert_array_equal(inputs["f"], np.array([3, -1], np.int32), strict=True)
