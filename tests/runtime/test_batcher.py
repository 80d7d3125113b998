"""The batcher's contract, by hand and by property; no threads, time is a number."""

import collections
import gc
import math
import random
import weakref

import pytest

from xlarank.errors import BucketError
from xlarank.runtime.batcher import Batch, Batcher
from xlarank.runtime.bucket_plan import LEAST_GAIN, BucketPlan
from xlarank.spec import Bucket, BucketLadder, LatencyProfile
from xlarank.spec.serving import QueueConfig

LADDER = BucketLadder.of_rows((8, 32, 128))


def plan_of(ladder, seconds, **options):
    """A plan with `seconds(bucket)`."""
    profile = LatencyProfile({bucket: seconds(bucket) for bucket in ladder.buckets})
    return BucketPlan(ladder, profile, **{"seconds_a_run": 0.0} | options)


# The fewer runs the better, and requests cost nothing: nothing is split for time's sake.
MERGING = plan_of(LADDER, lambda bucket: 1 + bucket.rows / 1e6)


def batcher_of(plan=MERGING, num_devices=1, **config) -> Batcher[str]:
    return Batcher(plan, QueueConfig(**config), num_devices=num_devices)


def fill(batcher, *requests, now=0.0, **options):
    for name, rows in requests:
        batcher.add(name, rows, now=now, **options)


def shapes(batch: Batch | None) -> list[tuple[str, int, int]]:
    return [] if batch is None else [(part.item, part.begin, part.end) for part in batch.parts]


def run(batcher, device=0, now=0.0, **options):
    return shapes(batcher.next_batch(device, now, **options))


def test_nothing_queued_gives_no_batch():
    assert batcher_of().next_batch(0, 0.0) is None


def test_a_lone_request_runs_at_once_in_the_bucket_that_holds_it():
    batcher = batcher_of()
    fill(batcher, ("a", 9))
    assert batcher.num_queued_rows == 9
    batch = batcher.next_batch(0, 0.0)
    assert (batch.bucket, batch.num_rows, shapes(batch)) == (Bucket(32, 1), 9, [("a", 0, 9)])
    assert batcher.num_queued_rows == batcher.num_queued_requests == batcher.queued_seconds == 0


def test_queued_requests_share_a_batch_in_the_order_they_came():
    batcher = batcher_of()
    fill(batcher, ("a", 3), ("b", 4), ("c", 20), ("d", 100), ("e", 1))
    batch = batcher.next_batch(0, 0.0)
    assert shapes(batch) == [("a", 0, 3), ("b", 0, 4), ("c", 0, 20), ("d", 0, 100), ("e", 0, 1)]
    assert batch.bucket == Bucket(128, 128)
    assert batcher.next_batch(0, 0.0) is None


def test_a_request_that_does_not_fit_waits_whole_for_the_next_batch():
    batcher = batcher_of()
    fill(batcher, ("a", 100), ("b", 60))
    assert run(batcher, 0) == [("a", 0, 100)]
    assert run(batcher, 1) == [("b", 0, 60)]


def test_smaller_requests_overtake_one_that_does_not_fit_until_it_has_waited_its_time():
    batcher = batcher_of(max_skip_ms=2)
    fill(batcher, ("big", 100), ("wide", 60), ("small", 20))
    assert run(batcher, now=0.0019) == [("big", 0, 100), ("small", 0, 20)]
    fill(batcher, ("late", 5), now=0.0019)
    batcher = batcher_of(max_skip_ms=2)
    fill(batcher, ("big", 100), ("wide", 60), ("small", 20))
    assert run(batcher, now=0.002) == [("big", 0, 100)]
    assert run(batcher, now=0.002) == [("wide", 0, 60), ("small", 0, 20)]


def test_none_overtakes_an_old_request_in_a_cheaper_bucket_either():
    """Two runs of 8 are cheaper than 16 or 32: the later 4 rows must not take the place of the old 10."""
    ladder = BucketLadder(tuple(Bucket(rows, 4) for rows in (8, 16, 32)))
    plan = plan_of(ladder, lambda b: {8: 1.0, 16: 4.0, 32: 9.0}[b.rows], max_batch_rows=32)
    for skip, first in ((20, [("run", 0, 4), ("late", 0, 4)]), (2, [("run", 0, 4)])):
        batcher = batcher_of(plan, max_skip_ms=skip)
        fill(batcher, ("run", 4), ("old", 10), now=0.0)
        fill(batcher, ("late", 4), now=0.009)
        assert run(batcher, now=0.01) == first


