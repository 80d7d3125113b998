"""What training fits before it learns."""

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.spec import ModelSpec, Ragged, StringColumn
from xlarank.training.data import RankingData
from xlarank.training.fit import fit_spec


def fit(features, columns, tables=()):
    """Fits candidate features to columns; returns (features by name, tables by name)."""
    rows = len(next(iter(columns.values())))
    spec = ModelSpec.from_dict(
        {
            "name": "m",
            "features": [{"scope": "candidate", **feature} for feature in features],
            "tables": list(tables),
            "tasks": [{"name": "t"}],
        }
    )
    data = RankingData(
        contexts={},
        candidates=columns,
        request_of_row=np.zeros(rows, np.int64),
        labels={},
        groups=np.zeros(1),
    )
    fitted = fit_spec(spec, data)
    return fitted.feature_by_name, fitted.table_by_name


ID = {"name": "item", "kind": "id", "table": "items", "preprocessing": ["vocabulary"]}


def test_a_vocabulary_lists_values_most_frequent_first_and_sizes_its_table():
    features, tables = fit([ID], {"item": np.array([9, 7, 7, 8, 8, 7])}, [{"name": "items", "dim": 2}])
    assert features["item"].vocabulary.values == (7, 8, 9)
    assert tables["items"].rows == 4  # row 0 is for everything else


def test_features_of_one_table_share_a_vocabulary():
    bag = {
        "name": "bag",
        "kind": "id_list",
        "combiner": "sum",
        "table": "items",
        "preprocessing": ["vocabulary"],
    }
    columns = {"item": np.array([1, 2]), "bag": Ragged.from_bags([[3, 3, 3], [2]])}
    features, tables = fit([ID, bag], columns, [{"name": "items", "dim": 2}])
    assert features["item"].vocabulary.values == features["bag"].vocabulary.values == (3, 2, 1)
    assert tables["items"].rows == 4


def test_a_stated_vocabulary_is_kept_and_passed_on():
    stated = {**ID, "name": "other", "preprocessing": [{"op": "vocabulary", "values": [5, 6]}]}
    columns = {"item": np.array([1, 2]), "other": np.array([5, 6])}
    features, _ = fit([ID, stated], columns, [{"name": "items", "dim": 2}])
    assert features["item"].vocabulary.values == (5, 6)


def test_rare_strings_are_left_out():
    feature = {**ID, "dtype": "string", "preprocessing": [{"op": "vocabulary", "min_count": 2}]}
    column = StringColumn.from_strings(["é", "b", "é", "c", "b", "é"])
    features, _ = fit([feature], {"item": column}, [{"name": "items", "dim": 2}])
    assert features["item"].vocabulary.values == ("é", "b")


def test_statistics_are_taken_after_the_operations_before_them():
    feature = {"name": "x", "kind": "dense", "default": 3.0, "preprocessing": ["log1p", "standardise"]}
    values = np.array([0, 1, np.nan, 7], np.float32)  # NaN reads as the default
    features, _ = fit([feature], {"x": values})
    logs = np.log1p([0, 1, 3, 7])
    fitted = features["x"].dense_operations[1]
    assert fitted.mean == pytest.approx([logs.mean()], rel=1e-6)
    assert fitted.std == pytest.approx([logs.std()], rel=1e-6)


def test_statistics_are_per_column_and_a_constant_column_is_only_centred():
    feature = {"name": "x", "kind": "dense", "width": 2, "preprocessing": ["standardise"]}
    values = np.array([[1, 1e6 + 0.1], [3, 1e6 + 0.1]], np.float32)
    fitted = fit([feature], {"x": values})[0]["x"].dense_operations[0]
    assert fitted.mean == (2.0, float(values[0, 1]))
    assert fitted.std == (1.0, 1.0)


def test_boundaries_are_quantiles_without_repeats():
    feature = {
        "name": "x",
        "kind": "id",
        "table": "bins",
        "preprocessing": ["standardise", {"op": "bucketise", "num_buckets": 4}],
    }
    values = np.array([0, 0, 0, 0, 0, 0, 8, 16], np.float32)
    features, tables = fit([feature], {"x": values}, [{"name": "bins", "dim": 1}])
    standard = (values - values.mean()) / values.std()
    expected = np.unique(np.quantile(standard, [0.25, 0.5, 0.75]).astype(np.float32))
    np.testing.assert_allclose(features["x"].bucketise.boundaries, expected, rtol=1e-6)
    assert len(expected) == 2  # two of the three quantiles are equal
    assert tables["bins"].rows == 3


def test_plain_row_numbers_size_their_table_unless_it_is_stated():
    plain = {"name": "item", "kind": "id", "table": "items"}
    _, tables = fit([plain], {"item": np.array([4, 2])}, [{"name": "items", "dim": 1}])
    assert tables["items"].rows == 5
    _, tables = fit([plain], {"item": np.array([4, 2])}, [{"name": "items", "dim": 1, "rows": 50}])
    assert tables["items"].rows == 50


@pytest.mark.parametrize(
    ("feature", "column", "message"),
    [
        (
            {"kind": "id", "table": "t", "preprocessing": ["hash"]},
            np.array([1]),
            "'f' is hashed into it; state its rows",
        ),
        (
            {"kind": "id", "table": "t", "preprocessing": [{"op": "vocabulary", "min_count": 2}]},
            np.array([1]),
            "no value of features .* is frequent enough",
        ),
        (
            {"kind": "dense", "preprocessing": ["standardise"]},
            np.array([np.nan], np.float32),
            "'f': can't fit it",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(feature, column, message):
    tables = [{"name": "t", "dim": 1}] if "table" in feature else []
    with pytest.raises(ConfigError, match=message):
        fit([{"name": "f", **feature}], {"f": column}, tables)


def test_features_of_one_table_must_agree():
    other = {**ID, "name": "other", "preprocessing": [{"op": "vocabulary", "min_count": 3}]}
    columns = {"item": np.array([1, 2]), "other": np.array([5, 6])}
    with pytest.raises(ConfigError, match=r"table 'items': .* agree in dtype and min_count, .* \[1, 3\]"):
        fit([ID, other], columns, [{"name": "items", "dim": 2}])
