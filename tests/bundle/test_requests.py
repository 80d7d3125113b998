"""`xlarank.bundle.requests`: write → read identity, and refusals that name file and feature."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xlarank.bundle import read_requests, write_requests
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import ModelSpec, Ragged, RankRequest, StringColumn


@pytest.fixture
def spec():
    hashed = {"dtype": "string", "preprocessing": ["hash"], "table": "words"}
    return ModelSpec.from_dict(
        {
            "name": "tiny",
            "features": [
                {"name": "age", "kind": "dense", "scope": "context", "default": 3.0},
                {"name": "country", "kind": "id", "scope": "context", **hashed},
                {
                    "name": "history",
                    "kind": "sequence",
                    "scope": "context",
                    "table": "ids",
                    "max_length": 4,
                },
                {"name": "tags", "kind": "id_list", "scope": "candidate", "combiner": "mean", **hashed},
                {"name": "item", "kind": "id", "scope": "candidate", "table": "ids"},
                {"name": "counts", "kind": "dense", "scope": "candidate", "width": 2},
            ],
            "tables": [
                {"name": "ids", "dim": 2, "rows": 10},
                {"name": "words", "dim": 3, "rows": 100, "out_of_range": "hash"},
            ],
            "tasks": [{"name": "like"}, {"name": "stay", "kind": "regression"}],
        }
    )


def requests_of(spec):
    counts = [3, 0, 1]
    country = ["nö", "", "de"]
    history = [[[1, 2, 9]], [[]], [[0]]]
    tags = [[["a", "bb"], [], ["c"]], [], [["", "x\0y"]]]
    return [
        RankRequest(
            spec,
            {
                "age": np.nan if i == 1 else 20.0 + i,
                "country": country[i],
                "history": Ragged.from_bags(history[i]),
                "tags": Ragged(
                    StringColumn.from_strings([tag for bag in tags[i] for tag in bag]),
                    np.array([len(bag) for bag in tags[i]], np.int32),
                ),
                "item": np.arange(counts[i]),
                "counts": np.arange(2 * counts[i], dtype=np.float32).reshape(-1, 2),
            },
        )
        for i in range(3)
    ]


def values_of(num_rows=4):
    rows = np.arange(num_rows, dtype=np.float32)
    return {"scores": {"like": rows / 7, "stay": -rows}, "labels": {"like": rows % 2}}


def plain(column):
    """A column as nested Python values."""
    if isinstance(column, Ragged):
        values = iter(plain(column.values))
        return [[next(values) for _ in range(length)] for length in column.lengths]
    return column.to_bytes() if isinstance(column, StringColumn) else column.tolist()


def test_requests_and_values_read_back_as_they_were_written(spec, tmp_path):
    requests, values = requests_of(spec), values_of()
    write_requests(tmp_path / "golden.safetensors", requests, values)
    read, read_values = read_requests(tmp_path / "golden.safetensors", spec)
    assert [request.num_candidates for request in read] == [3, 0, 1]
    for before, after in zip(requests, read, strict=True):
        for one, other in zip(before.columns, after.columns, strict=True):
            np.testing.assert_equal(plain(other), plain(one))
    assert plain(read[2].column("tags")) == [[b"", b"x\0y"]]
    assert plain(read[0].column("country")) == ["nö".encode()]
    assert {group: list(tasks) for group, tasks in read_values.items()} == {
        "labels": ["like"],
        "scores": ["like", "stay"],
    }
    for group, tasks in values.items():
        for task, array in tasks.items():
            np.testing.assert_array_equal(read_values[group][task], array)
    assert [path.name for path in tmp_path.iterdir()] == ["golden.safetensors"]


def test_arrays_that_are_not_contiguous_read_back_right(spec, tmp_path):
    strided = np.arange(16, dtype=np.float32)[::4]
    columns = np.asfortranarray(np.arange(8, dtype=np.float32).reshape(4, 2))
    request = requests_of(spec)[0]
    features = dict(zip(spec.feature_by_name, request.columns, strict=True))
    features |= {"item": np.arange(8)[::2], "counts": columns, "tags": Ragged.from_bags([["t"]] * 4)}
    write_requests(tmp_path / "r", [RankRequest(spec, features)], {"scores": {"like": strided}})
    (read,), values = read_requests(tmp_path / "r", spec)
    np.testing.assert_array_equal(values["scores"]["like"], [0, 4, 8, 12])
    np.testing.assert_array_equal(read.column("item"), [0, 2, 4, 6])
    np.testing.assert_array_equal(read.column("counts"), [[0, 1], [2, 3], [4, 5], [6, 7]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scores": {"like": np.zeros(3, np.float32)}}, r"scores of task 'like': expected float32 of "
         r"shape \[4\], got float32 of shape \[3\]"),
        ({"scores": {"like": np.zeros(4)}}, r"got float64"),
        ({"scores": {"like": np.zeros(4, ">f4")}}, r"got >f4"),
        ({"scores": {"buy": np.zeros(4, np.float32)}}, r"no such task; it has \['like', 'stay'\]"),
        ({"a.b": {"like": np.zeros(4, np.float32)}}, r"group name .* got 'a.b'"),
    ],
)  # fmt: skip
def test_values_that_fit_no_row_or_task_are_refused(spec, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        write_requests(tmp_path / "r", requests_of(spec), values)
    assert not list(tmp_path.iterdir())


def test_no_requests_or_requests_of_two_models_are_refused(spec, tmp_path):
    with pytest.raises(ConfigError, match="at least one request"):
        write_requests(tmp_path / "r", [], {})
    with pytest.raises(BundleError, match=r"folder/r: can't be written: .*No such file"):
        write_requests(tmp_path / "folder" / "r", requests_of(spec), {})
    other = ModelSpec.from_dict(
        {
            "name": "other",
            "features": [{"name": "x", "kind": "dense", "scope": "candidate"}],
            "tasks": [{"name": "like"}],
        }
    )
    mixed = [*requests_of(spec), RankRequest(other, {"x": [1.0]})]
    with pytest.raises(ConfigError, match=r"request 3 was checked against another spec \(model 'other'\)"):
        write_requests(tmp_path / "r", mixed, {})


def edited(path, **changes):
    """Rewrites single arrays of a file; None drops one."""
    arrays = {**load_file(path), **changes}
    save_file(
        {name: array for name, array in arrays.items() if array is not None},
        path,
        metadata={"format": "xlarank.requests", "format_version": "1"},
    )


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("feature.item", None, r"'feature.item' is missing: expected int64 of shape \[4\]"),
        ("feature.item", np.zeros(3, np.int64), r"'feature.item': expected int64 of shape \[4\], got"),
        ("feature.item", np.zeros((), np.int64), r"got int64 of shape \[\]"),
        ("feature.item", np.full(4, 10), r"request 0: feature 'item': expected ids in \[0, 10\)"),
        ("feature.counts", np.zeros((4, 2), np.int32), r"'feature.counts': expected float32 .* got int32"),
        ("feature.age", np.full((3, 1), np.inf, np.float32), r"request 0: feature 'age': expected finite"),
        ("feature.history.lengths", np.array([5, -1, 0], np.int32), r"history.lengths': expected lengths >="),
        ("feature.history.lengths", np.array([3, 0, 0], np.int32), r"'feature.history.values': expected int64"
         r" of shape \[3\], got int64 of shape \[4\]"),
        ("feature.country.offsets", np.array([0, 9, 3, 5]), r"country.offsets': expected offsets that rise"),
        ("feature.country.offsets", np.array([0, 3, 3, 4]), r"rise from 0 to 5 bytes"),
        ("num_candidates", np.array([2**63 - 1, 2**63 - 1, 6]), r"of shape \[18446744073709551620\]"),
        ("num_candidates", np.array([5, -1, 0]), r"num_candidates: .* each >= 0"),
        ("num_candidates", np.zeros(0, np.int64), r"num_candidates: expected at least one"),
        ("values.scores.like", np.zeros(5, np.float32), r"'values.scores.like': expected float32 of shape"),
        ("values.scores.buy", np.zeros(4, np.float32), r"no place for \['values.scores.buy'\]"),
        ("stranger", np.zeros(4, np.float32), r"no place for \['stranger'\]"),
        ("feature.item", np.zeros(4, np.float16), r"'feature.item': expected int64 .*, got float16"),
    ],
)  # fmt: skip
def test_a_malformed_column_is_refused_by_file_and_name(spec, tmp_path, name, array, message):
    path = tmp_path / "golden.safetensors"
    write_requests(path, requests_of(spec), values_of())
    edited(path, **{name: array})
    with pytest.raises(BundleError, match=r"golden\.safetensors: .*" + message):
        read_requests(path, spec)


def test_a_file_that_is_not_of_requests_is_refused(spec, tmp_path):
    path = tmp_path / "golden.safetensors"
    with pytest.raises(BundleError, match=r"golden\.safetensors: can't be read: No such file"):
        read_requests(path, spec)
    save_file({"w": np.zeros(1, np.float32)}, path)
    with pytest.raises(BundleError, match="expected a file of requests"):
        read_requests(path, spec)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        read_requests(path, spec)


def test_any_flipped_byte_is_read_or_refused_but_never_crashes(spec, tmp_path):
    path = tmp_path / "golden.safetensors"
    write_requests(path, requests_of(spec), values_of())
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = unnamed = 0
    for position in rng.integers(0, len(whole), 400):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read_requests(path, spec)
        except BundleError as error:
            refused += "golden.safetensors" in str(error)
            unnamed += "golden.safetensors" not in str(error)
    assert refused > 100
    assert unnamed == 0
