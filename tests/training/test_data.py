"""`RankingData`: slicing it never changes what a request holds."""

import dataclasses

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.spec import Ragged, StringColumn
from xlarank.spec.config import load_config
from xlarank.training.data import concatenate


def plain(column):
    """A column as Python values."""
    if isinstance(column, Ragged):
        ends = np.cumsum(column.lengths)
        values = (
            column.values.to_bytes() if isinstance(column.values, StringColumn) else column.values.tolist()
        )
        return [values[end - length : end] for end, length in zip(ends, column.lengths, strict=True)]
    return column.to_bytes() if isinstance(column, StringColumn) else column.tolist()


def request_values(data, request):
    values = {name: plain(column) for name, column in data.features_of(request).items()}
    rows = data.rows_of(request)
    return values, {name: label[rows].tolist() for name, label in data.labels.items()}, data.groups[request]


def test_taking_requests_keeps_each_as_it_was(splits):
    chosen = np.array([0, 3, 17, 19])
    taken = splits.test.take(chosen)
    assert taken.num_requests == 4
    for new, old in enumerate(chosen):
        assert request_values(taken, new) == request_values(splits.test, old)


def test_joining_data_keeps_each_request_as_it_was(splits):
    joined = concatenate([splits.validation, splits.test])
    assert joined.num_rows == splits.validation.num_rows + splits.test.num_rows
    for request in range(joined.num_requests):
        part, at = (splits.validation, request) if request < 20 else (splits.test, request - 20)
        assert request_values(joined, request) == request_values(part, at)


def test_a_request_without_candidates_stays_empty(splits):
    data = splits.test
    keep = data.request_of_row != 2
    rows = np.flatnonzero(keep)
    thinned = dataclasses.replace(
        data,
        candidates={name: c[rows] for name, c in data.candidates.items() if isinstance(c, np.ndarray)},
        request_of_row=data.request_of_row[rows],
        labels={name: label[rows] for name, label in data.labels.items()},
        items=None,
    )
    assert [len(thinned.features_of(r)["item"]) for r in (1, 2, 3)] == [4, 0, 4]
    assert [len(thinned.take(np.array([2, 3])).features_of(r)["item"]) for r in (0, 1)] == [0, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"request_of_row": np.array([1, 0])},
            r"request_of_row: expected non-decreasing numbers in \[0, 2\)",
        ),
        ({"request_of_row": np.array([0, 2])}, r"got 0 to 2"),
        ({"labels": {"t": np.array([1.0])}}, "label 't': expected 2 rows, got 1"),
        ({"labels": {"t": np.array([1.0, np.nan])}}, "label 't': expected finite values"),
        ({"contexts": {"c": np.zeros(3)}}, "context 'c': expected 2 rows, one a request, got 3"),
        ({"items": np.zeros(1)}, "column 'items': expected 2 rows, got 1"),
    ],
)
def test_columns_that_disagree_are_refused(changes, message):
    from xlarank.training.data import RankingData

    fields = {
        "contexts": {},
        "candidates": {},
        "request_of_row": np.array([0, 1]),
        "labels": {},
        "groups": np.array([5, 6]),
    }
    with pytest.raises(ConfigError, match=message):
        RankingData(**{**fields, **changes})


def test_a_feature_of_another_type_than_the_data_is_refused(splits, config_file):
    spec = load_config(config_file).spec
    wrong = dataclasses.replace(
        splits.test, contexts={**splits.test.contexts, "user": np.zeros(20, np.float32)}
    )
    with pytest.raises(ConfigError, match="feature 'user': the config says int64, the data has float32"):
        wrong.columns(spec)
    missing = dataclasses.replace(splits.test, contexts={})
    with pytest.raises(ConfigError, match=r"no context feature 'user'; it has \[\]"):
        missing.columns(spec)
    with pytest.raises(ConfigError, match=r"no label 'stars'; it has \['like'\]"):
        dataclasses.replace(splits.test, labels={"like": splits.test.labels["like"]}).labels_of(spec)
