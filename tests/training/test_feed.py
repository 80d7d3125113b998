"""The made-up feed and the random data."""

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.spec.metrics import auc
from xlarank.training import random_data
from xlarank.training.feed import FeedSize, read, write_feed

SMALL = FeedSize(users=50, videos=80, creators=10, train=(60, 5), validation=(10, 5), test=(400, 40))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    path = tmp_path_factory.mktemp("feed")
    write_feed(path, seed=1, size=SMALL)
    return read(path)


def test_the_same_seed_makes_the_same_feed(splits, tmp_path):
    write_feed(tmp_path, seed=1, size=SMALL)
    again = read(tmp_path)
    np.testing.assert_array_equal(again.train.truth["finish"], splits.train.truth["finish"])
    np.testing.assert_array_equal(again.test.labels["share"], splits.test.labels["share"])
    np.testing.assert_array_equal(
        again.train.contexts["history"].values, splits.train.contexts["history"].values
    )


def test_labels_come_from_the_probabilities_that_it_states(splits):
    test = splits.test
    for task, truth in test.truth.items():
        # Among rows of about equal probability, the share of ones is that probability.
        for rows in np.array_split(np.argsort(truth), 8):
            error = test.labels[task][rows].mean() - truth[rows].mean()
            assert abs(error) < 4 * np.sqrt(0.25 / len(rows))
        assert auc(test.labels[task], truth) > 0.7


def test_a_history_leans_towards_what_its_user_would_finish(splits):
    test = splits.test
    watched, other = [], []
    for request in range(test.num_requests):
        seen = set(test.features_of(request)["history"].values.tolist())
        rows = test.rows_of(request)
        for video, truth in zip(test.items[rows], test.truth["finish"][rows], strict=True):
            (watched if video in seen else other).append(truth)
    assert np.mean(watched) > np.mean(other) + 0.1


def test_a_folder_without_a_feed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train/contexts.parquet: no such file; expected a feed"):
        read(tmp_path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    write_feed(tmp_path, size=SMALL)
    (tmp_path / "test" / "candidates.parquet").write_text("not parquet at all")
    with pytest.raises(ConfigError, match=r"test/candidates.parquet: expected a Parquet file"):
        read(tmp_path)


def test_more_candidates_than_videos_are_refused():
    with pytest.raises(ConfigError, match=r"test must be requests >= 1 and candidates in \[1, 5\]"):
        FeedSize(videos=5, train=(1, 1), validation=(1, 1), test=(1, 6))


def test_random_data_are_what_the_options_say(tmp_path):
    options = {
        "tasks": ["click"],
        "context_ids": {"country": 4},
        "candidate_ids": {"item": 9},
        "candidate_dense": {"counters": 3},
        "num_requests": 10,
        "num_candidates": 6,
    }
    splits = random_data.read(tmp_path, **options)
    train = splits.train
    assert (train.num_requests, train.num_rows, splits.test.num_requests) == (10, 60, 2)
    assert train.candidates["counters"].shape == (60, 3)
    assert set(train.contexts["country"]) <= set(range(4))
    again = random_data.read(tmp_path, **options)
    np.testing.assert_array_equal(again.train.labels["click"], train.labels["click"])
    with pytest.raises(ConfigError, match="random data: item must be an integer >= 1; was 0"):
        random_data.read(tmp_path, **{**options, "candidate_ids": {"item": 0}})
