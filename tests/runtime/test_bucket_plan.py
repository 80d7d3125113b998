"""The cheapest set of buckets, against every set there is."""

import itertools
import math
import random

import pytest

from xlarank.errors import BucketError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.spec import Bucket, BucketLadder, LatencyProfile


def plan_of(seconds, **options):
    """A plan of buckets given as {(rows, requests): seconds}."""
    profile = LatencyProfile({Bucket(*key): value for key, value in seconds.items()})
    ladder = BucketLadder(tuple(sorted(profile.seconds)))
    return BucketPlan(ladder, profile, **{"seconds_a_run": 0.0} | options)


def by_hand(seconds, num_rows, most=4):
    """Least sum over all multisets of up to `most` buckets of one request that hold the rows."""
    alone = {rows: value for (rows, requests), value in seconds.items() if requests == 1}
    return min(
        sum(alone[rows] for rows in chosen)
        for count in range(1, most + 1)
        for chosen in itertools.combinations_with_replacement(sorted(alone), count)
        if sum(chosen) >= num_rows
    )


@pytest.mark.parametrize(
    "seconds",
    [
        {(4, 1): 1.0, (8, 1): 1.5, (16, 1): 4.0},  # 12 = 8 + 4 beats 16
        {(4, 1): 1.0, (8, 1): 1.5, (16, 1): 2.0},  # it doesn't
        {(4, 1): 1.0, (8, 1): 2.5, (16, 1): 9.0},  # small ones win throughout
        {(4, 1): 3.0, (8, 1): 1.5, (16, 1): 2.0},  # a larger one is the faster
    ],
)
def test_rows_run_in_the_cheapest_set_of_buckets(seconds):
    plan = plan_of(seconds)
    for num_rows in range(1, 17):
        assert plan.seconds(num_rows) == pytest.approx(by_hand(seconds, num_rows))


def test_rows_beyond_the_largest_bucket_fill_it_first():
    plan = plan_of({(4, 1): 1.0, (16, 1): 2.0})
    assert plan.seconds(0) == 0
    assert plan.seconds(35) == pytest.approx(2 * 2.0 + 1.0)
    assert plan.seconds(37) == pytest.approx(2 * 2.0 + 2.0)


def test_a_set_of_runs_takes_what_its_runs_take():
    plan = plan_of({(4, 1): 1.0, (16, 1): 2.0})
    assert plan.runs(0) == (0.0, 0)
    assert plan.runs(16) == (2.0, 1)
    assert plan.runs(20) == (3.0, 2)
    assert plan.runs(16 * 100) == (200.0, 100)
    assert plan.seconds_taken(lambda price: price + 5, 16 * 100) == 700.0
    assert plan.seconds_taken(lambda price: price + 5, 0) == 0.0


@pytest.mark.parametrize("seed", range(50))
def test_rows_of_many_runs_cost_what_the_cheapest_set_of_buckets_costs(seed):
    """Exactly up to two of the largest bucket, and nearly beyond."""
    rng = random.Random(seed)
    rows = sorted(rng.sample(range(1, 40), 3))
    seconds = {(size, 1): rng.uniform(0.5, 3) for size in rows}
    plan = plan_of(seconds)
    prices = {size: plan.run_seconds(size, 1) for size in rows}
    best = [0.0]
    for num_rows in range(1, 20 * rows[-1]):
        best.append(min(price + best[max(0, num_rows - size)] for size, price in prices.items()))
    for num_rows, expected in enumerate(best):
        if num_rows <= 2 * rows[-1]:
            assert plan.seconds(num_rows) == pytest.approx(expected)
        else:
            assert expected - 1e-9 <= plan.seconds(num_rows) <= 1.15 * expected


def test_the_smallest_bucket_that_holds_a_batch_runs_and_costs_no_more_than_a_larger_one():
    plan = plan_of({(8, 1): 3.0, (8, 8): 2.0, (16, 1): 4.0, (16, 16): 9.0})
    assert plan.bucket(5, 1) == Bucket(8, 1)
    assert plan.run_seconds(5, 1) == 2.0  # 3.0 was a disturbed measurement
    assert plan.bucket(9, 1) == Bucket(16, 1)
    assert plan.bucket(9, 2) == Bucket(16, 16)
    assert plan.bucket(17, 1) is None
    assert plan.run_seconds(17, 1) == math.inf


def test_of_buckets_that_hold_a_batch_the_cheapest_runs():
    """The smallest may hold more requests, which cost; what is planned at a price is run at it."""
    plan = plan_of({(64, 8): 5.0, (128, 1): 1.0})
    assert plan.bucket(30, 1) == Bucket(128, 1)
    assert plan.run_seconds(30, 1) == plan.seconds(30) == 1.0
    assert plan.bucket(30, 2) == Bucket(64, 8)


def test_requests_that_no_bucket_holds_at_once_are_priced_in_parts():
    plan = plan_of({(8, 1): 1.0, (8, 2): 2.0})
    assert plan.bucket(6, 3) is None
    assert plan.seconds(6, 3) == 2.0


def test_a_run_costs_its_share_beside_the_device():
    assert plan_of({(8, 1): 1.0}, seconds_a_run=0.5).seconds(16) == 3.0


def test_merging_stops_at_the_knee_unless_told_otherwise():
    seconds = {(1, 1): 1.0, (8, 1): 2.0, (64, 1): 16.0}
    assert plan_of(seconds).knee_rows == 8
    assert plan_of(seconds).seconds_a_row == 0.25
    assert plan_of(seconds, max_batch_rows=20).knee_rows == 20
    with pytest.raises(BucketError, match=r"max_batch_rows must be in \[1, 64\]; was 65"):
        plan_of(seconds, max_batch_rows=65)


@pytest.mark.parametrize(("requests", "seconds"), [(1, 2.0), (2, 1.0), (8, 0.5)])
def test_a_small_request_adds_no_less_than_its_share_of_as_many_as_merge(requests, seconds):
    assert plan_of({(1, 1): 1.0, (8, requests): 2.0}).work_seconds(2) == seconds


def test_a_small_request_adds_its_share_of_a_full_batch_and_a_large_one_its_own_run():
    plan = plan_of({(1, 1): 1.0, (8, 8): 2.0})
    assert plan.work_seconds(2) == 0.5
    assert plan.work_seconds(6) == 2.0