def test_batches_stop_growing_at_the_knee_but_one_request_may_pass_it():
    batcher = batcher_of(plan_of(LADDER, lambda b: 1 + b.rows / 1e6, max_batch_rows=32))
    fill(batcher, ("a", 20), ("b", 12), ("c", 1), ("d", 90))
    assert run(batcher) == [("a", 0, 20), ("b", 0, 12)]
    assert run(batcher) == [("c", 0, 1)]
    batch = batcher.next_batch(0, 0.0)
    assert (shapes(batch), batch.bucket) == ([("d", 0, 90)], Bucket(128, 1))


def test_what_a_large_request_leaves_free_of_its_bucket_is_filled():
    plan = plan_of(LADDER, lambda b: {8: 1.0, 32: 2.0, 128: 7.7}[b.rows])
    assert plan.knee_rows == 32
    batcher = batcher_of(plan)
    fill(batcher, ("a", 120), ("b", 6))
    assert run(batcher) == [("a", 0, 120), ("b", 0, 6)]


UNEVEN = plan_of(BucketLadder.of_rows((8, 32, 64)), lambda bucket: {8: 1.0, 32: 2.0, 64: 3.9}[bucket.rows])
"""A knee of 32 rows: two such runs take 4."""


def twenties(count):
    return [(f"r{number}", 20) for number in range(count)]


@pytest.mark.parametrize("max_skip_ms", [0, 10])
def test_requests_that_leave_runs_within_the_knee_half_empty_share_one_beyond_it(max_skip_ms):
    batcher = batcher_of(UNEVEN, max_skip_ms=max_skip_ms)
    fill(batcher, *twenties(4), now=0.0)
    batch = batcher.next_batch(0, 1.0)  # three take 3.9, and 6 one by one
    assert (batch.bucket, batch.num_rows) == (Bucket(64, 64), 60)
    assert [part.item for part in batch.parts] == ["r0", "r1", "r2"]
    assert run(batcher, now=1.0) == [("r3", 0, 20)]


@pytest.mark.parametrize("requests", [twenties(2), [("a", 32), ("b", 32), ("c", 32), ("d", 32)]])
def test_they_do_not_where_it_saves_little(requests):
    batcher = batcher_of(UNEVEN)
    fill(batcher, *requests)
    for name, rows in requests:  # as many runs of 2 as requests; 64 rows take 3.9
        assert run(batcher) == [(name, 0, rows)]


def test_no_run_beyond_the_knee_is_longer_than_some_runs_of_it():
    batcher = batcher_of(plan_of(LADDER, lambda bucket: {8: 1.0, 32: 2.0, 128: 7.7}[bucket.rows]))
    fill(batcher, *twenties(6))  # 12 one by one; but whoever comes next would wait for 7.7
    assert run(batcher) == [("r0", 0, 20)]


def test_a_higher_level_does_not_wait_for_lower_ones_to_save_time():
    batcher = batcher_of(UNEVEN)
    fill(batcher, *twenties(3))
    fill(batcher, ("urgent", 20), priority=1)
    assert run(batcher) == [("urgent", 0, 20)]
    assert len(run(batcher)) == 3


def test_nobody_is_late_for_a_run_beyond_the_knee():
    for deadline, together in ((3.8, 1), (4.1, 3)):
        batcher = batcher_of(UNEVEN)
        fill(batcher, *twenties(2), now=0.0)
        fill(batcher, ("hurried", 20), now=0.0, deadline=deadline)
        assert len(run(batcher)) == together
    for deadline, together in ((7.7, 1), (8.0, 3)):  # one that is overtaken: 3.9 from the end of the first
        batcher = batcher_of(UNEVEN, max_skip_ms=1e4)
        fill(batcher, ("r0", 20), now=0.0)
        fill(batcher, ("overtaken", 50), now=0.0, deadline=deadline)
        fill(batcher, ("r1", 20), ("r2", 20), now=0.0)
        assert len(run(batcher)) == together
        assert [name for name, _, _ in run(batcher, now=2.0 if together == 1 else 3.9)] == ["overtaken"]


