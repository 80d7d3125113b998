"""Buckets, the program's signature, latency profiles and precision."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.errors import BucketError, ConfigError
from xlarank.spec import (
    DEFAULT_ROWS,
    Bucket,
    BucketLadder,
    ErrorBudget,
    LatencyProfile,
    Leaf,
    ModelSpec,
    Precision,
    PrecisionPolicy,
    Scope,
    Signature,
    Slot,
    TaskKind,
    Tolerance,
)


def test_a_ladder_has_one_a_middle_and_as_many_requests_as_rows():
    assert str(BucketLadder.of_rows([64, 8])) == "8x1, 8x8, 64x1, 64x2, 64x64"
    assert str(BucketLadder.of_rows([1])) == "1x1"
    ladder = BucketLadder.of_rows()
    assert {bucket.rows for bucket in ladder.buckets} == set(DEFAULT_ROWS)
    assert ladder.max_rows == 1024


@given(
    rows=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    num_rows=st.integers(0, 320),
    num_requests=st.integers(0, 320),
)
def test_the_bucket_is_the_smallest_that_holds_both(rows, num_rows, num_requests):
    ladder = BucketLadder.of_rows(rows)
    holding = [b for b in ladder.buckets if b.rows >= num_rows and b.requests >= num_requests]
    assert (ladder.smallest(num_rows, num_requests) is not None) == bool(holding)
    if max(num_rows, num_requests) <= max(rows):
        assert holding  # any mix up to the largest row count
    if holding:
        assert ladder.bucket_for(num_rows, num_requests) == min(holding, key=lambda b: (b.rows, b.requests))
    else:
        with pytest.raises(BucketError, match=f"no bucket holds {num_rows} rows of {num_requests} requests"):
            ladder.bucket_for(num_rows, num_requests)


@pytest.mark.parametrize(
    ("rows", "requests", "message"),
    [
        (4, 5, "bucket: expected 1 <= requests <= rows, got 4x5"),
        (0, 0, "bucket: expected 1 <= requests <= rows, got 0x0"),
        (8.0, 1, r"bucket: rows must be an integer in \[0, 2\*\*31\); was 8.0"),
        (8, True, r"bucket: requests must be an integer in \[0, 2\*\*31\); was True"),
        (8, -1, "bucket: requests must be an integer .*; was -1"),
        ("8", 1, "bucket: rows must be an integer .*; was '8'"),
    ],
)
def test_a_bucket_of_other_numbers_is_refused(rows, requests, message):
    with pytest.raises(ConfigError, match=message):
        Bucket(rows, requests)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((), "bucket ladder: expected at least one bucket, got none"),
        ([Bucket(8, 1), Bucket(4, 1)], "expected distinct ascending buckets, got 8x1, 4x1"),
        ([Bucket(8, 1), Bucket(8, 1)], "expected distinct ascending buckets, got 8x1, 8x1"),
        ([(8, 1)], r"bucket ladder: buckets must be Buckets; one was \(8, 1\)"),
        (Bucket(8, 1), "bucket ladder: buckets must be a list; was Bucket"),
    ],
)
def test_a_ladder_of_other_buckets_is_refused(buckets, message):
    with pytest.raises(ConfigError, match=message):
        BucketLadder(buckets)


@pytest.mark.parametrize("rows", [[0], [8.0], ["8"], [True]])
def test_row_counts_are_integers(rows):
    with pytest.raises(ConfigError, match=r"bucket ladder: row counts must be an integer in \[1, "):
        BucketLadder.of_rows(rows)
    with pytest.raises(ConfigError, match="expected at least one bucket"):
        BucketLadder.of_rows([])


SPEC = ModelSpec.from_dict(
    {
        "name": "m",
        "features": [
            {"name": "price", "kind": "dense", "scope": "candidate", "width": 2},
            {"name": "user", "kind": "id", "scope": "context", "table": "t"},
            {"name": "age", "kind": "dense", "scope": "context"},
            {"name": "seen", "kind": "sequence", "scope": "context", "table": "t", "max_length": 5},
            {"name": "tags", "kind": "id_list", "scope": "candidate", "table": "t", "combiner": "sum"},
        ],
        "tables": [{"name": "t", "dim": 3, "rows": 9}],
        "tasks": [{"name": "like"}, {"name": "share", "output": "p"}],
    }
)


def test_a_signature_has_a_matrix_a_scope_and_two_leaves_a_sequence():
    signature = Signature.of_model(SPEC)
    assert signature.leaves == (
        Leaf("context", Scope.CONTEXT, (4,), "float32"),
        Leaf("seen", Scope.CONTEXT, (5, 3), "float32"),
        Leaf("seen.mask", Scope.CONTEXT, (5,), "bool"),
        Leaf("candidate", Scope.CANDIDATE, (5,), "float32"),
        Leaf("request_of_row", Scope.CANDIDATE, (), "int32"),
    )
    assert signature.slots == {
        "price": Slot("candidate", 0, 2),
        "user": Slot("context", 0, 3),
        "age": Slot("context", 3, 4),
        "seen": Slot("seen", 0, 3),
        "tags": Slot("candidate", 2, 5),
    }
    assert signature.tasks == ("like", "share")
    assert [leaf.shape(Bucket(8, 2)) for leaf in signature.leaves] == [
        (2, 4),
        (2, 5, 3),
        (2, 5),
        (8, 5),
        (8,),
    ]
    assert [leaf.name for leaf in signature.context_leaves] == ["context", "seen", "seen.mask"]
    assert [leaf.name for leaf in signature.candidate_leaves] == ["candidate"]
    assert signature.leaf_by_name["seen"].leading(Bucket(8, 2)) == 2


def test_signatures_of_equal_specs_are_one_key():
    again = Signature.of_model(ModelSpec.from_dict(SPEC.to_dict()))
    assert {Signature.of_model(SPEC): 1}[again] == 1


def test_an_empty_leaf_is_left_out():
    document = SPEC.to_dict()
    document |= {"features": document["features"][:1], "tables": []}
    leaves = Signature.of_model(ModelSpec.from_dict(document)).leaves
    assert [leaf.name for leaf in leaves] == ["candidate", "request_of_row"]


def test_an_unused_feature_has_no_slot_and_no_columns():
    signature = Signature.of_model(SPEC, unused={"price", "user", "seen"})
    assert signature.leaves == (
        Leaf("context", Scope.CONTEXT, (1,), "float32"),
        Leaf("candidate", Scope.CANDIDATE, (3,), "float32"),
        Leaf("request_of_row", Scope.CANDIDATE, (), "int32"),
    )
    assert signature.slots == {"age": Slot("context", 0, 1), "tags": Slot("candidate", 0, 3)}
    assert signature != Signature.of_model(SPEC)
    names = [feature.name for feature in SPEC.features]
    assert [leaf.name for leaf in Signature.of_model(SPEC, unused=names).leaves] == ["request_of_row"]


def test_an_unused_name_that_is_no_features_is_refused():
    with pytest.raises(
        ConfigError, match=r"model 'm': unused: expected names of its features, got \['a', 'z'\]"
    ):
        Signature.of_model(SPEC, unused=["z", "age", "a"])


def test_matrices_and_sequences_may_be_bfloat16():
    signature = Signature.of_model(SPEC, dtype="bfloat16")
    assert {leaf.name: leaf.dtype for leaf in signature.leaves} == {
        "context": "bfloat16",
        "seen": "bfloat16",
        "seen.mask": "bool",
        "candidate": "bfloat16",
        "request_of_row": "int32",
    }
    exact = Signature.of_model(SPEC)
    assert signature.slots == exact.slots
    assert signature != exact
    with pytest.raises(ConfigError, match="activations must be 'float32' or 'bfloat16'; was 'int8'"):
        Signature.of_model(SPEC, dtype="int8")


@pytest.mark.parametrize(
    ("seconds", "knee"),
    [
        # rows/s: 8, 32 and 33, so 32 is within 95% of the best.
        ({(8, 1): 1.0, (32, 1): 1.0, (128, 1): 128 / 33}, 32),
        # rows/s: 8, 31 and 33; 31 is not.
        ({(8, 1): 1.0, (31, 1): 1.0, (128, 1): 128 / 33}, 128),
        # The best form of a row count counts.
        ({(8, 1): 1.0, (32, 1): 8.0, (32, 32): 1.0}, 32),
        ({(8, 1): 1.0, (64, 1): 16.0}, 8),
        ({(8, 1): 1.0, (19, 1): 19 / 7.6}, 8),
        # rows/s: 7.6 and 8: exactly 95%.
        ({(4, 1): 0.5, (19, 1): 2.0}, 19),
    ],
)
def test_the_knee_is_the_smallest_size_near_the_best_throughput(seconds, knee):
    assert LatencyProfile({Bucket(*size): value for size, value in seconds.items()}).knee_rows() == knee


def test_an_unmeasured_bucket_is_named_with_those_that_are():
    profile = LatencyProfile({Bucket(8, 1): 0.25})
    assert profile.seconds_of(Bucket(8, 1)) == 0.25
    with pytest.raises(BucketError, match=r"bucket 16x1 has no measured time; measured: \['8x1'\]"):
        profile.seconds_of(Bucket(16, 1))


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({}, "latency profile: expected seconds by bucket, got {}"),
        ([], "latency profile: expected seconds by bucket"),
        ({(8, 1): 1.0}, r"latency profile: expected a Bucket as key, got \(8, 1\)"),
        ({Bucket(8, 1): 0}, "latency profile: seconds of bucket 8x1 must be > 0; was 0"),
        ({Bucket(8, 1): math.nan}, "latency profile: seconds of bucket 8x1 must be a finite number; was nan"),
        ({Bucket(8, 1): "1"}, "seconds of bucket 8x1 must be a finite number; was '1'"),
    ],
)
def test_a_profile_of_other_times_is_refused(seconds, message):
    with pytest.raises(ConfigError, match=message):
        LatencyProfile(seconds)


def test_a_tolerance_is_by_kind_of_task():
    tolerance = Tolerance(probability=1e-3, regression=2e-3)
    assert (tolerance.of(TaskKind.BINARY), tolerance.of(TaskKind.REGRESSION)) == (1e-3, 2e-3)
    assert PrecisionPolicy().tolerance == Tolerance(1e-5, 1e-5)
    assert hash(PrecisionPolicy()) == hash(PrecisionPolicy())


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True, None])
def test_a_tolerance_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ConfigError, match="tolerance: "):
        Tolerance(probability=value)
    with pytest.raises(ConfigError, match="tolerance: "):
        Tolerance(regression=value)


@pytest.mark.parametrize("field", ["max_score_error", "max_auc_loss"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True, None])
def test_a_budget_that_is_no_positive_number_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"error budget: {field} must be"):
        ErrorBudget(**{field: value})


def test_a_policy_is_auto_or_one_precision():
    assert PrecisionPolicy.named("auto").precision is None
    assert PrecisionPolicy.named("int8", ErrorBudget(0.1)).precision is Precision.INT8
    assert PrecisionPolicy("bfloat16").precision is Precision.BFLOAT16  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"precision: expected one of \['auto', 'float32', 'bfloat16', .*\], got 'int4'"
    ):
        PrecisionPolicy.named("int4")
    with pytest.raises(ConfigError, match="precision: tolerance must be of type Tolerance; was 1e-05"):
        PrecisionPolicy(tolerance=1e-5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"precision: budget must be of type ErrorBudget; was 0\.1"):
        PrecisionPolicy(budget=0.1)  # type: ignore[arg-type]
