"""Planned ladders against every subset of row counts, and times of row counts that nobody measured."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlarank.errors import ConfigError
from xlarank.spec import Bucket, LatencyProfile
from xlarank.spec.ladder import SizeHistogram, estimate_ladder, plan_ladder, seconds_by_rows

SIZES = st.dictionaries(st.integers(1, 90), st.integers(1, 20), min_size=1, max_size=7)


def per_row(rows):
    """A device that takes a second to start and a second a row."""
    return 1.0 + rows


def cost(counts, seconds_of, rows):
    """Mean seconds a request, one request after the other, as the batcher splits and pads."""
    total = 0.0
    for size, count in counts.items():
        left = size
        while left > rows[-1]:
            total += count * seconds_of(rows[-1])
            left -= rows[-1]
        total += count * seconds_of(min(row for row in rows if row >= left))
    return total / sum(counts.values())


def subsets(candidates, num_buckets, last):
    """Every choice of at most so many row counts that ends with one of `last`."""
    for number in range(1, num_buckets + 1):
        yield from (rows for rows in itertools.combinations(sorted(candidates), number) if rows[-1] in last)


def grid(most):
    return [rows for rows in (1, 2, 4, *range(8, most + 8, 8)) if rows <= most]


# By hand -----------------------------------------------------------------------------------------


def test_a_plan_by_hand():
    # 6 requests of 10 candidates, 3 of 30 and 1 of 100 run in 16, 32 and 104 rows at 1 + rows seconds:
    #   {104}          10 x 105                      1050
    #   {32, 104}      9 x 33 + 105                   402
    #   {16, 104}      6 x 17 + 4 x 105               522
    #   {16, 32, 104}  6 x 17 + 3 x 33 + 105          306
    counts = SizeHistogram({10: 6, 30: 3, 100: 1})
    plans = {k: plan_ladder(counts, per_row, num_buckets=k) for k in (1, 2, 3, 4)}
    assert {k: plan.rows for k, plan in plans.items()} == {
        1: (104,),
        2: (32, 104),
        3: (16, 32, 104),
        4: (16, 32, 104),
    }
    assert [plans[k].chosen.seconds_per_request for k in (1, 2, 3)] == [105.0, 40.2, 30.6]
    # 250 candidates in 9 x 32 + 104 = 392 rows.
    assert plans[2].chosen.padding_share == 142 / 392
    assert [(use.rows, use.seconds) for use in plans[2].chosen.uses] == [(32, 33.0), (104, 105.0)]
    assert [use.share_of_requests for use in plans[2].chosen.uses] == [0.9, 0.1]
    assert [use.padding_share for use in plans[2].chosen.uses] == [(288 - 150) / 288, 4 / 104]
    # Powers of two: 6 x 17 + 3 x 33 + 129 seconds, 6 x 16 + 3 x 32 + 128 = 320 rows.
    powers = plans[2].powers_of_two
    assert powers.rows == (8, 16, 32, 64, 128)
    assert powers.seconds_per_request == 33.0
    assert powers.padding_share == 70 / 320
    assert [use.share_of_requests for use in powers.uses] == [0, 0.6, 0.3, 0, 0.1]


def test_an_oversize_request_by_hand():
    # At most 32 rows: 100 candidates are 3 x 32 and 4, 32 are 1 x 32, 33 are 32 and 1.
    #   4 -> 4 rows, 1 -> 1 row; seconds 3 x 33 + 5, 33, 33 + 2.
    plan = plan_ladder(SizeHistogram({100: 1, 32: 1, 33: 1}), per_row, num_buckets=3, max_rows=32)
    assert plan.rows == (1, 4, 32)
    assert plan.chosen.seconds_per_request == (104 + 33 + 35) / 3
    assert plan.chosen.padding_share == 0
    assert [use.runs_per_request for use in plan.chosen.uses] == [1 / 3, 1 / 3, 5 / 3]
    # Each of the three has a run in 32 rows; two of them are split.
    assert [use.share_of_requests for use in plan.chosen.uses] == [1 / 3, 1 / 3, 1.0]
    assert plan.powers_of_two.rows == (8, 16, 32)
    assert plan.powers_of_two.padding_share == (4 + 7) / (100 + 32 + 33 + 4 + 7)


@pytest.mark.parametrize(
    ("size", "rows"), {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 17: 24, 100: 104, 1024: 1024}.items()
)
def test_a_size_is_rounded_up_to_a_small_power_or_a_multiple_of_8(size, rows):
    assert plan_ladder(SizeHistogram({size: 1}), per_row, num_buckets=5).rows == (rows,)


@pytest.mark.parametrize(
    ("sizes", "max_rows", "rows"),
    [
        ([3], None, (8,)),
        ([9], None, (8, 16)),
        ([500, 16], None, (8, 16, 32, 64, 128, 256, 512)),
        ([1000], 1000, (8, 16, 32, 64, 128, 256, 512, 1000)),
        ([5000], 100, (8, 16, 32, 64, 100)),
        ([64], 64, (8, 16, 32, 64)),
        ([3], 4, (4,)),
        ([30], 4, (4,)),
    ],
)
def test_powers_of_two_end_where_the_largest_request_fits_or_at_the_bound(sizes, max_rows, rows):
    plan = plan_ladder(SizeHistogram.of_sizes(sizes), per_row, num_buckets=3, max_rows=max_rows)
    assert plan.powers_of_two.rows == rows


# Against every choice ----------------------------------------------------------------------------


@given(counts=SIZES, num_buckets=st.integers(1, 4), start=st.floats(0.01, 50), curve=st.floats(0.3, 1.5))
def test_no_choice_of_row_counts_is_better(counts, num_buckets, start, curve):
    def seconds_of(rows):
        return start + rows**curve

    plan = plan_ladder(SizeHistogram(counts), seconds_of, num_buckets=num_buckets)
    assert len(plan.rows) <= num_buckets
    assert plan.rows == tuple(sorted(set(plan.rows)))
    assert set(plan.rows) <= set(grid(96))
    end = min(rows for rows in grid(96) if rows >= max(counts))
    best = min(cost(counts, seconds_of, rows) for rows in subsets(grid(end), num_buckets, {end}))
    assert plan.chosen.seconds_per_request == pytest.approx(best, rel=1e-8)
    assert plan.chosen.seconds_per_request == pytest.approx(cost(counts, seconds_of, plan.rows), rel=1e-12)
    powers = plan.powers_of_two
    assert powers.seconds_per_request == pytest.approx(cost(counts, seconds_of, powers.rows), rel=1e-12)


@given(
    counts=SIZES,
    num_buckets=st.integers(1, 4),
    max_rows=st.sampled_from([1, 3, 8, 20, 24, 64]),
    start=st.floats(0.01, 50),
)
def test_no_choice_is_better_where_large_requests_are_split(counts, num_buckets, max_rows, start):
    def seconds_of(rows):
        return start + rows

    plan = plan_ladder(SizeHistogram(counts), seconds_of, num_buckets=num_buckets, max_rows=max_rows)
    end = min(max_rows, *(rows for rows in grid(96) if rows >= max(counts)))
    assert plan.rows[-1] == end
    choices = subsets({*grid(end), end}, num_buckets, {end})
    best = min(cost(counts, seconds_of, rows) for rows in choices)
    assert plan.chosen.seconds_per_request == pytest.approx(best, rel=1e-8)


@given(
    counts=SIZES,
    times=st.dictionaries(st.integers(1, 100), st.integers(1, 30), min_size=1, max_size=8),
    num_buckets=st.integers(1, 5),
)
def test_no_choice_of_given_candidates_is_better_whatever_their_times(counts, times, num_buckets):
    plan = plan_ladder(
        SizeHistogram(counts), lambda rows: times.get(rows, 1), num_buckets=num_buckets, candidates=times
    )
    holding = {rows for rows in times if rows >= max(counts)}
    choices = list(subsets(times, num_buckets, holding or {max(times)}))
    costs = {rows: cost(counts, times.__getitem__, rows) for rows in choices}
    best = min(costs.values())
    assert plan.chosen.seconds_per_request == pytest.approx(best, rel=1e-8)
    tied = [rows for rows, value in costs.items() if value == pytest.approx(best, rel=1e-12)]
    assert len(plan.rows) == min(map(len, tied))


@given(counts=SIZES, start=st.floats(0.01, 50), max_rows=st.sampled_from([None, 16, 40]))
def test_more_buckets_never_cost_more_and_as_many_as_the_powers_of_two_never_lose(counts, start, max_rows):
    def seconds_of(rows):
        return start + rows

    plans = [
        plan_ladder(SizeHistogram(counts), seconds_of, num_buckets=k, max_rows=max_rows) for k in range(1, 8)
    ]
    costs = [plan.chosen.seconds_per_request for plan in plans]
    for fewer, more in itertools.pairwise(costs):
        assert more <= fewer * (1 + 1e-12)
    powers = plans[0].powers_of_two
    assert costs[len(powers.rows) - 1] <= powers.seconds_per_request * (1 + 1e-12)


# Ties --------------------------------------------------------------------------------------------


@given(counts=SIZES, seconds=st.floats(1e-6, 1))
def test_a_bucket_that_saves_no_time_is_not_chosen(counts, seconds):
    plan = plan_ladder(SizeHistogram(counts), lambda rows: seconds, num_buckets=5)
    assert len(plan.rows) == 1


def test_a_bucket_that_saves_a_little_time_is_chosen():
    plan = plan_ladder(SizeHistogram({8: 1, 16: 1}), lambda rows: 1 + rows * 1e-7, num_buckets=2)
    assert plan.rows == (8, 16)


def test_of_ladders_as_fast_as_each_other_the_one_of_less_padding_is_chosen():
    seconds = {8: 1.0, 16: 2.0, 32: 3.0, 64: 3.0}  # 8 and 64 take 1 + 3 + 3, 16 and 64 take 2 + 2 + 3
    plan = plan_ladder(
        SizeHistogram({8: 1, 16: 1, 64: 1}), seconds.__getitem__, num_buckets=2, candidates=[8, 16, 64]
    )
    assert plan.rows == (16, 64)


def test_a_candidate_that_no_request_needs_is_not_chosen():
    plan = plan_ladder(SizeHistogram({10: 5}), per_row, num_buckets=4, candidates=[64, 8, 16, 32])
    assert plan.rows == (16,)


def test_given_candidates_above_the_bound_are_left_out():
    plan = plan_ladder(
        SizeHistogram({10: 5, 60: 1}), per_row, num_buckets=4, candidates=(12, 40, 64), max_rows=40
    )
    assert plan.rows == (12, 40)
    # 60 is 40 and 20, and 20 runs in 40.
    assert plan.chosen.seconds_per_request == (5 * 13 + 2 * 41) / 6


# The histogram -----------------------------------------------------------------------------------


def test_a_histogram_is_ascending_and_without_sizes_of_no_requests():
    histogram = SizeHistogram({500: 2, 7: 1, 9: 0})
    assert list(histogram.counts.items()) == [(7, 1), (500, 2)]
    assert (histogram.num_requests, histogram.largest) == (3, 500)
    assert SizeHistogram.of_sizes([500, 7, 500]) == histogram


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], r"size histogram: expected requests by size, got \[1, 2\]"),
        ({}, "size histogram: expected at least one request, got none"),
        ({5: 0}, "size histogram: expected at least one request, got none"),
        ({0: 1}, r"size histogram: a size must be an integer in \[1, 2\*\*31\); was 0"),
        ({2.0: 1}, "size histogram: a size must be an integer .*; was 2.0"),
        ({2: -1}, r"size histogram: requests of size 2 must be an integer in \[0, 2\*\*53\); was -1"),
    ],
)
def test_a_histogram_of_other_things_is_refused(counts, message):
    with pytest.raises(ConfigError, match=message):
        SizeHistogram(counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_buckets": 0}, r"ladder plan: num_buckets must be an integer in \[1, 2\*\*31\); was 0"),
        ({"num_buckets": 2.0}, "ladder plan: num_buckets must be an integer .*; was 2.0"),
        ({"max_rows": 0}, r"ladder plan: max_rows must be an integer in \[1, 2\*\*31\); was 0"),
        ({"candidates": []}, "ladder plan: expected at least one of candidates, got none"),
        ({"candidates": [8, -1]}, "ladder plan: candidates must be an integer .*; was -1"),
        ({"candidates": [16, 8], "max_rows": 4}, r"expected candidates <= max_rows, 4, got \[8, 16\]"),
    ],
)
def test_a_plan_of_other_numbers_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan_ladder(SizeHistogram({9: 1}), per_row, **{"num_buckets": 2, **options})


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (0.0, "ladder: seconds of 16 rows must be > 0; was 0.0"),
        (-1, "ladder: seconds of 16 rows must be > 0; was -1"),
        (math.nan, "ladder: seconds of 16 rows must be a finite number; was nan"),
    ],
)
def test_a_time_that_is_none_is_refused(seconds, message):
    with pytest.raises(ConfigError, match=message):
        plan_ladder(SizeHistogram({9: 1}), lambda rows: seconds, num_buckets=1)


def test_an_estimate_of_no_row_counts_is_refused():
    with pytest.raises(ConfigError, match="ladder estimate: expected at least one of row counts, got none"):
        estimate_ladder(SizeHistogram({9: 1}), per_row, [])


def test_an_estimate_takes_row_counts_in_any_order_and_says_when_one_never_runs():
    estimate = estimate_ladder(SizeHistogram({9: 1}), per_row, [64, 8, 16])
    assert estimate.rows == (8, 16, 64)
    assert [use.runs_per_request for use in estimate.uses] == [0, 1, 0]
    assert [use.padding_share for use in estimate.uses] == [0, 7 / 16, 0]


# Times -------------------------------------------------------------------------------------------


def times_of(**seconds):
    """The function of a profile written as `b8x1=0.5`."""
    return seconds_by_rows(
        LatencyProfile({Bucket(*map(int, name[1:].split("x"))): time for name, time in seconds.items()})
    )


def test_times_are_straight_lines_between_row_counts_and_go_on_above_them():
    seconds_of = times_of(b8x1=1.0, b16x1=2.0, b32x1=10.0)
    assert [seconds_of(rows) for rows in (8, 16, 32)] == [1.0, 2.0, 10.0]
    assert [seconds_of(rows) for rows in (12, 24)] == [1.5, 6.0]
    assert [seconds_of(rows) for rows in (1, 7)] == [1.0, 1.0]  # a run costs that at least
    assert [seconds_of(rows) for rows in (34, 64)] == [11.0, 26.0]  # half a second a row


def test_times_are_those_of_the_fewest_requests():
    seconds_of = times_of(b8x8=5.0, b8x1=1.0, b64x2=3.0, b64x64=9.0)
    assert [seconds_of(rows) for rows in (8, 64)] == [1.0, 3.0]


def test_times_never_fall_with_rows():
    seconds_of = times_of(b8x1=3.0, b16x1=1.0, b32x1=2.0, b64x1=1.5)
    assert [seconds_of(rows) for rows in (1, 8, 16, 32, 64, 128)] == [1.0, 1.0, 1.0, 1.5, 1.5, 1.5]


def test_a_profile_of_one_row_count_is_taken_in_proportion_above_it():
    seconds_of = times_of(b8x1=2.0)
    assert [seconds_of(rows) for rows in (1, 8, 12, 80)] == [2.0, 2.0, 3.0, 20.0]


@given(
    profile=st.dictionaries(st.integers(1, 200), st.floats(1e-6, 10), min_size=1, max_size=6),
    rows=st.lists(st.integers(1, 400), min_size=2, max_size=10),
)
def test_times_of_any_profile_are_positive_and_never_fall(profile, rows):
    seconds_of = seconds_by_rows(LatencyProfile({Bucket(row, 1): time for row, time in profile.items()}))
    times = [seconds_of(row) for row in sorted(rows)]
    assert times[0] > 0
    for less, more in itertools.pairwise(times):
        assert more >= less * (1 - 1e-12)
