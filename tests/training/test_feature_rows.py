"""Candidate features from Parquet: the types that there are, nulls, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stored

from xlarank.errors import ConfigError
from xlarank.host import FeatureSchema
from xlarank.training.feature_rows import read_feature_rows

ROWS_SPEC = FeatureSchema.of(stored.STORED).rows_spec(stored.SPEC)
ROW = stored.DEFAULT_ROW | {"path": [5]}


def table_of(rows, **columns):
    values = {name: [row[name] for row in rows] for name in stored.DEFAULT_ROW}
    return pa.table({"id": np.arange(10, 10 + len(rows)), **values, **columns})


def read(path, rows_spec=ROWS_SPEC, **options):
    """Ids and rows of all chunks."""
    ids, rows = [], []
    names = [feature.name for feature in rows_spec.features]
    for some, columns in read_feature_rows(path, "id", rows_spec, **options):
        ids += some.tolist()
        rows += stored.rows_of(dict(zip(names, columns, strict=True)))
    return ids, rows


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [stored.random_row(rng) for _ in range(300)]


@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_rows_come_back_chunk_by_chunk(tmp_path, rows, chunk_rows):
    pq.write_table(table_of(rows), tmp_path / "a.parquet", row_group_size=64)
    assert read(tmp_path / "a.parquet", chunk_rows=chunk_rows) == (list(range(10, 310)), rows)


def test_a_folder_is_read_by_name(tmp_path, rows):
    pq.write_table(table_of(rows[:100]), tmp_path / "1.parquet")
    pq.write_table(table_of(rows[100:]), tmp_path / "2.parquet")
    assert read(tmp_path)[1] == rows


def test_other_types_of_the_same_meaning_will_do(tmp_path, rows):
    table = table_of(rows)
    for name, type_ in {
        "id": pa.uint64(),
        "price": pa.float64(),
        "item": pa.uint64(),
        "hour": pa.int16(),
        "brand": pa.dictionary(pa.int32(), pa.string()),
        "topics": pa.large_list(pa.uint64()),
        "tags": pa.list_(pa.large_string()),
        "vector": pa.list_(pa.float64(), 3),
    }.items():
        place = table.schema.names.index(name)
        table = table.set_column(place, name, table.column(name).cast(type_))
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (list(range(10, 310)), rows)


def test_a_null_and_a_missing_column_are_the_default(tmp_path, rows):
    rng = np.random.default_rng(1)
    for row in rows:
        for name in row:
            if rng.random() < 0.3:
                row[name] = None
    table = table_of(rows)
    for name in ("brand", "hour"):
        table = table.drop_columns([name])
    pq.write_table(table, tmp_path / "a.parquet")
    expected = [
        {name: stored.DEFAULT_ROW[name] if value is None else value for name, value in row.items()}
        | {name: stored.DEFAULT_ROW[name] for name in ("brand", "hour")}
        for row in rows
    ]
    _, found = read(tmp_path / "a.parquet")
    for row in found:  # NaN stands for the default of a float until the gather
        for name, none in (("price", [row["price"]]), ("vector", row["vector"])):
            if np.isnan(none).all():
                row[name] = stored.DEFAULT_ROW[name]
    assert found == expected


def test_booleans_are_numbers_for_a_dense_feature(tmp_path):
    values = [True, False, None, True]
    vectors = pa.array([[True, False, True]] * 4)
    pq.write_table(table_of([ROW] * 4, price=pa.array(values), vector=vectors), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")[1]
    np.testing.assert_array_equal([row["price"] for row in found], [1, 0, np.nan, 1])
    assert [row["vector"] for row in found] == [[1, 0, 1]] * 4


def test_a_column_of_nulls_alone_needs_no_type(tmp_path):
    """As pandas and Arrow write one that holds nothing."""
    names = ["price", "vector", "item", "hour", "brand", "topics", "path", "tags"]
    pq.write_table(table_of([ROW] * 3, **{name: pa.nulls(3) for name in names}), tmp_path / "a.parquet")
    for row in read(tmp_path / "a.parquet")[1]:
        for name, value in row.items():
            is_nan = stored.SPEC.feature_by_name[name].dtype == "float32"
            assert np.isnan(value).all() if is_nan else value == stored.DEFAULT_ROW[name], name
    empty = pa.array([[], None, []], pa.list_(pa.null()))
    pq.write_table(table_of([ROW] * 3, topics=empty, tags=empty), tmp_path / "b.parquet")
    found = read(tmp_path / "b.parquet")[1]
    assert [row["topics"] for row in found] == [[], stored.DEFAULT_ROW["topics"], []]
    assert [row["tags"] for row in found] == [[], stored.DEFAULT_ROW["tags"], []]


def without_defaults():
    spec = stored.SPEC.to_dict()
    for feature in spec["features"]:
        feature.pop("default", None)
    return FeatureSchema.of(stored.STORED).rows_spec(stored.SPEC.from_dict(spec))


BAD = [
    (
        {"id": pa.array(["a", "b", "c"])},
        "column 'id': expected ids of an integer type up to int64, got string",
    ),
    ({"id": pa.array([1, None, 3])}, "column 'id', row 1: expected an id, got a null"),
    ({"price": pa.array(["1", "2", "3"])}, "column 'price': expected numbers, got string"),
    ({"item": pa.array([1.0, 2.0, 3.0])}, "column 'item': expected integers up to int64, got double"),
    (
        {"item": pa.array([1, 2, 100])},
        r"row 2: feature 'item': expected ids in \[0, 100\) of table 'items', got 100$",
    ),
    ({"item": pa.array([1, 2, None])}, "column 'item', row 2: got a null, and the feature has no default"),
    (
        {"topics": pa.array([[1, 2], [], [3, 100, 4]])},
        r"row 2: feature 'topics': expected ids in \[0, 100\) of table 'items', got 100$",
    ),
    (
        {"vector": pa.array([[1.0] * 3, [1.0, np.inf, 1.0], [1.0] * 3])},
        "row 1: feature 'vector': .* got inf$",
    ),
    (
        {"id": pa.array([1, 2**63, 3], pa.uint64())},
        f"column 'id', row 1: expected integers up to int64, got {2**63}",
    ),
    (
        {"item": pa.array([1, 2, 2**64 - 1], pa.uint64())},
        f"column 'item', row 2: expected integers up to int64, got {2**64 - 1}",
    ),
    (
        {"topics": pa.array([[1, 2], [], [3, 2**63]], pa.list_(pa.uint64()))},
        f"column 'topics', row 2: expected integers up to int64, got {2**63}",
    ),
    ({"item": pa.array([True, False, True])}, "column 'item': expected integers up to int64, got bool"),
    ({"item": pa.nulls(3)}, "column 'item', row 0: got a null, and the feature has no default"),
    ({"id": pa.nulls(3)}, "column 'id': expected ids of an integer type up to int64, got null"),
    (
        {"topics": pa.array([[], [], [None]], pa.list_(pa.null()))},
        "column 'topics', row 2: expected a list without nulls",
    ),
    ({"brand": pa.array([1, 2, 3])}, "column 'brand': expected strings, got int64"),
    ({"topics": pa.array([1, 2, 3])}, "column 'topics': expected lists of integers up to int64, got int64"),
    ({"topics": pa.array([[1], None, []])}, "column 'topics', row 1: got a null"),
    ({"topics": pa.array([[1], [], [2, None]])}, "column 'topics', row 2: expected a list without nulls"),
    (
        {"vector": pa.array([[1.0] * 3, [1.0] * 2, [1.0] * 3])},
        "column 'vector', row 1: expected 3 numbers, got 2",
    ),
    ({"vector": pa.array([1.0, 2.0, 3.0])}, "column 'vector': expected lists of 3 numbers, got double"),
    (
        {"price": pa.array([1.0, np.nan, 3.0])},
        "row 1: feature 'price': expected finite floats, got nan; it has no default",
    ),
]


@pytest.mark.parametrize(("columns", "message"), BAD)
def test_bad_data_is_refused_with_file_column_and_row(tmp_path, columns, message):
    rows = [ROW] * 3
    pq.write_table(table_of(rows, **columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=rf"a\.parquet: {message}"):
        read(tmp_path / "a.parquet", without_defaults())


def test_a_row_in_a_later_chunk_is_counted_from_the_file_s_first(tmp_path):
    items = [1] * 20
    items[17] = None
    pq.write_table(table_of([ROW] * 20, item=pa.array(items)), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="column 'item', row 17: got a null"):
        read(tmp_path / "a.parquet", without_defaults(), chunk_rows=5)
    for column in (
        {"topics": [[1, 2, 3]] * 17 + [[4, 500]] + [[]] * 2},
        {"price": [1.0] * 17 + [np.inf] * 3},
    ):
        pq.write_table(table_of([ROW] * 20, **column), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=rf"a\.parquet: row 17: feature '{next(iter(column))}'.*got"):
            read(tmp_path / "a.parquet", chunk_rows=12)


def test_missing_files_and_columns_are_named(tmp_path):
    with pytest.raises(ConfigError, match="expected Parquet files"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="can't be read as Parquet"):
        read(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("no Parquet")
    with pytest.raises(ConfigError, match="can't be read as Parquet"):
        read(tmp_path / "bad.parquet")
    pq.write_table(table_of([ROW]).drop_columns(["item"]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="expected a column 'item', as the feature has no default; it has"):
        read(tmp_path / "b.parquet", without_defaults())
    twice = table_of([ROW]).append_column("item", pa.array([1]))
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: expected one column 'item', got 2; it has \['id', "):
        read(tmp_path / "b.parquet")
    pq.write_table(table_of([ROW]).drop_columns(["id"]), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match="expected a column 'id' of ids; it has"):
        read(tmp_path / "c.parquet")