def test_a_limit_of_the_operator_is_kept():
    even = plan_of(LADDER, lambda b: {8: 1.0, 32: 2.0, 128: 7.7}[b.rows], max_batch_rows=32)
    batcher = batcher_of(even)
    fill(batcher, *twenties(6))
    assert run(batcher) == [("r0", 0, 20)]
    merging = batcher_of(plan_of(LADDER, lambda b: 1 + b.rows / 1e6, max_batch_rows=32))
    fill(merging, ("a", 120), ("b", 6), ("c", 6))
    assert [run(merging) for _ in range(2)] == [[("a", 0, 120)], [("b", 0, 6), ("c", 0, 6)]]
    off = batcher_of(plan_of(LADDER, lambda b: 1 + b.rows / 1e6, max_batch_rows=1))
    fill(off, ("a", 3), ("b", 1), ("c", 1))
    assert [run(off) for _ in range(3)] == [[("a", 0, 3)], [("b", 0, 1)], [("c", 0, 1)]]


def test_requests_are_counted_as_well_as_rows():
    ladder = BucketLadder((Bucket(64, 2),))
    batcher = batcher_of(plan_of(ladder, lambda bucket: 1.0))
    fill(batcher, ("a", 1), ("b", 1), ("c", 1))
    assert run(batcher) == [("a", 0, 1), ("b", 0, 1)]
    assert run(batcher) == [("c", 0, 1)]


def test_a_set_of_buckets_runs_where_it_is_cheaper_than_one():
    ladder = BucketLadder(tuple(Bucket(rows, 1) for rows in (4, 8, 16)))
    cheap = {4: 1.0, 8: 1.5, 16: 4.0}
    batcher = batcher_of(plan_of(ladder, lambda bucket: cheap[bucket.rows]))
    fill(batcher, ("a", 12))
    assert [shapes(b) for b in (batcher.next_batch(0, 0.0), batcher.next_batch(0, 0.0))] == [
        [("a", 0, 8)],
        [("a", 8, 12)],
    ]
    dear = cheap | {16: 2.5 * 1.04}  # 4% more than 8 and 4: not worth a run more
    batcher = batcher_of(plan_of(ladder, lambda bucket: dear[bucket.rows]))
    fill(batcher, ("a", 12))
    assert run(batcher) == [("a", 0, 12)]


def test_500_rows_run_as_two_halves_where_that_is_faster():
    ladder = BucketLadder((Bucket(256, 1), Bucket(512, 1)))
    batcher = batcher_of(plan_of(ladder, lambda bucket: {256: 4.0, 512: 9.0}[bucket.rows]))
    fill(batcher, ("a", 500))
    assert (run(batcher), run(batcher)) == ([("a", 0, 256)], [("a", 256, 500)])


def test_requests_are_merged_only_where_that_saves_time():
    ladder = BucketLadder((Bucket(8, 1), Bucket(16, 2)))
    for seconds_of_two, expected in ((3.0, [("a", 0, 8)]), (1.5, [("a", 0, 8), ("b", 0, 8)])):
        plan = plan_of(ladder, lambda b, s=seconds_of_two: {1: 1.0, 2: s}[b.requests], max_batch_rows=16)
        batcher = batcher_of(plan)
        fill(batcher, ("a", 8), ("b", 8))
        assert run(batcher) == expected


def test_a_large_request_is_split_on_one_device_and_its_tail_takes_company():
    batcher = batcher_of()
    fill(batcher, ("a", 300), ("b", 10))
    assert run(batcher, 0) == [("a", 0, 128)]
    assert run(batcher, 1) == [("b", 0, 10)]
    fill(batcher, ("c", 20))
    assert run(batcher, 0) == [("a", 128, 256)]
    assert run(batcher, 0) == [("a", 256, 300), ("c", 0, 20)]
    assert run(batcher, 0) == []


