"""The batcher's contract, by hand and by property; no threads, no clock."""

import collections
import random

import pytest

from xlarank.errors import BucketError
from xlarank.runtime.batcher import Batch, Batcher, Part
from xlarank.spec import Bucket, BucketLadder

LADDER = BucketLadder.of_rows((8, 32, 128))


def shapes(batch: Batch) -> list[tuple[str, int, int]]:
    return [(part.item, part.begin, part.end) for part in batch.parts]


def test_nothing_queued_gives_no_batch():
    assert Batcher(LADDER).next_batch("cpu:0") is None


def test_a_lone_request_runs_at_once_in_the_smallest_bucket_that_holds_it():
    batcher: Batcher[str] = Batcher(LADDER)
    batcher.add("a", 9)
    assert batcher.num_queued_rows == 9
    batch = batcher.next_batch("cpu:0")
    assert batch == Batch(Bucket(32, 1), (Part("a", 0, 9),))
    assert batch.num_rows == 9
    assert batcher.num_queued_rows == batcher.num_queued_requests == 0


def test_queued_requests_share_a_batch_in_the_order_they_came():
    batcher: Batcher[str] = Batcher(LADDER)
    for name, rows in (("a", 3), ("b", 4), ("c", 20), ("d", 100), ("e", 1)):
        batcher.add(name, rows)
    first = batcher.next_batch(0)
    assert shapes(first) == [("a", 0, 3), ("b", 0, 4), ("c", 0, 20), ("d", 0, 100), ("e", 0, 1)]
    assert first.bucket == Bucket(128, 128)
    assert batcher.next_batch(0) is None


def test_a_request_that_does_not_fit_waits_whole_for_the_next_batch():
    batcher: Batcher[str] = Batcher(LADDER)
    batcher.add("a", 100)
    batcher.add("b", 60)
    assert shapes(batcher.next_batch(0)) == [("a", 0, 100)]
    assert shapes(batcher.next_batch(1)) == [("b", 0, 60)]


def test_batches_stop_growing_at_the_knee_but_one_request_may_pass_it():
    batcher: Batcher[str] = Batcher(LADDER, max_batch_rows=32)
    for name, rows in (("a", 20), ("b", 12), ("c", 1), ("d", 90)):
        batcher.add(name, rows)
    assert shapes(batcher.next_batch(0)) == [("a", 0, 20), ("b", 0, 12)]
    assert shapes(batcher.next_batch(0)) == [("c", 0, 1)]
    batch = batcher.next_batch(0)
    assert shapes(batch) == [("d", 0, 90)]
    assert batch.bucket == Bucket(128, 1)


def test_requests_are_counted_as_well_as_rows():
    batcher: Batcher[int] = Batcher(BucketLadder((Bucket(8, 2), Bucket(64, 3))))
    for item in range(5):
        batcher.add(item, 1)
    first = batcher.next_batch(0)
    assert [part.item for part in first.parts] == [0, 1, 2]
    assert first.bucket == Bucket(64, 3)
    second = batcher.next_batch(0)
    assert [part.item for part in second.parts] == [3, 4]
    assert second.bucket == Bucket(8, 2)


def test_a_large_request_is_split_on_one_device_and_its_tail_takes_company():
    batcher: Batcher[str] = Batcher(LADDER)
    batcher.add("big", 300)
    batcher.add("a", 10)
    assert shapes(batcher.next_batch(0)) == [("big", 0, 128)]
    assert shapes(batcher.next_batch(1)) == [("a", 0, 10)], "another device takes the next request"
    assert batcher.next_batch(1) is None, "the rest of big stays with device 0"
    assert batcher.num_queued_rows == 172
    assert batcher.num_queued_requests == 1
    assert shapes(batcher.next_batch(0)) == [("big", 128, 256)]
    batcher.add("b", 5)
    assert shapes(batcher.next_batch(0)) == [("big", 256, 300), ("b", 0, 5)]


def test_dropping_forgets_queued_rows_and_those_bound_to_a_device():
    batcher: Batcher[str] = Batcher(LADDER)
    batcher.add("big", 300)
    batcher.add("a", 10)
    batcher.next_batch(0)
    assert batcher.drop("big")
    assert not batcher.drop("big")
    assert batcher.num_queued_rows == 10
    assert shapes(batcher.next_batch(0)) == [("a", 0, 10)]


@pytest.mark.parametrize("limit", [0, 129])
def test_a_limit_that_no_bucket_holds_is_refused(limit):
    with pytest.raises(BucketError, match=rf"max_batch_rows must be in \[1, 128\]; was {limit}"):
        Batcher(LADDER, max_batch_rows=limit)


def test_a_request_without_rows_is_refused():
    with pytest.raises(BucketError, match="at least one row, got 0"):
        Batcher(LADDER).add("a", 0)


@pytest.mark.parametrize("seed", range(30))
def test_every_row_runs_once_in_order_on_one_device_and_no_device_idles(seed):
    rng = random.Random(seed)
    rows = sorted(rng.sample((1, 2, 8, 16, 64, 100, 256), rng.randint(1, 4)))
    ladder = BucketLadder.of_rows(rows)
    batcher: Batcher[int] = Batcher(ladder, max_batch_rows=rng.randint(1, ladder.max_rows))
    sizes: dict[int, int] = {}
    done: dict[int, int] = collections.defaultdict(int)
    devices: dict[int, set[int]] = collections.defaultdict(set)
    order: list[int] = []
    left = rng.randint(1, 60)
    while left or batcher.num_queued_rows:
        if left and rng.random() < 0.6:
            item = len(sizes)
            sizes[item] = rng.randint(1, 3 * ladder.max_rows)
            batcher.add(item, sizes[item])
            left -= 1
            continue
        device = rng.randrange(3)
        was_queued = {item for item, size in sizes.items() if done[item] == 0 and size}
        batch = batcher.next_batch(device)
        if batch is None:
            assert not was_queued, "a free device idles only when no request is waiting to start"
            continue
        assert batch.bucket.holds(batch.num_rows, len(batch.parts))
        assert ladder.bucket_for(batch.num_rows, len(batch.parts)) == batch.bucket
        assert len({part.item for part in batch.parts}) == len(batch.parts)
        for part in batch.parts:
            assert part.begin == done[part.item]
            assert part.num_rows > 0
            done[part.item] = part.end
            devices[part.item].add(device)
            if part.begin == 0:
                order.append(part.item)
    assert dict(done) == sizes
    assert order == sorted(order), "requests start in the order they came"
    assert all(len(used) == 1 for used in devices.values()), "a request runs whole on one device"
