"""RankRequest takes what means the same, brings it to one form, and refuses the rest by name."""

import collections
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.errors import ConfigError, FeatureError
from xlarank.spec import ModelSpec, Ragged, RankRequest, StringColumn

_LOOKUP = {"scope": "candidate", "table": "t"}
SPEC = ModelSpec.from_dict(
    {
        "name": "m",
        "features": [
            {"name": "age", "kind": "dense", "scope": "context"},
            {
                "name": "city",
                "kind": "id",
                "scope": "context",
                "table": "t",
                "dtype": "string",
                "preprocessing": ["hash"],
            },
            {"name": "seen", "kind": "sequence", "scope": "context", "table": "t", "max_length": 2},
            {"name": "item", "kind": "id", **_LOOKUP},
            {"name": "vector", "kind": "dense", "scope": "candidate", "width": 2},
            {"name": "bags", "kind": "id_list", "combiner": "sum", **_LOOKUP},
            {
                "name": "tags",
                "kind": "id_list",
                "combiner": "sum",
                "dtype": "string",
                "preprocessing": ["hash"],
                **_LOOKUP,
            },
            {"name": "price", "kind": "dense", "scope": "candidate", "default": 2.5},
            {"name": "shop", "kind": "id", "default": 3, **_LOOKUP},
            {"name": "liked", "kind": "id_list", "combiner": "sum", "default": [1, 2], **_LOOKUP},
            {
                "name": "words",
                "kind": "id_list",
                "combiner": "sum",
                "dtype": "string",
                "preprocessing": ["hash"],
                "default": ["x", "yz"],
                **_LOOKUP,
            },
            {
                "name": "lang",
                "kind": "id",
                "dtype": "string",
                "preprocessing": ["hash"],
                "default": "é",
                **_LOOKUP,
            },
            {
                "name": "views",
                "kind": "dense",
                "scope": "candidate",
                "default": 0,
                "preprocessing": ["log1p"],
            },
        ],
        "tables": [{"name": "t", "dim": 2, "rows": 10}],
        "tasks": [{"name": "like"}],
    }
)
VALID = {
    "age": 31,
    "city": "Köln",
    "seen": [[1, 2, 3]],
    "item": [4, 5],
    "vector": [[1, 2], [3, 4]],
    "bags": [[], [6, 7]],
    "tags": [["a", "bc"], []],
}


def request(**changes):
    return RankRequest(SPEC, VALID | changes)


def plain(column):
    """Python values of a column."""
    if isinstance(column, Ragged):
        values, ends = plain(column.values), np.cumsum(column.lengths).tolist()
        return [values[end - n : end] for end, n in zip(ends, column.lengths.tolist(), strict=True)]
    return column.to_bytes() if isinstance(column, StringColumn) else column.tolist()


def assert_form(feature, column, num_rows):
    """The dtypes, ranks and strides that the kernel reads by pointer."""
    assert len(column) == num_rows
    values = column
    if feature.is_ragged:
        assert (type(column.lengths), column.lengths.dtype, column.lengths.ndim) == (np.ndarray, np.int32, 1)
        assert column.lengths.flags.c_contiguous
        values = column.values
    if feature.dtype == "string":
        assert (type(values.blob), values.blob.dtype, values.blob.ndim) == (np.ndarray, np.uint8, 1)
        assert (type(values.offsets), values.offsets.dtype, values.offsets.ndim) == (np.ndarray, np.int64, 1)
        assert values.blob.flags.c_contiguous
        assert values.offsets.flags.c_contiguous
        return
    assert type(values) is np.ndarray
    assert values.dtype == np.dtype(feature.dtype.value)
    assert values.dtype.isnative
    assert values.flags.c_contiguous
    assert values.ndim == (1 if feature.is_lookup else 2)


def assert_forms(made):
    for feature, column in zip(made.spec.features, made.columns, strict=True):
        assert_form(feature, column, 1 if feature.scope == "context" else made.num_candidates)