def test_a_higher_level_runs_between_the_parts_of_a_huge_request_which_stays_on_its_device():
    batcher = batcher_of(ageing_ms=100, max_skip_ms=2)
    fill(batcher, ("huge", 1000), now=0.0)
    assert run(batcher, 0, now=0.0) == [("huge", 0, 128)]
    fill(batcher, ("urgent", 20), ("large", 200), now=0.05, priority=1)
    fill(batcher, ("later", 20), now=0.05)
    assert batcher.seconds_ahead(0.05, 1) < batcher.seconds_ahead(0.05, 2)
    assert run(batcher, 0, now=0.05) == [("urgent", 0, 20)]  # nothing more overtakes what has waited so long
    assert run(batcher, 0, now=0.05) == [("large", 0, 128)]
    fill(batcher, ("too late", 20), now=0.11, priority=1)  # its level counts as 0.1 s
    assert [run(batcher, 0, now=0.11) for _ in range(2)] == [[("large", 128, 200)], [("huge", 128, 256)]]
    assert run(batcher, 1, now=0.11) == [("too late", 0, 20), ("later", 0, 20)]
    assert run(batcher, 1, now=0.11) == []
    assert [part for part in batcher.held_by(0) if part.item == "huge"]
    assert [begin for _ in range(6) for _, begin, _ in run(batcher, 0, now=0.2)] == [*range(256, 1000, 128)]


def test_a_higher_level_goes_first_and_a_lower_one_catches_up_by_waiting():
    batcher = batcher_of(ageing_ms=100, max_batch_rows=0)
    batcher.add("low", 128, now=0.0, priority=3)
    batcher.add("high", 128, now=0.15, priority=1)
    batcher.add("default", 128, now=0.15)
    assert [run(batcher, now=0.15)[0][0] for _ in range(3)] == ["high", "low", "default"]


def test_dropping_forgets_queued_rows_and_those_bound_to_a_device():
    batcher = batcher_of()
    fill(batcher, ("a", 300), ("b", 10))
    assert run(batcher) == [("a", 0, 128)]
    assert batcher.drop("a")
    assert not batcher.drop("a")
    assert batcher.num_queued_rows == 10
    assert run(batcher) == [("b", 0, 10)]
    assert not batcher.drop("b")


def test_a_request_that_can_not_be_done_in_time_is_late_and_not_run():
    plan = plan_of(LADDER, lambda bucket: 1.0)
    batcher = batcher_of(plan)
    fill(batcher, ("a", 8), deadline=1.9)
    fill(batcher, ("b", 8), deadline=2.0)
    assert run(batcher, now=1.0) == [("b", 0, 8)]
    assert batcher.take_late() == ["a"]
    assert batcher.take_late() == []
    assert batcher.num_queued_rows == 0


def test_the_rest_of_a_split_request_is_not_run_late_either():
    plan = plan_of(LADDER, lambda bucket: 1.0)
    batcher = batcher_of(plan)
    fill(batcher, ("a", 300), deadline=3.5)
    assert run(batcher, now=0.0) == [("a", 0, 128)]
    assert run(batcher, now=2.0) == []  # two more runs would end at 4
    assert batcher.take_late() == ["a"]


def test_more_requests_than_a_bucket_holds_leave_none_of_it_empty():
    """Planned as one set of runs, a run of few first would look cheaper than it is."""
    ladder = BucketLadder(tuple(Bucket(rows, min(rows, 32)) for rows in (32, 512)))
    batcher = batcher_of(plan_of(ladder, lambda bucket: 3.0 if bucket.rows == 32 else 5.0))
    fill(batcher, *((str(number), 8) for number in range(48)))
    assert len(run(batcher)) == 32
    assert len(run(batcher)) == 16


def test_what_is_behind_many_late_requests_runs():
    batcher = batcher_of(plan_of(LADDER, lambda bucket: 1.0))
    for number in range(300):
        fill(batcher, (f"late {number}", 8), deadline=1.9)
    fill(batcher, ("in time", 8))
    assert run(batcher, now=1.0) == [("in time", 0, 8)]
    assert len(batcher.take_late()) == 300


def test_a_share_of_a_request_is_not_run_when_another_is_late():
    ladder = BucketLadder((Bucket(4, 1), Bucket(8, 1)))
    batcher = batcher_of(plan_of(ladder, lambda bucket: bucket.rows / 4), num_devices=2)
    fill(batcher, ("a", 9), deadline=1.5, spread_over=[0, 1])  # of 4 and 5 rows
    fill(batcher, ("b", 1))
    batcher.release(1)
    assert run(batcher) == [("b", 0, 1)]
    assert batcher.take_late() == ["a"]
    assert batcher.num_queued_rows == 0


