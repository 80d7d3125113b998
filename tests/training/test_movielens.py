"""The reader of GroupLens' files, on made-up lines and, where MOVIELENS_DIR names them, on the real ones."""

import os
from pathlib import Path

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.spec.metrics import auc
from xlarank.training.baseline import additive_scores
from xlarank.training.movielens import read


def item_line(number, date, *genres):
    flags = ["1" if genre in genres else "0" for genre in range(19)]
    return "|".join([str(number), f"Film é {number}", date, "", "url", *flags])


@pytest.fixture
def folder(tmp_path):
    """User 2 rates films 1..10 at times 10, 20, ..., with a pair at one second; user 1 rates one film."""
    stars = [5, 4, 1, 5, 4, 3, 5, 2, 5, 4]
    ratings = [(2, film, rating, 10 * film) for film, rating in enumerate(stars, start=1)]
    ratings[3] = (2, 4, 5, 50)  # the same second as film 5
    ratings += [(1, 3, 4, 7), (1, 2, 5, 6), (1, 1, 1, 5)]
    lines = ["\t".join(map(str, rating)) for rating in reversed(ratings)]
    (tmp_path / "u.data").write_text("\n".join(lines) + "\n")
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n")
    films = [item_line(n, "" if n == 10 else f"01-Jan-19{80 + n}", n % 19, 3) for n in range(1, 11)]
    (tmp_path / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
    return tmp_path


def requests_of(data):
    """(user, history, films) of every request."""
    return [
        (
            int(data.groups[request]),
            data.features_of(request)["history"].values.tolist(),
            data.features_of(request)["item_id"].tolist(),
        )
        for request in range(data.num_requests)
    ]


def test_each_users_last_ratings_are_held_back_and_history_is_what_came_before(folder):
    splits = read(folder, test_share=0.2, validation_share=0.1)
    # Liked before film 9 was rated: 1, 2, 4, 5, 7. No rating of the test split is in its history.
    assert requests_of(splits.test) == [(1, [2], [3]), (2, [1, 2, 5, 4, 7], [9, 10])]
    assert requests_of(splits.validation) == [(1, [], [2]), (2, [1, 2, 5, 4, 7], [8])]


def test_a_training_request_is_one_second_of_a_user(folder):
    splits = read(folder, test_share=0.2, validation_share=0.1)
    assert requests_of(splits.train) == [
        (1, [], [1]),
        (2, [], [1]),
        (2, [1], [2]),
        (2, [1, 2], [3]),
        (2, [1, 2], [5, 4]),  # neither of one second is in the other's history
        (2, [1, 2, 5, 4], [6]),
        (2, [1, 2, 5, 4], [7]),
    ]


def test_a_long_history_keeps_its_latest_films(folder):
    splits = read(folder, test_share=0.2, max_history=2)
    assert requests_of(splits.test)[1][1] == [4, 7]


def test_labels_are_ratings_of_four_and_five(folder):
    test = read(folder, test_share=0.2).test
    assert test.labels["like"].tolist() == [1, 1, 1]
    assert test.labels["love"].tolist() == [0, 1, 0]


def test_features_are_those_of_the_files(folder):
    test = read(folder, test_share=0.2).test
    features = test.features_of(1)
    assert features["age"].tolist() == [53]
    assert features["gender"].to_bytes() == [b"F"]
    assert features["occupation"].to_bytes() == [b"other"]
    np.testing.assert_array_equal(features["year"], np.array([1989, np.nan], np.float32))
    assert features["genres"].values.tolist() == [3, 9, 3, 10]
    assert features["genres"].lengths.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("u.data", "1\t2\t3\n", r"u.data, line 1: expected 4 fields, got 3"),
        ("u.data", "1\t2\tx\t4\n", r"u.data, line 1: expected an integer, got 'x'"),
        ("u.data", "1\t2\t6\t4\n", r"u.data, line 1: expected a rating of 1 to 5, got 6"),
        ("u.data", "9\t2\t5\t4\n", r"u.data: user 9 is not in u.user"),
        ("u.data", "1\t99\t5\t4\n", r"u.data: item 99 is not in u.item"),
        ("u.data", "", r"u.data: expected at least one line, got an empty file"),
        ("u.user", "1|24|M\n", r"u.user, line 1: expected 5 fields, got 3"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_line(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(folder)


def test_a_missing_file_says_how_to_get_it(folder):
    (folder / "u.item").unlink()
    with pytest.raises(ConfigError, match=r"u.item: no such file; .*make movielens"):
        read(folder)


def test_shares_that_leave_nothing_to_train_on_are_refused(folder):
    with pytest.raises(ConfigError, match=r"expected shares > 0 with a sum < 1, got test_share 0.5"):
        read(folder, test_share=0.5, validation_share=0.5)


@pytest.mark.skipif("MOVIELENS_DIR" not in os.environ, reason="MOVIELENS_DIR is not set")
def test_the_baseline_on_the_real_data_is_the_known_one():
    splits = read(Path(os.environ["MOVIELENS_DIR"]))
    known = [splits.train, splits.validation]
    users = np.concatenate([data.groups[data.request_of_row] for data in known])
    items = np.concatenate([data.items for data in known])
    test = splits.test
    assert len(items) + test.num_rows == 100_000
    for task, expected in (("like", 0.797), ("love", 0.811)):
        labels = np.concatenate([data.labels[task] for data in known])
        scores = additive_scores(users, items, labels, test.groups[test.request_of_row], test.items)
        assert auc(test.labels[task], scores) == pytest.approx(expected, abs=0.003)