def test_python_values_become_columns_and_defaults_stand_in():
    made = request()
    assert_forms(made)
    assert made.num_candidates == 2
    assert {f.name: plain(made.column(f.name)) for f in SPEC.features} == {
        "age": [[31.0]],
        "city": ["Köln".encode()],
        "seen": [[1, 2, 3]],
        "item": [4, 5],
        "vector": [[1.0, 2.0], [3.0, 4.0]],
        "bags": [[], [6, 7]],
        "tags": [[b"a", b"bc"], []],
        "price": [[2.5], [2.5]],
        "shop": [3, 3],
        "liked": [[1, 2], [1, 2]],
        "words": [[b"x", b"yz"], [b"x", b"yz"]],
        "lang": ["é".encode()] * 2,
        "views": [[0.0], [0.0]],
    }
    assert repr(made) == "RankRequest(model='m', num_candidates=2)"


def test_arrays_of_the_right_form_are_not_copied():
    item, vector, values = np.array([4, 5]), np.ones((2, 2), np.float32), np.array([6, 7])
    bags = Ragged(values, np.array([0, 2], np.int32))
    tags = Ragged(StringColumn.from_strings(["a"]), np.array([1, 0], np.int32))
    made = request(item=item, vector=vector, bags=bags, tags=tags, price=np.ones(2, np.float32))
    assert made.column("item") is item
    assert made.column("vector") is vector
    assert made.column("bags") is bags
    assert made.column("tags").values is tags.values
    assert made.column("price").shape == (2, 1)