LINEAR = plan_of(BucketLadder.of_rows((8, 64, 512)), lambda bucket: 0.5 + 0.02 * bucket.rows)


def test_nobody_is_merged_into_a_run_that_ends_after_their_deadline():
    batcher = batcher_of(LINEAR)
    fill(batcher, ("urgent", 8), deadline=3.0, priority=1)
    fill(batcher, *((f"{i}", 40) for i in range(12)))
    first = batcher.next_batch(0, 0.0)
    assert shapes(first)[0] == ("urgent", 0, 8)
    assert LINEAR.run_seconds(first.num_rows, len(first.parts)) <= 3.0
    assert len(run(batcher)) == 12


@pytest.mark.parametrize("deadline", [math.inf, 50.0])
def test_a_higher_level_goes_first_in_time_however_long_the_queue_of_lower_ones(deadline):
    batcher = batcher_of(LINEAR)
    fill(batcher, *((f"{i}", 40) for i in range(100)), priority=3, deadline=deadline)
    fill(batcher, ("urgent", 8), deadline=3.0, priority=1)
    first = batcher.next_batch(0, 0.0)
    assert shapes(first)[0] == ("urgent", 0, 8)
    assert LINEAR.run_seconds(first.num_rows, len(first.parts)) <= 3.0


def test_whoever_makes_a_run_longer_by_being_one_more_waits():
    """Merged at 2, of the same rows; alone it takes 1."""
    ladder = BucketLadder((Bucket(64, 1), Bucket(64, 8)))
    batcher = batcher_of(plan_of(ladder, lambda bucket: 1.0 if bucket.requests == 1 else 2.0))
    fill(batcher, ("urgent", 30), deadline=1.5)
    fill(batcher, ("bulk", 30))
    assert [run(batcher), run(batcher, now=1.0)] == [[("urgent", 0, 30)], [("bulk", 0, 30)]]
    assert batcher.take_late() == []


def test_shares_of_one_request_that_a_look_finds_late_make_no_run():
    ladder = BucketLadder((Bucket(2, 1), Bucket(2, 2), Bucket(8, 1), Bucket(8, 2)))
    prices = {(2, 1): 0.7, (2, 2): 0.7, (8, 1): 1.0, (8, 2): 1.4}
    batcher = batcher_of(plan_of(ladder, lambda bucket: prices[bucket.rows, bucket.requests]), num_devices=3)
    fill(batcher, ("first", 3), deadline=1.2)
    fill(batcher, ("spread", 7), deadline=0.9, spread_over=(0, 1, 2))
    fill(batcher, ("a", 1), ("b", 1), deadline=0.99)
    batcher.release(1)
    batcher.release(2)
    assert run(batcher) == [("first", 0, 3)]
    assert batcher.take_late() == ["spread"]
    assert [part.item for part in batcher.waiting()] == ["a", "b"]
    assert batcher.num_queued_rows == 2


def test_a_split_request_that_the_least_runs_finish_in_time_runs_at_once():
    """In runs of 3; one of 6 first ends 1% later, which is within what measurements differ by."""
    ladder = BucketLadder((Bucket(3, 1), Bucket(6, 1)))
    batcher = batcher_of(plan_of(ladder, lambda bucket: {3: 1.0, 6: 2.04}[bucket.rows]))
    looks = collections.Counter()

    def claims(part):
        looks[part.item] += 1
        return True

    fill(batcher, *((f"{number}", 12) for number in range(300)), deadline=4.01)
    assert run(batcher, claims=claims) == [("0", 0, 3)]
    assert looks["0"] == 1


def test_looks_are_bounded_where_each_leaves_one_out():
    """Each of these is in time alone, a little late with the one row, and larger than the one before it."""
    rows = range(1, 101)
    ladder = BucketLadder(tuple(Bucket(n, q) for n in rows for q in (1, 2) if q <= n))
    batcher = batcher_of(plan_of(ladder, lambda bucket: 100.0 + bucket.rows + bucket.requests))
    fill(batcher, ("bulk", 1))
    for number in rows[:80]:
        fill(batcher, (f"{number}", number), deadline=102.5 + number)
    looks = collections.Counter()

    def claims(part):
        looks[part.item] += 1
        return True

    assert run(batcher, claims=claims) == [("bulk", 0, 1)]
    assert 10 < looks["bulk"] <= 16
    assert batcher.take_late() == []


