"""Specs take what DESIGN states, refuse the rest with the value, and survive JSON."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.errors import ConfigError
from xlarank.spec import (
    Bucketise,
    Clip,
    FeatureSpec,
    Hash,
    Log1p,
    ModelSpec,
    RowFormat,
    Standardise,
    TableSpec,
    TaskSpec,
    Vocabulary,
    operation_from_dict,
    operation_to_dict,
    rows_needed,
)

DENSE = {"name": "f", "kind": "dense", "scope": "candidate"}
ID = {"name": "f", "kind": "id", "scope": "candidate", "table": "t"}
BAG = {**ID, "kind": "id_list", "combiner": "mean"}
SEQUENCE = {**ID, "kind": "sequence", "max_length": 3}
HASHED = {**ID, "dtype": "string", "preprocessing": ["hash"]}
TABLE = {"name": "t", "dim": 2, "rows": 5}
MODEL = {"name": "m", "features": [ID], "tables": [TABLE], "tasks": [{"name": "like"}]}


def model(*features, table=None, **changes):
    return ModelSpec.from_dict(
        {**MODEL, "features": list(features) or [ID], "tables": [{**TABLE, **(table or {})}], **changes}
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "F"}, "feature: expected a name of [a-z][a-z0-9_]*, at most 128 characters, got 'F'"),
        ({"name": "f.lengths"}, "feature: expected a name of [a-z][a-z0-9_]*"),
        ({"name": "f\n"}, "feature: expected a name of"),
        ({"name": ""}, "feature: expected a name of"),
        ({"name": "f" * 129}, "feature: expected a name of"),
        ({"name": None}, "feature: expected a name of [a-z][a-z0-9_]*, at most 128 characters, got None"),
        ({"name": "context"}, "feature 'context': the name is reserved"),
        ({"name": "candidate"}, "feature 'candidate': the name is reserved"),
        ({"name": "request_of_row"}, "feature 'request_of_row': the name is reserved"),
        (
            {"kind": "ids"},
            "feature 'f': kind must be one of ['dense', 'id', 'id_list', 'sequence']; was 'ids'",
        ),
        ({"kind": ["id"]}, "feature 'f': kind must be one of"),
        ({"scope": None}, "feature 'f': scope must be one of ['context', 'candidate']; was None"),
        ({"dtype": "int32"}, "feature 'f': dtype must be one of ['float32', 'int64', 'string']; was 'int32'"),
        ({"dtype": "int64"}, "feature 'f': expected dtype float32, got int64"),
        ({"width": 0}, "feature 'f': width must be an integer in [1, 2**31); was 0"),
        ({"width": 2.0}, "feature 'f': width must be an integer in [1, 2**31); was 2.0"),
        ({"width": True}, "feature 'f': width must be an integer in [1, 2**31); was True"),
        ({"width": "2"}, "feature 'f': width must be an integer in [1, 2**31); was '2'"),
        ({"width": 2**31}, "feature 'f': width must be an integer in [1, 2**31); was 2147483648"),
        ({"table": "t"}, "feature 'f': a dense feature has no table"),
        ({"combiner": "sum", "max_length": 2}, "feature 'f': a dense feature has no combiner, max_length"),
        ({"preprocessing": "log1p"}, "feature 'f': preprocessing must be a list of operations; was 'log1p'"),
        ({"preprocessing": {"op": "log1p"}}, "feature 'f': preprocessing must be a list"),
        ({"preprocessing": None}, "feature 'f': preprocessing must be a list of operations; was None"),
        (
            {"preprocessing": [7]},
            "feature 'f': preprocessing: expected an op's name or a table with one, got 7",
        ),
        ({"preprocessing": ["exp"]}, "feature 'f': preprocessing: expected an op of ['bucketise', 'clip', "),
        ({"preprocessing": ["log1p", "log1p"]}, "feature 'f': each operation may appear once"),
        ({"preprocessing": ["standardise", "log1p"]}, "feature 'f': only clip may come before log1p"),
        ({"preprocessing": ["hash"]}, "feature 'f': ['hash'] make row numbers; a dense feature has none"),
        (
            {"preprocessing": [{"op": "standardise", "mean": [1, 2], "std": [1, 1]}]},
            "feature 'f': standardise has 2 means for width 1",
        ),
        ({"default": float("nan")}, "feature 'f': default must be a finite number; was nan"),
        ({"default": float("inf")}, "feature 'f': default must be a finite number; was inf"),
        ({"default": 1e39}, "feature 'f': default must fit float32; was 1e+39"),
        ({"default": 10**400}, "feature 'f': default must be a finite number; was 1000"),
        ({"default": True}, "feature 'f': default must be a finite number; was True"),
        ({"default": "1"}, "feature 'f': default must be a finite number; was '1'"),
        ({"default": [1.0]}, "feature 'f': default must be one value; was [1.0]"),
        ({"default": -1, "preprocessing": ["log1p"]}, "default must be > -1, which log1p needs; was -1"),
    ],
)
def test_a_dense_feature_is_refused_with_the_value(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        FeatureSpec(**(DENSE | fields))


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (ID, {"table": None}, "feature 'f': kind 'id' needs a table"),
        (
            ID,
            {"table": 5},
            "feature 'f': table: expected a name of [a-z][a-z0-9_]*, at most 128 characters, got 5",
        ),
        (ID, {"width": 2}, "feature 'f': width is for dense features; was 2"),
        (ID, {"combiner": "sum"}, "feature 'f': combiner is for kind 'id_list'; kind is 'id'"),
        (ID, {"max_length": 2}, "feature 'f': max_length is for id_list and sequence"),
        (ID, {"dtype": "string"}, "expected dtype int64, got string; strings need a hash or a vocabulary"),
        (ID, {"dtype": "float32"}, "feature 'f': expected dtype int64, got float32"),
        (ID, {"preprocessing": ["hash", "vocabulary"]}, "ids take one of hash, vocabulary, bucketise"),
        (ID, {"preprocessing": ["log1p"]}, "ids take one of hash, vocabulary, bucketise, got ['log1p']"),
        (
            ID,
            {"preprocessing": [{"op": "bucketise", "num_buckets": 2}, "standardise"]},
            "feature 'f': bucketise must come last and alone",
        ),
        (
            ID,
            {"default": 1.0},
            "feature 'f': default must be an integer in [-2**63, 2**63); was 1.0",
        ),
        (ID, {"default": 2**63}, "was 9223372036854775808"),
        (ID, {"default": False}, "was False"),
        (ID, {"default": (1,)}, "feature 'f': default must be one value; was (1,)"),
        (
            ID,
            {"preprocessing": [{"op": "vocabulary", "values": ["a"]}]},
            "feature 'f': dtype is int64 but the vocabulary holds str values",
        ),
        (BAG, {"combiner": None}, "feature 'f': an id_list needs a combiner of ['sum', 'mean', 'sqrtn']"),
        (
            BAG,
            {"combiner": "max"},
            "feature 'f': combiner must be one of ['sum', 'mean', 'sqrtn']; was 'max'",
        ),
        (BAG, {"default": 1}, "feature 'f': default must be a list of ids; was 1"),
        (BAG, {"default": [1, "a"]}, "was 'a'"),
        (BAG, {"preprocessing": [{"op": "bucketise", "num_buckets": 2}]}, "bucketise is for kind 'id'"),
        (SEQUENCE, {"max_length": None}, "feature 'f': a sequence needs max_length"),
        (SEQUENCE, {"max_length": 0}, "feature 'f': max_length must be an integer in [1, 2**31); was 0"),
        (SEQUENCE, {"max_length": 3.0}, "feature 'f': max_length must be an integer in [1, 2**31); was 3.0"),
        (HASHED, {"default": 7}, "feature 'f': default must be of dtype string; was 7"),
        (HASHED, {"default": "\ud800"}, "feature 'f': default: expected valid Unicode, got '\\ud800'"),
    ],
)
def test_a_lookup_feature_is_refused_with_the_value(base, fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        FeatureSpec(**(base | fields))


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (TableSpec, {"name": "t", "dim": 0}, "table 't': dim must be an integer in [1, 2**31); was 0"),
        (TableSpec, {"name": "t", "dim": 4.0}, "table 't': dim must be an integer in [1, 2**31); was 4.0"),
        (TableSpec, {"name": "t", "dim": True}, "table 't': dim must be an integer in [1, 2**31); was True"),
        (TableSpec, {"name": "t", "dim": 1, "rows": 0}, "rows must be an integer in [1, 2**31); was 0"),
        (
            TableSpec,
            {"name": "t", "dim": 1, "rows": 2**31},
            "rows must be an integer in [1, 2**31); was 21474",
        ),
        (TableSpec, {"name": "t", "dim": 1, "rows": "9"}, "rows must be an integer in [1, 2**31); was '9'"),
        (TableSpec, {"name": "t", "dim": 1, "rows": float("nan")}, "in [1, 2**31); was nan"),
        (
            TableSpec,
            {"name": "t", "dim": 1, "dtype": "int2"},
            "table 't': dtype must be one of ['float32', 'float16', 'bfloat16', 'int8', 'int4']; was 'int2'",
        ),
        (TableSpec, {"name": "t", "dim": 1, "out_of_range": "wrap"}, "out_of_range must be one of ['error'"),
        (TableSpec, {"name": "../t", "dim": 1}, "table: expected a name of"),
        (TaskSpec, {"name": "Like"}, "task: expected a name of [a-z][a-z0-9_]*"),
        (TaskSpec, {"name": "a", "kind": "rank"}, "kind must be one of ['binary', 'regression']; was 'rank'"),
        (TaskSpec, {"name": "a", "output": None}, "task 'a': output must be of [A-Za-z0-9_.:/-]"),
        (TaskSpec, {"name": "a", "output": " a"}, "at most 128 characters; was ' a'"),
        (TaskSpec, {"name": "a", "output": "a\n"}, "was 'a\\n'"),
        (TaskSpec, {"name": "a", "output": 5}, "was 5"),
        (TaskSpec, {"name": "a", "output": "x" * 129}, "at most 128 characters; was 'xxx"),
        (Clip, {"low": 2, "high": 1}, "clip: expected low <= high, got 2 and 1"),
        (Clip, {"low": "0", "high": 1}, "clip: low must be a finite number; was '0'"),
        (Clip, {"low": 0, "high": float("inf")}, "clip: high must be a finite number; was inf"),
        (Standardise, {"mean": 1.0}, "standardise: give both mean and std, or neither"),
        (Standardise, {"mean": True, "std": 1}, "standardise: mean must be a finite number; was True"),
        (Standardise, {"mean": "12", "std": 1}, "standardise: mean must be a finite number; was '12'"),
        (Standardise, {"mean": [1, 2], "std": [1]}, "expected as many means as stds, got 2 and 1"),
        (Standardise, {"mean": [], "std": []}, "expected as many means as stds, got 0 and 0"),
        (Standardise, {"mean": [0.0], "std": [0.0]}, "standardise: expected stds > 0 in float32, got [0.0]"),
        (
            Standardise,
            {"mean": [0.0], "std": [1e-50]},
            "standardise: expected stds > 0 in float32, got [1e-50]",
        ),
        (Standardise, {"mean": [float("nan")], "std": [1.0]}, "mean must be a finite number; was nan"),
        (Hash, {"seed": -1}, "hash: seed must be an integer in [0, 2**64); was -1"),
        (Hash, {"seed": 2**64}, "hash: seed must be an integer in [0, 2**64)"),
        (Hash, {"seed": 1.0}, "hash: seed must be an integer in [0, 2**64); was 1.0"),
        (Hash, {"seed": True}, "hash: seed must be an integer in [0, 2**64); was True"),
        (Vocabulary, {"values": "abc"}, "vocabulary: values must be a list; was 'abc'"),
        (Vocabulary, {"values": 5}, "vocabulary: values must be a list; was 5"),
        (Vocabulary, {"values": [1, "a"]}, "expected all int or all string values, got ['int', 'str']"),
        (Vocabulary, {"values": [True]}, "expected all int or all string values, got ['bool']"),
        (Vocabulary, {"values": [[1]]}, "expected all int or all string values, got ['list']"),
        (Vocabulary, {"values": [1, 1]}, "vocabulary: expected distinct values, got repeated ones"),
        (
            Vocabulary,
            {"values": [0, 2**63]},
            "vocabulary: expected int64 values, got 0 to 9223372036854775808",
        ),
        (Vocabulary, {"values": [-(2**63) - 1]}, "vocabulary: expected int64 values"),
        (Vocabulary, {"values": ["\ud800"]}, "vocabulary: expected valid Unicode, got '\\ud800'"),
        (Vocabulary, {"min_count": 0}, "vocabulary: min_count must be an integer >= 1; was 0"),
        (Vocabulary, {"min_count": 1.5}, "vocabulary: min_count must be an integer >= 1; was 1.5"),
        (Bucketise, {}, "bucketise: give boundaries, or num_buckets to have them fitted"),
        (Bucketise, {"num_buckets": 1}, "bucketise: num_buckets must be an integer >= 2; was 1"),
        (Bucketise, {"boundaries": [1, 1]}, "bucketise: expected ascending boundaries, got [1, 1]"),
        (Bucketise, {"boundaries": [1, float("nan")]}, "boundaries must be a finite number; was nan"),
        (Bucketise, {"boundaries": 3}, "bucketise: boundaries must be a list; was 3"),
    ],
)
def test_a_table_task_or_operation_is_refused_with_the_value(cls, fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        cls(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": ".hidden"},
            "model: expected a name of [A-Za-z0-9_.-], at most 128 characters, got '.hidden'",
        ),
        ({"name": "a/b"}, "model: expected a name of [A-Za-z0-9_.-]"),
        ({"name": 3}, "got 3"),
        ({"colour": 1, "bird": 2}, "model: unknown keys ['bird', 'colour']; expected of ['name', "),
        ({1: 1}, "model: unknown keys [1]"),
        ({"features": "f"}, "model 'm': features must be a list; was 'f'"),
        ({"features": {"name": "f"}}, "model 'm': features must be a list; was {'name': 'f'}"),
        ({"features": ["f"]}, "feature: expected a table of keys and values, got 'f'"),
        ({"features": [[]]}, "feature: expected a table of keys and values, got []"),
        ({"features": [{"kind": "dense", "scope": "candidate"}]}, "feature: missing keys ['name']"),
        ({"features": [{"name": "f", "kind": "dense"}]}, "feature 'f': missing keys ['scope']"),
        (
            {"features": [{**DENSE, "size": 3}]},
            "feature 'f': unknown keys ['size']; expected of ['name', 'kind'",
        ),
        ({"features": [{**DENSE, 3: 3}]}, "feature 'f': unknown keys [3]"),
        ({"features": [{**DENSE, "preprocessing": [{}]}]}, "feature 'f': preprocessing: expected an op of"),
        ({"features": [{**DENSE, "preprocessing": [{"op": ["x"]}]}]}, "expected an op of"),
        (
            {"features": [{**DENSE, "preprocessing": [{"op": "clip", "low": 0}]}]},
            "feature 'f': preprocessing 'clip': missing keys ['high']",
        ),
        (
            {"features": [{**DENSE, "preprocessing": [{"op": "log1p", "base": 2}]}]},
            "feature 'f': preprocessing 'log1p': unknown keys ['base']; expected of []",
        ),
        ({"features": [ID, ID]}, "model 'm': feature names must be distinct; repeated: ['f']"),
        (
            {"features": [{**ID, "scope": "context"}]},
            "expected at least one feature of scope 'candidate', got none",
        ),
        ({"tables": None}, "model 'm': tables must be a list; was None"),
        ({"tables": [None]}, "table: expected a table of keys and values, got None"),
        ({"tables": [TABLE, TABLE]}, "model 'm': table names must be distinct; repeated: ['t']"),
        ({"tables": []}, "model 'm': features name tables ['t']; it has []"),
        ({"tables": [TABLE, {**TABLE, "name": "u"}]}, "model 'm': no feature reads tables ['u']"),
        ({"tasks": []}, "model 'm': expected at least one task, got none"),
        (
            {"tasks": [{"name": "a"}, {"name": "a"}]},
            "model 'm': task names must be distinct; repeated: ['a']",
        ),
        (
            {"tasks": [{"name": "a"}, {"name": "b", "output": "a"}]},
            "model 'm': task outputs must be distinct; repeated: ['a']",
        ),
    ],
)
def test_a_model_of_wrong_values_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelSpec.from_dict(MODEL | changes)


@pytest.mark.parametrize("value", [None, "m", ["m"], {}, {"name": "m", "features": []}])
def test_a_model_that_is_no_table_or_lacks_keys_is_refused(value):
    with pytest.raises(ConfigError, match=r"model: (expected a table of keys and values, got|missing keys)"):
        ModelSpec.from_dict(value)


def test_the_constructor_takes_specs_and_nothing_else():
    feature = FeatureSpec(**DENSE)
    with pytest.raises(ConfigError, match="model 'm': features must be a list; was FeatureSpec"):
        ModelSpec(name="m", features=feature, tasks=[TaskSpec(name="a")])
    with pytest.raises(ConfigError, match="model 'm': tasks must be TaskSpecs; one was 'a'"):
        ModelSpec(name="m", features=[feature], tasks=["a"])
    assert ModelSpec(name="m", features=[feature], tasks=[TaskSpec(name="a")]).tasks == (TaskSpec(name="a"),)


@pytest.mark.parametrize("operation", [{"op": "vocabulary", "values": [7, 8, 9]}])
def test_a_table_too_small_for_its_vocabulary_is_refused(operation):
    feature = {**ID, "preprocessing": [operation]}
    assert rows_needed(FeatureSpec(**feature)) == 4
    with pytest.raises(ConfigError, match="feature 'f': its preprocessing gives 4 rows, table 't' has 3"):
        model(feature, table={"rows": 3})
    model(feature, table={"rows": 4})


@pytest.mark.parametrize(
    ("feature", "table", "message"),
    [
        ({**ID, "default": 5}, {}, r"feature 'f': default must be in \[0, 5\), a row of table 't' .*; was 5"),
        ({**ID, "default": -1}, {}, r"default must be in \[0, 5\)"),
        ({**ID, "default": -1}, {"rows": None}, "feature 'f': default must be >= 0, a row of table 't'"),
        ({**BAG, "default": [0, 5]}, {}, r"was \(0, 5\)"),
    ],
)
def test_a_default_row_that_no_request_could_leave_out_is_refused(feature, table, message):
    with pytest.raises(ConfigError, match=message):
        model(feature, table=table)


def test_a_default_row_is_free_where_a_policy_or_a_hash_takes_it():
    for policy in ("zero", "clip", "hash"):
        model({**ID, "default": 99}, table={"out_of_range": policy})
    model({**ID, "default": 99, "preprocessing": ["hash"]})
    model({**ID, "default": 4}, {**BAG, "name": "g", "default": []})
    model({**ID, "default": 99}, table={"rows": None})


def test_numpy_numbers_become_python_numbers():
    table = TableSpec(name="t", dim=np.int32(4), rows=np.int64(7))
    feature = FeatureSpec(**{**ID, "default": np.int64(3)})
    assert [type(value) for value in (table.dim, table.rows, feature.default)] == [int] * 3
    operation = Standardise(mean=np.float32(0.5), std=np.array([2.0]))
    assert operation == Standardise(mean=(0.5,), std=(2.0,))
    assert Vocabulary(values=np.array([3, 4])) == Vocabulary(values=(3, 4))


@pytest.mark.parametrize(
    ("operations", "needs"),
    [
        ([Log1p()], True),
        ([Clip(low=-1, high=3), Log1p()], True),
        ([Clip(low=-0.5, high=3), Log1p()], False),
        ([Clip(low=0, high=1)], False),
        ([], False),
    ],
)
def test_only_a_clip_above_minus_one_makes_log1p_safe(operations, needs):
    assert FeatureSpec(**DENSE, preprocessing=operations).log1p_needs_check is needs


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"dtype": "int8"}, True),
        ({"updatable": True}, True),
        ({"rows": 77}, False),
        ({"out_of_range": "clip"}, False),
    ],
)
def test_a_request_is_taken_whatever_the_format_of_the_tables(changes, taken):
    other = model(table=changes)
    assert model().takes_requests_of(model())
    assert model().takes_requests_of(other) is taken


def test_an_unfitted_model_says_what_is_missing():
    spec = model(
        {**ID, "preprocessing": ["vocabulary"]},
        {**DENSE, "name": "g", "preprocessing": ["standardise"]},
        table={"rows": None},
    )
    assert not spec.is_fitted
    with pytest.raises(
        ConfigError, match=r"model 'm' is not fitted: feature 'f', feature 'g', rows of table 't'"
    ):
        spec.check_fitted()
    with pytest.raises(ConfigError, match="table 't': rows are not fitted yet"):
        _ = spec.tables[0].num_rows
    assert model().is_fitted
    model().check_fitted()


_FLOATS = st.floats(-1e6, 1e6)
_INT64 = st.integers(-(2**63), 2**63 - 1)
_TEXT = st.text(max_size=4)
OPERATIONS = {
    "float": st.one_of(
        st.builds(Log1p),
        st.tuples(_FLOATS, _FLOATS).map(lambda pair: Clip(low=min(pair), high=max(pair))),
        st.builds(Standardise),
        st.builds(lambda m, s: Standardise(mean=m, std=s), _FLOATS, st.floats(1e-3, 1e6)),
    ),
    "int64": st.one_of(
        st.builds(Hash, seed=st.integers(0, 2**64 - 1)),
        st.builds(Vocabulary, values=st.none() | st.lists(_INT64, unique=True, max_size=3).map(tuple)),
    ),
    "string": st.one_of(
        st.builds(Hash, seed=st.integers(0, 2**64 - 1)),
        st.builds(
            Vocabulary,
            values=st.none() | st.lists(_TEXT, unique=True, max_size=3).map(tuple),
            min_count=st.integers(1, 9),
        ),
    ),
    "bucketise": st.one_of(
        st.builds(Bucketise, num_buckets=st.integers(2, 9)),
        st.builds(Bucketise, boundaries=st.lists(_FLOATS, unique=True, max_size=3).map(sorted)),
    ),
}


@st.composite
def features(draw, name):
    scope = "candidate" if name == "f0" else draw(st.sampled_from(["context", "candidate"]))
    kind = draw(st.sampled_from(["dense", "id", "id_list", "sequence"]))
    base = {"name": name, "kind": kind, "scope": scope}
    if kind == "dense":
        return FeatureSpec(
            **base,
            width=draw(st.integers(1, 9)),
            preprocessing=draw(st.lists(OPERATIONS["float"], max_size=1)),
            default=draw(st.none() | st.floats(0, 10) | st.integers(0, 10)),
        )
    dtype = draw(st.sampled_from(["int64", "string"]))
    value = _INT64 if dtype == "int64" else _TEXT
    if kind == "id" and draw(st.booleans()):
        return FeatureSpec(**base, table="t", preprocessing=[draw(OPERATIONS["bucketise"])])
    ragged = kind != "id"
    return FeatureSpec(
        **base,
        table="t",
        dtype=dtype,
        combiner=draw(st.sampled_from(["sum", "mean", "sqrtn"])) if kind == "id_list" else None,
        max_length=draw(st.integers(1, 99)) if kind == "sequence" else None,
        preprocessing=[draw(OPERATIONS[dtype])],
        default=draw(st.none() | (st.lists(value, max_size=3) if ragged else value)),
    )


@st.composite
def models(draw):
    made = [draw(features(f"f{index}")) for index in range(draw(st.integers(1, 4)))]
    table = TableSpec(
        name="t",
        dim=draw(st.integers(1, 64)),
        rows=draw(st.none() | st.integers(10, 99)),
        dtype=draw(st.sampled_from(list(RowFormat))),
        out_of_range=draw(st.sampled_from(["error", "zero", "clip", "hash"])),
    )
    return ModelSpec(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,9}", fullmatch=True)),
        features=made,
        tables=[table] if any(feature.is_lookup for feature in made) else [],
        tasks=[TaskSpec(name="a", kind=draw(st.sampled_from(["binary", "regression"]))), TaskSpec(name="b")],
    )


@given(spec=models())
def test_a_spec_survives_json_and_hashes_by_value(spec):
    text = json.dumps(spec.to_dict(), allow_nan=False)
    again = ModelSpec.from_dict(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    assert json.dumps(again.to_dict()) == text


@given(operation=st.one_of(*OPERATIONS.values()))
def test_an_operation_survives_json(operation):
    assert operation_from_dict(json.loads(json.dumps(operation_to_dict(operation)))) == operation


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXT, inner, max_size=2),
    max_leaves=4,
)
_PATHS = [
    *[(key,) for key in MODEL],
    *[("features", 0, key) for key in (*DENSE, "table", "dtype", "width", "combiner", "max_length")],
    ("features", 0, "preprocessing"),
    ("features", 0, "preprocessing", 0),
    ("features", 0, "preprocessing", 0, "values"),
    ("features", 0, "default"),
    *[("tables", 0, key) for key in (*TABLE, "dtype", "out_of_range")],
    *[("tasks", 0, key) for key in ("name", "kind", "output")],
]


@given(path=st.sampled_from(_PATHS), value=_JSON)
def test_any_json_value_anywhere_is_a_config_error_or_a_spec(path, value):
    feature = {**ID, "preprocessing": [{"op": "vocabulary", "values": [1, 2]}]}
    document = json.loads(json.dumps({**MODEL, "features": [feature]}))
    target = document
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    try:
        spec = ModelSpec.from_dict(document)
    except ConfigError:
        return
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
