"""The native content check accepts and refuses what `check_contents` does."""

import numpy as np
import pytest

from xlarank.errors import FeatureError
from xlarank.host import Gatherer, native_available
from xlarank.spec import ModelSpec, Ragged, StringColumn, check_contents

pytestmark = pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")

_HASH = ["hash"]
SPEC = ModelSpec.from_dict(
    {
        "name": "m",
        "features": [
            {"name": "age", "kind": "dense", "scope": "context", "width": 2},
            {
                "name": "price",
                "kind": "dense",
                "scope": "candidate",
                "default": 1.0,
                "preprocessing": ["log1p"],
            },
            {
                "name": "views",
                "kind": "dense",
                "scope": "candidate",
                "preprocessing": [{"op": "clip", "low": 0, "high": 9}, "log1p"],
            },
            {"name": "item", "kind": "id", "scope": "candidate", "table": "strict"},
            {"name": "shop", "kind": "id", "scope": "candidate", "table": "lax"},
            {
                "name": "city",
                "kind": "id",
                "scope": "candidate",
                "table": "lax",
                "dtype": "string",
                "preprocessing": _HASH,
            },
            {"name": "tags", "kind": "id_list", "scope": "candidate", "table": "strict", "combiner": "sum"},
            {
                "name": "seen",
                "kind": "sequence",
                "scope": "context",
                "table": "lax",
                "max_length": 2,
                "dtype": "string",
                "preprocessing": _HASH,
            },
            {
                "name": "hour",
                "kind": "id",
                "scope": "candidate",
                "table": "lax",
                "preprocessing": [{"op": "bucketise", "boundaries": [1, 2]}],
            },
        ],
        "tables": [
            {"name": "strict", "dim": 2, "rows": 5},
            {"name": "lax", "dim": 2, "rows": 5, "out_of_range": "clip"},
        ],
        "tasks": [{"name": "like"}],
    }
)
GATHERER = Gatherer(SPEC, {name: np.zeros((5, 2), np.float32) for name in ("strict", "lax")})


def _columns(**changes):
    strings = StringColumn.from_strings
    columns = {
        "age": np.array([[1, 2]], np.float32),
        "price": np.array([[1], [np.nan]], np.float32),
        "views": np.array([[-7], [3]], np.float32),
        "item": np.array([0, 4]),
        "shop": np.array([-9, 2**60]),
        "city": strings(["a", ""]),
        "tags": Ragged(np.array([0, 4, 2]), np.array([0, 3], np.int32)),
        "seen": Ragged(strings(["x", "yy"]), np.array([2], np.int32)),
        "hour": np.array([0, 1], np.float32),
    }
    return [(columns | changes)[feature.name] for feature in SPEC.features]


def _floats(*values):
    return np.array([[value] for value in values], np.float32)


def test_valid_columns_are_accepted_by_the_kernel_alone():
    assert GATHERER._kernel.accepts(_columns())
    GATHERER.check(SPEC, _columns())


@pytest.mark.parametrize(
    "change",
    [
        {"age": np.array([[1, np.nan]], np.float32)},
        {"age": np.array([[np.inf, 1]], np.float32)},
        {"price": _floats(np.inf, np.nan)},
        {"price": _floats(-np.inf, 1)},
        {"price": _floats(-1, 1)},
        {"price": _floats(np.nan, -2)},
        {"views": _floats(np.nan, 1)},
        {"item": np.array([0, 5])},
        {"item": np.array([-1, 0])},
        {"item": np.array([2**63 - 1, -(2**63)])},
        {"city": StringColumn(np.zeros(3, np.uint8), np.array([0, 2, 1]))},
        {"city": StringColumn(np.zeros(3, np.uint8), np.array([0, 4, 3]))},
        {"city": StringColumn(np.zeros(3, np.uint8), np.array([1, 2, 3]))},
        {"tags": Ragged(np.array([0, 5]), np.array([1, 1], np.int32))},
        {"tags": Ragged(np.array([0, 1]), np.array([3, -1], np.int32))},
        {"tags": Ragged(np.array([0, 1]), np.array([1, 2], np.int32))},
        {"tags": Ragged(np.array([0]), np.array([2**31 - 1, 2**31 - 1], np.int32))},
        {"seen": Ragged(StringColumn(np.zeros(1, np.uint8), np.array([0, 2])), np.array([1], np.int32))},
        {"hour": np.array([np.nan, 1], np.float32)},
    ],
)
def test_what_the_definition_refuses_is_refused_with_its_message(change):
    columns = _columns(**change)
    with pytest.raises(FeatureError) as expected:
        check_contents(SPEC, columns)
    with pytest.raises(FeatureError) as refused:
        GATHERER.check(SPEC, columns)
    assert str(refused.value) == str(expected.value)
    assert f"feature {next(iter(change))!r}" in str(refused.value)


def test_columns_that_only_the_definition_can_judge_are_left_to_it():
    narrow = StringColumn(np.frombuffer(b"ab", np.uint8), np.array([0, 1, 2], np.int32))
    columns = _columns(city=narrow)
    assert not GATHERER._kernel.accepts(columns)
    GATHERER.check(SPEC, columns)


def test_unaligned_and_read_only_columns_are_accepted():
    raw = b"x" + np.array([3, 4]).tobytes()
    items = np.frombuffer(raw, np.int64, offset=1)
    assert not items.flags.aligned
    assert GATHERER._kernel.accepts(_columns(item=items))
    assert not GATHERER._kernel.accepts(
        _columns(item=np.frombuffer(b"x" + np.array([3, 5]).tobytes(), np.int64, offset=1))
    )


def test_a_large_request_is_checked_too():
    count = 100_000
    columns = _columns(tags=Ragged(np.full(count, 4), np.array([0, count], np.int32)))
    assert GATHERER._kernel.accepts(columns)
    columns = _columns(tags=Ragged(np.full(count, 5), np.array([0, count], np.int32)))
    assert not GATHERER._kernel.accepts(columns)