def test_of_a_long_queue_those_that_a_full_run_makes_late_are_left_out():
    batcher = batcher_of(LINEAR)
    fill(batcher, ("first", 8), ("second", 8), deadline=3.0)
    fill(batcher, *((f"{i}", 40) for i in range(40)), deadline=50.0)
    assert run(batcher) == [(f"{i}", 0, 40) for i in range(12)]
    assert batcher.take_late() == []  # another device may still come for them
    assert run(batcher, 1, now=0.1)[:2] == [(f"{i}", 0, 40) for i in range(12, 14)]
    batcher.expire(3.0)
    assert batcher.take_late() == ["first", "second"]


@pytest.mark.parametrize("a_request", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_what_comes_out_is_in_time_and_something_does_as_long_as_it_can_be(seed, a_request):
    rng = random.Random(seed)
    rows = sorted(rng.sample((4, 8, 16, 64, 128, 256), 3))
    ladder = BucketLadder(tuple(Bucket(n, q) for n in rows for q in (1, 2, 4, 8) if q <= n))
    fixed, slope = rng.uniform(0.1, 2), rng.uniform(0.001, 0.05)
    plan = plan_of(ladder, lambda bucket: fixed + slope * bucket.rows + a_request * bucket.requests)
    batcher, now, deadlines, ended = batcher_of(plan), 0.0, {}, {}
    for number in range(400):
        now += rng.expovariate(0.8)
        if rng.random() < 0.7 or batcher.num_queued_requests == 0:
            deadline = math.inf if rng.random() < 0.3 else now + rng.uniform(0.5, 4) * plan.knee_seconds
            deadlines[str(number)] = deadline
            fill(
                batcher,
                (str(number), rng.choice((rng.randint(1, 30), rng.randint(1, 300)))),
                now=now,
                deadline=deadline,
            )
            continue
        batch = batcher.next_batch(0, now)
        if batch is None:
            assert batcher.num_queued_requests == 0  # the rest was late
            continue
        now += plan.run_seconds(batch.num_rows, len(batch.parts))
        queued = {part.item for part in batcher.waiting()}
        for part in batch.parts:
            if part.item not in queued:
                ended[part.item] = now
    assert len(ended) > 10
    assert all(at <= deadlines[name] + 1e-9 for name, at in ended.items())


@pytest.mark.parametrize("seed", range(30))
def test_a_request_of_any_size_takes_what_its_plan_says(seed):
    """But for gains that are less than measurements differ by."""
    rng = random.Random(seed)
    rows = sorted(rng.sample(range(1, 300), 4))
    prices = sorted(rng.uniform(0.2, 3) for _ in rows)
    plan = plan_of(BucketLadder.of_rows(rows), lambda bucket: prices[rows.index(bucket.rows)])
    for num_rows in (rows[-1] // 2, rows[-1], 3 * rows[-1] + 1, 40 * rows[-1]):
        batcher, seconds = batcher_of(plan), 0.0
        fill(batcher, ("a", num_rows))
        while (batch := batcher.next_batch(0, 0.0)) is not None:
            seconds += plan.run_seconds(batch.num_rows, len(batch.parts))
        assert seconds <= plan.seconds(num_rows) / (1 - LEAST_GAIN) + 1e-9


def test_what_is_queued_past_its_deadline_expires_at_it():
    batcher = batcher_of()
    fill(batcher, ("a", 1), deadline=5.0)
    fill(batcher, ("b", 1), deadline=3.0)
    fill(batcher, ("c", 1))
    assert batcher.next_deadline == batcher.wake_at == 3.0
    batcher.expire(2.999)
    assert batcher.take_late() == []
    batcher.expire(3.0)
    assert batcher.wake_at == -math.inf  # somebody is to be told
    assert batcher.take_late() == ["b"]
    assert batcher.wake_at == 5.0
    batcher.drop("a")
    assert batcher.next_deadline == math.inf


def test_what_is_left_of_a_split_or_released_request_still_expires_at_its_deadline():
    batcher = batcher_of()
    fill(batcher, ("a", 300), deadline=5.0)
    fill(batcher, ("b", 4), spread_over=(0, 1), deadline=6.0)
    assert run(batcher, 0) == [("a", 0, 128)]
    assert batcher.next_deadline == 5.0  # what is bound to the device
    batcher.release(0)
    assert batcher.next_deadline == 5.0
    batcher.expire(6.0)
    assert batcher.take_late() == ["a", "b"]
    assert batcher.next_deadline == math.inf


def test_requests_that_are_answered_long_before_their_deadline_are_not_kept_for_it():
    batcher = batcher_of()
    asked = []
    for number in range(3000):
        asked.append(Named())
        batcher.add(asked[-1], 8, now=0.0, deadline=1e6 + number)
        assert batcher.next_batch(0, 0.0) is not None
    alive = [weakref.ref(item) for item in asked]
    asked.clear()
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0
    assert len(batcher._deadlines) < 1000


class Named:
    """Something that can be referred to weakly."""


def test_spread_gives_every_device_its_share_and_nobody_elses():
    batcher = batcher_of()
    fill(batcher, ("a", 10), spread_over=(0, 1, 2))
    fill(batcher, ("b", 2), spread_over=(0, 1, 2))
    assert run(batcher, 2) == [("a", 6, 10)]
    assert run(batcher, 0) == [("a", 0, 3), ("b", 0, 1)]
    assert run(batcher, 1) == [("a", 3, 6), ("b", 1, 2)]


def test_what_a_lost_device_was_bound_to_runs_elsewhere():
    batcher = batcher_of()
    fill(batcher, ("a", 300))
    fill(batcher, ("b", 4), spread_over=(0, 1))
    assert run(batcher, 0) == [("a", 0, 128)]
    batcher.release(0)
    assert batcher.num_queued_rows == 300 - 128 + 4
    taken = [part for _ in range(4) for part in run(batcher, 1)]
    assert sorted(taken) == [("a", 128, 256), ("a", 256, 300), ("b", 0, 2), ("b", 2, 4)]


def test_a_device_takes_only_what_it_claims():
    batcher = batcher_of()
    fill(batcher, ("a", 1), ("b", 1), ("c", 1))
    assert run(batcher, claims=lambda part: part.item != "b") == [("a", 0, 1), ("c", 0, 1)]
    assert run(batcher, claims=lambda part: part.item != "b") == []


KNEE = plan_of(BucketLadder.of_rows((8, 32)), lambda bucket: 1e-3 + 1e-5 * bucket.rows)


@pytest.mark.parametrize("max_defer_ms", [0.0, 10.0])
def test_a_free_device_defers_only_if_it_may_and_only_under_high_load(max_defer_ms):
    batcher = batcher_of(KNEE, max_defer_ms=max_defer_ms)
    fill(batcher, ("first", 1), now=10.0)
    assert run(batcher, now=10.0) == [("first", 0, 1)]  # load is low: a lone request never waits
    for i in range(1000):  # more than a second of device time a second
        fill(batcher, (f"r{i}", 30), now=10.0)
        assert run(batcher, now=10.0) == [(f"r{i}", 0, 30)] or max_defer_ms
        batcher.drop(f"r{i}")
    fill(batcher, ("a", 4), now=10.0)
    if not max_defer_ms:
        assert run(batcher, now=10.0) == [("a", 0, 4)]
        return
    assert run(batcher, now=10.0) == []
    assert batcher.deferred_until == pytest.approx(10.0 + KNEE.knee_seconds)
    fill(batcher, ("b", 28), now=10.0)  # the knee is reached
    assert run(batcher, now=10.0) == [("a", 0, 4), ("b", 0, 28)]
    fill(batcher, ("c", 4), now=10.0)
    assert run(batcher, now=10.0) == []
    assert run(batcher, now=batcher.deferred_until) == [("c", 0, 4)]


def test_deferring_makes_nothing_late():
    batcher = batcher_of(KNEE, max_defer_ms=10.0)
    for i in range(1000):
        fill(batcher, (f"r{i}", 30), now=10.0)
        batcher.drop(f"r{i}")
    deadline = 10.0 + 1.25 * KNEE.knee_seconds
    fill(batcher, ("a", 4), now=10.0, deadline=deadline)
    assert run(batcher, now=10.0) == []
    assert batcher.deferred_until == pytest.approx(deadline - KNEE.knee_seconds)


def test_what_is_ahead_of_a_request_depends_on_its_level():
    batcher = batcher_of(ageing_ms=100)
    fill(batcher, ("a", 100), ("b", 50))
    assert batcher.seconds_ahead(0.0, 2) == batcher.queued_seconds > 0
    assert batcher.seconds_ahead(0.0, 1) == pytest.approx(0.0)
    assert batcher.seconds_ahead(0.2, 1) == batcher.queued_seconds  # they have aged


def test_equal_levels_are_peers_though_times_are_rounded():
    """0.1 s later than one time is an ulp more than 0.1 s later than another."""
    for came in (0.3, 7.9, 8.1, 1e6 + 0.7):
        batcher = batcher_of(UNEVEN, max_skip_ms=1e9, ageing_ms=100)
        for place in range(3):
            fill(batcher, (f"r{place}", 20), now=came + place / 7)
        assert len({part.ticket.head_start for part in batcher.waiting()}) == 1
        assert len(run(batcher, now=came + 1)) == 3


def test_a_request_without_rows_is_refused():
    with pytest.raises(BucketError, match="expected a request of at least one row, got 0"):
        batcher_of().add("a", 0, now=0.0)


def price(bucket):
    """Some plans merge, some split; requests cost a little."""
    return 1 + bucket.rows / 16 + bucket.requests / 64


@pytest.mark.parametrize("seed", range(25))
def test_every_row_runs_once_in_order_on_one_device_and_no_device_idles(seed):
    rng = random.Random(seed)
    rows = sorted(rng.sample((1, 4, 8, 16, 32, 64, 128), rng.randint(1, 4)))
    batcher = batcher_of(plan_of(BucketLadder.of_rows(rows), price), max_skip_ms=rng.choice((0, 3, 1000)))
    sizes, runs, dropped, now = {}, collections.defaultdict(list), set(), 0.0
    places: dict[str, tuple[float, int]] = {}  # of what still has rows queued
    for step in range(300):
        now += rng.random() / 100
        event = rng.random()
        if event < 0.5:
            sizes[f"r{step}"] = rng.choice((1, 1, 3, 10, 50, 200))
            level = rng.randint(1, 4)
            places[f"r{step}"] = (now + (level - 1) * batcher.config.ageing_ms / 1e3, step)
            batcher.add(f"r{step}", sizes[f"r{step}"], now=now, priority=level)
        elif event < 0.55 and sizes:
            name = rng.choice(list(sizes))
            if batcher.drop(name):
                dropped.add(name)
                del places[name]
        else:
            note(batcher, rng.randrange(3), now, runs, sizes, places)
    while batcher.num_queued_requests:
        assert max(note(batcher, device, now, runs, sizes, places) for device in range(3))
    assert not places
    assert batcher.num_queued_rows == 0
    assert batcher.queued_seconds == pytest.approx(0.0)
    for name, size in sizes.items():
        parts = runs[name]
        assert len({device for device, _, _ in parts}) <= 1
        ends = [0, *(end for _, _, end in parts)]
        assert [begin for _, begin, _ in parts] == ends[:-1]
        assert name in dropped or ends[-1] == size


def note(batcher, device, now, runs, sizes, places):
    """Runs a batch on a device; checks it: what has the first place of all that may run there is in it, and
    there is none only where nothing may."""
    batch = batcher.next_batch(device, now)
    mine = [name for name in places if not runs[name] or runs[name][0][0] == device]
    if batch is None:
        assert not mine
        return False
    assert batch.parts[0].item == min(mine, key=places.__getitem__)
    assert batch.bucket.holds(batch.num_rows, len(batch.parts))
    assert len({part.item for part in batch.parts}) == len(batch.parts)
    for part in batch.parts:
        runs[part.item].append((device, part.begin, part.end))
        if part.end == sizes[part.item]:
            del places[part.item]
    return True


def test_a_waiting_request_is_overtaken_for_no_longer_than_it_must_be():
    batcher = batcher_of(max_skip_ms=2)
    fill(batcher, ("first", 100))
    fill(batcher, ("wide", 60), now=0.0)
    overtaken = 0
    for step in range(50):
        now = step * 1e-3
        fill(batcher, (f"s{step}", 20), now=now)
        batch = run(batcher, now=now)
        if any(item == "wide" for item, _, _ in batch):
            break
        overtaken += sum(item.startswith("s") for item, _, _ in batch)
    assert now <= 3e-3
    assert overtaken <= 3