def _readonly(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("item", np.array([4, 5], np.int8), [4, 5]),
        ("item", np.array([4, 5], np.uint32), [4, 5]),
        ("item", np.array([4, 5], ">i8"), [4, 5]),
        ("item", np.array([4, 9, 5, 9])[::2], [4, 5]),
        ("item", _readonly(np.array([4, 5])), [4, 5]),
        ("item", (4, 5), [4, 5]),
        ("item", range(4, 6), [4, 5]),
        ("item", [np.int16(4), np.int64(5)], [4, 5]),
        ("vector", np.asfortranarray(np.array([[1, 2], [3, 4]], np.float32)), [[1.0, 2.0], [3.0, 4.0]]),
        ("vector", np.array([[1, 2], [3, 4]], ">f4"), [[1.0, 2.0], [3.0, 4.0]]),
        ("vector", np.array([[1, 2], [3, 4]], np.float16), [[1.0, 2.0], [3.0, 4.0]]),
        ("vector", np.array([[1, 2], [3, 4]], np.float64), [[1.0, 2.0], [3.0, 4.0]]),
        ("vector", [[1, 2.5], (3, 4)], [[1.0, 2.5], [3.0, 4.0]]),
        ("age", np.float32(7), [[7.0]]),
        ("age", np.array(7.0), [[7.0]]),
        ("age", [7], [[7.0]]),
        ("age", [[7]], [[7.0]]),
        ("city", b"\xff", [b"\xff"]),
        ("city", ["x"], [b"x"]),
        ("city", np.array("x"), [b"x"]),
        ("city", np.array(["x"], object), [b"x"]),
        ("tags", [("a", b"\xff"), np.array(["é"])], [[b"a", b"\xff"], ["é".encode()]]),
        ("bags", ((), range(2)), [[], [0, 1]]),
        ("bags", [np.array([6], np.int32), []], [[6], []]),
        ("bags", Ragged([6, 7], [2, 0]), [[6, 7], []]),
        ("bags", Ragged(np.array([6, 7], ">i4"), np.array([2, 0], ">i8")), [[6, 7], []]),
        ("bags", Ragged(np.array([6, 0, 7, 0])[::2], np.array([2, 9, 0, 9], np.int32)[::2]), [[6, 7], []]),
        ("price", [np.nan, 1], [[np.nan], [1.0]]),
        ("price", None, [[2.5], [2.5]]),
    ],
)
def test_other_forms_of_the_same_values_are_converted(name, value, expected):
    made = request(**{name: value})
    assert_forms(made)
    np.testing.assert_equal(plain(made.column(name)), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i4", "int64", "uint64"])
def test_string_columns_are_brought_to_the_stated_dtypes(dtype):
    blob, offsets = np.frombuffer(b"a-b-c-", np.uint8)[::2], np.array([0, 1, 3]).astype(dtype)
    made = request(tags=Ragged(StringColumn(blob, offsets), np.array([2, 0], np.int32)))
    assert_forms(made)
    assert plain(made.column("tags")) == [[b"a", b"bc"], []]


def test_no_candidates_are_a_request_in_every_form():
    empty = {"item": [], "vector": [], "bags": [], "tags": []}
    arrays = {
        "item": np.zeros(0, np.int64),
        "vector": np.zeros((0, 2), np.float32),
        "bags": Ragged([], []),
        "tags": Ragged(StringColumn.from_strings([]), np.zeros(0, np.int32)),
    }
    for features in (empty, arrays):
        made = request(**features)
        assert made.num_candidates == 0
        assert_forms(made)


def test_features_may_be_any_mapping_and_its_missing_hook_is_not_called():
    made = RankRequest(SPEC, collections.defaultdict(lambda: pytest.fail("asked for more"), VALID))
    assert made.num_candidates == 2


def _strings(blob, offsets):
    return StringColumn(blob, offsets)


_BYTES = np.frombuffer(b"abc", np.uint8)
_ENDLESS = [1]
_ENDLESS.append(_ENDLESS)

REFUSED = [
    # Missing, unknown, and rows that don't agree.
    ({"colour": 1}, "model 'm' has no feature 'colour'; it has ['age', 'city'"),
    ({7: 1, "colour": 1}, "model 'm' has no feature 7"),
    ({"age": None}, "feature 'age' is missing: expected float32 of shape [1]; it has no default"),
    ({"bags": None}, "feature 'bags' is missing: expected int64 of shape [V] with lengths [N]; it has no"),
    ({"age": [1, 2]}, "feature 'age': expected 1 row, got 2; its scope is context, so it is sent once"),
    ({"city": ["a", "b"]}, "feature 'city': expected 1 row, got 2"),
    ({"seen": [[1], [2]]}, "feature 'seen': expected 1 row, got 2"),
    ({"vector": [[1, 2]]}, "feature 'vector': expected 2 rows, as feature 'item' has, got 1"),
    ({"bags": Ragged(np.array([1]), np.array([1, 0, 0], np.int32))}, "feature 'bags': expected 2 rows"),
    # Ids.
    ({"item": [1.0, 2.0]}, "feature 'item': expected int64 of shape [N], got list [1.0, 2.0]"),
    ({"item": np.array([1.0, 2.0])}, "feature 'item': expected int64 of shape [N], got float64 of shape [2]"),
    ({"item": np.array([True, False])}, "feature 'item': expected int64 of shape [N], got bool of shape [2]"),
    ({"item": [True, False]}, "got list [True, False]"),
    ({"item": np.array([1, 2], np.uint64)}, "got uint64 of shape [2]"),
    ({"item": [1, 2**63]}, "got list [1, 9223372036854775808]"),
    ({"item": [-1, 2**63]}, "got list [-1, 9223372036854775808]"),
    ({"item": [1, 2**200]}, "feature 'item': expected int64 of shape [N], got list [1, 160"),
    ({"item": np.array([1, 2], object)}, "got object of shape [2]"),
    ({"item": [1, None]}, "got list [1, None]"),
    ({"item": ["1", "2"]}, "got list ['1', '2']"),
    ({"item": np.array(["1", "2"])}, "got <U1 of shape [2]"),
    ({"item": np.array([1, 2], "m8[s]")}, "got timedelta64[s] of shape [2]"),
    ({"item": np.array([1, 2], "M8[s]")}, "got datetime64[s] of shape [2]"),
    ({"item": np.array([1j, 2])}, "got complex128 of shape [2]"),
    ({"item": np.array([(1, 2)], [("a", int), ("b", int)])}, "feature 'item': expected int64"),
    ({"item": np.array(1)}, "feature 'item': expected int64 of shape [N], got int64 of shape []"),
    ({"item": 1}, "feature 'item': expected int64 of shape [N], got int 1"),
    ({"item": [[1], [2]]}, "feature 'item': expected int64 of shape [N], got list [[1], [2]]"),
    ({"item": [[1], [2, 3]]}, "feature 'item': expected int64 of shape [N], got list [[1], [2, 3]]"),
    ({"item": [[]]}, "feature 'item': expected int64 of shape [N], got list [[]]"),
    ({"item": {1, 2}}, "feature 'item': expected int64 of shape [N], got set {1, 2}"),
    ({"item": "12"}, "feature 'item': expected int64 of shape [N], got str '12'"),
    ({"item": _ENDLESS}, "feature 'item': expected int64 of shape [N], got list [1, ["),
    ({"item": np.ma.array([1, 2], mask=[0, 1])}, "got a masked array of int64 of shape [2]; fill it first"),
    ({"item": Ragged([1, 2], [1, 1])}, "feature 'item': expected int64 of shape [N], got a Ragged"),
    ({"item": StringColumn.from_strings(["1", "2"])}, "expected int64 of shape [N], got a StringColumn"),
    ({"item": [0, 10]}, "feature 'item': expected ids in [0, 10) of table 't', got 10 at position 1"),
    ({"item": [-1, 10]}, "feature 'item': expected ids in [0, 10) of table 't', got -1 at position 0"),
    # Floats.
    (
        {"vector": np.ones((2, 3), np.float32)},
        "expected float32 of shape [N, 2], got float32 of shape [2, 3]",
    ),
    ({"vector": np.ones(2, np.float32)}, "expected float32 of shape [N, 2], got float32 of shape [2]"),
    ({"vector": np.ones((2, 2, 1), np.float32)}, "got float32 of shape [2, 2, 1]"),
    ({"vector": np.zeros(0, np.float32)}, "expected float32 of shape [N, 2], got float32 of shape [0]"),
    ({"vector": np.ones((2, 2), np.int64)}, "expected float32 of shape [N, 2], got int64 of shape [2, 2]"),
    ({"vector": np.ones((2, 2), bool)}, "got bool of shape [2, 2]"),
    ({"vector": [["a", "b"], ["c", "d"]]}, "got list [['a', 'b'], ['c', 'd']]"),
    ({"vector": np.ma.ones((2, 2))}, "got a masked array of float64 of shape [2, 2]; fill it first"),
    (
        {"vector": [[1, 2], [3, np.nan]]},
        "feature 'vector': expected finite floats, got nan in row 1; it has ",
    ),
    ({"vector": [[1, 2], [-np.inf, 1]]}, "feature 'vector': expected finite floats, got -inf in row 1"),
    ({"vector": [[1e39, 2], [3, 4]]}, "feature 'vector': expected finite floats, got inf in row 0"),
    ({"vector": [[10**400, 2], [3, 4]]}, "feature 'vector': expected float32 of shape [N, 2], got list"),
    ({"price": [np.inf, np.nan]}, "feature 'price': expected finite floats, got inf in row 0"),
    ({"views": [0, -1]}, "feature 'views': expected values > -1, which log1p needs, got -1.0 in row 1"),
    ({"age": True}, "feature 'age': expected float32 of shape [1], got bool True"),
    ({"age": [[1, 2]]}, "feature 'age': expected float32 of shape [1], got list [[1, 2]]"),
    # Bags.
    ({"bags": [1, 2]}, "feature 'bags': expected a Ragged or a list of lists, one list a row, got list [1"),
    ({"bags": np.ones((2, 2), np.int64)}, "expected a Ragged or a list of lists, one list a row, got int64"),
    ({"bags": ["ab", "c"]}, "expected a Ragged or a list of lists, one list a row, got list ['ab', 'c']"),
    ({"bags": "ab"}, "expected a Ragged or a list of lists, one list a row, got str 'ab'"),
    ({"bags": [[1], None]}, "expected a Ragged or a list of lists, one list a row, got list [[1], None]"),
    ({"bags": [[1], np.array(2)]}, "expected a Ragged or a list of lists, one list a row, got list [[1], "),
    ({"bags": [[1], np.ma.array([2])]}, "expected a Ragged or a list of lists, one list a row"),
    ({"bags": [[1.5], [2]]}, "feature 'bags': expected int64 of shape [V], got list [1.5, 2]"),
    ({"bags": [["a"], [2]]}, "feature 'bags': expected int64 of shape [V], got list ['a', 2]"),
    ({"bags": [[[1]], [[2]]]}, "feature 'bags': expected int64 values of shape [V], got list [[1], [2]]"),
    ({"bags": Ragged(np.ones((1, 1), np.int64), [1, 0])}, "expected int64 values of shape [V], got int64 of"),
    ({"bags": Ragged(np.ones(2), [1, 1])}, "expected int64 of shape [V], got float64 of shape [2]"),
    ({"bags": Ragged(None, [1, 1])}, "expected int64 of shape [V], got NoneType None"),
    ({"bags": Ragged([1, 2], [1.0, 1.0])}, "expected int32 lengths of shape [n], got list [1.0, 1.0]"),
    ({"bags": Ragged([1, 2], np.ones((2, 1), int))}, "expected int32 lengths of shape [n], got int64 of sh"),
    ({"bags": Ragged([1, 2], [True, True])}, "expected int32 lengths of shape [n], got list [True, True]"),
    ({"bags": Ragged([1, 2], [[1], [1, 2]])}, "expected int32 lengths of shape [n], got list [[1], [1, 2]]"),
    ({"bags": Ragged([1, 2], None)}, "expected int32 lengths of shape [n], got NoneType None"),
    ({"bags": Ragged([1, 2], np.ma.array([1, 1]))}, "expected int32 lengths of shape [n], got a masked"),
    (
        {"bags": Ragged([1], [2**31, 1 - 2**31])},
        "expected lengths in [0, 2**31), got -2147483647 to 2147483648",
    ),
    (
        {"bags": Ragged([1], np.array([2**64 - 1, 2], np.uint64))},
        "expected lengths in [0, 2**31), got 2 to 18",
    ),
    ({"bags": Ragged([1, 2], np.array([3, -1], np.int32))}, "expected lengths >= 0, got -1 in row 1"),
    ({"bags": Ragged([1, 2], [1, 2])}, "expected lengths that add up to its 2 values, got a sum of 3"),
    ({"bags": Ragged([], np.full(2, 2**31 - 1, np.int32))}, "up to its 0 values, got a sum of 4294967294"),
    ({"bags": [[1], [99]]}, "feature 'bags': expected ids in [0, 10) of table 't', got 99 at position 1"),
    # Strings.
    ({"city": 7}, "feature 'city': expected strings of shape [1], got int 7"),
    ({"city": "\ud800"}, "feature 'city': expected strings of shape [1], got '\\ud800', which has no UTF-8"),
    ({"city": np.array([["a"]])}, "feature 'city': expected strings of shape [1], got <U1 of shape [1, 1]"),
    ({"city": [["a"]]}, "feature 'city': expected strings of shape [1], got list [['a']]"),
    ({"city": np.ma.array(["a"])}, "expected strings of shape [1], got a masked array of <U1"),
    ({"tags": [["a"], ["b", 7]]}, "expected strings of shape [V] with lengths [N], got list ['a', 'b', 7]"),
    ({"tags": [["a"], [None]]}, "expected strings of shape [V] with lengths [N], got list ['a', None]"),
    (
        {"tags": [["a"], ["\udfff"]]},
        "feature 'tags': expected strings of shape [V] with lengths [N], got '\\ud",
    ),
    (
        {"tags": StringColumn.from_strings(["a"])},
        "expected a Ragged or a list of lists, one list a row, got a S",
    ),
    ({"lang": "a"}, "feature 'lang': expected strings of shape [N], got str 'a'"),
    ({"lang": _strings(_BYTES.astype(np.int8), [0, 1, 3])}, "a blob of uint8 of shape [bytes], got int8 of"),
    (
        {"lang": _strings(_BYTES[None], [0, 1, 3])},
        "a blob of uint8 of shape [bytes], got uint8 of shape [1, 3]",
    ),
    ({"lang": _strings(b"abc", [0, 1, 3])}, "a blob of uint8 of shape [bytes], got bytes b'abc'"),
    ({"lang": _strings(_BYTES, np.array([0.0, 1, 3]))}, "int64 offsets of shape [n + 1], got float64 of"),
    (
        {"lang": _strings(_BYTES, np.array([[0, 1, 3]]))},
        "int64 offsets of shape [n + 1], got int64 of shape [1",
    ),
    (
        {"lang": _strings(_BYTES, np.zeros(0, np.int64))},
        "int64 offsets of shape [n + 1], got int64 of shape [0]",
    ),
    ({"lang": _strings(_BYTES, None)}, "int64 offsets of shape [n + 1], got NoneType None"),
    (
        {"lang": _strings(_BYTES, np.array([0, 2**63, 3], np.uint64))},
        "int64 offsets of shape [n + 1], got uint6",
    ),
    (
        {"lang": _strings(_BYTES, np.array([0, 2, 4]))},
        "string offsets that rise from 0 to its 3 bytes, got 3",
    ),
    (
        {"lang": _strings(_BYTES, np.array([1, 2, 3]))},
        "string offsets that rise from 0 to its 3 bytes, got 3",
    ),
    (
        {"lang": _strings(_BYTES, np.array([0, 4, 3]))},
        "string offsets that rise from 0 to its 3 bytes, got 3",
    ),
    ({"lang": _strings(_BYTES, np.array([0, -1, 3]))}, "string offsets that rise from 0 to its 3 bytes"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_a_feature_does_not_take_is_refused(changes, message):
    with pytest.raises(FeatureError, match=re.escape(message)):
        RankRequest(SPEC, VALID | changes)


@pytest.mark.parametrize("features", [None, [("age", 1)], "age", 7])
def test_features_that_are_no_mapping_are_refused(features):
    with pytest.raises(FeatureError, match="model 'm': expected values by feature name, got "):
        RankRequest(SPEC, features)


def test_an_error_is_short_however_large_the_value():
    with pytest.raises(FeatureError) as info:
        request(item=["x" * 10_000] * 10_000)
    assert len(str(info.value)) < 400


def test_a_request_without_any_candidate_feature_has_no_number_of_candidates():
    spec = ModelSpec.from_dict(
        {
            "name": "m",
            "features": [{"name": "price", "kind": "dense", "scope": "candidate", "default": 1}],
            "tasks": [{"name": "like"}],
        }
    )
    with pytest.raises(FeatureError, match=r"at least one of the candidate features \['price'\], got none"):
        RankRequest(spec, {})


def test_an_unknown_column_is_refused_by_name():
    with pytest.raises(FeatureError, match="model 'm' has no feature 'colour'"):
        request().column("colour")


def test_the_check_given_sees_every_column_and_has_the_word():
    seen = []
    made = RankRequest(SPEC, VALID | {"item": [99, -1]}, check=lambda spec, columns: seen.append(columns))
    assert seen == [made.columns]
    with pytest.raises(ConfigError, match="from the check"):
        RankRequest(
            SPEC, VALID, check=lambda spec, columns: (_ for _ in ()).throw(ConfigError("from the check"))
        )


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.binary(max_size=4)
    | st.sampled_from([np.float16(1), np.uint64(2**64 - 1), np.zeros((0, 3)), np.array(None), np.ma.masked]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.builds(Ragged, inner, inner)
        | st.builds(StringColumn, inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore:Warning. converting a masked element to nan")
@given(name=st.sampled_from([feature.name for feature in SPEC.features]), value=_ANYTHING)
def test_any_value_is_refused_or_becomes_a_column_of_the_stated_form(name, value):
    try:
        made, refusal = request(**{name: value}), ""
    except FeatureError as error:
        made, refusal = None, str(error)
    if made is None:
        assert repr(name) in refusal
    else:
        assert_forms(made)
