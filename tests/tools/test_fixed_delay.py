"""Triton's rule and one request a batch, by hand, in the scheduler and on the simulator's clock."""

import math
import sys

import numpy as np
import pytest
import queue_server
from fixed_delay import FixedDelayBatcher, fixed_delay
from queue_server import OURS, batcher_of
from serving_lab import arrivals_of, mixed_sizes, run_simulation

from xlarank.errors import BucketError, ConfigError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.simulation import Arrival
from xlarank.spec import Bucket, BucketLadder, LatencyProfile

DELAY = 0.005


def plan_of(*rows, seconds=1e-3):
    buckets = tuple(sorted({Bucket(n, q) for n in rows for q in (1, n)}))
    profile = LatencyProfile({bucket: seconds * bucket.rows for bucket in buckets})
    return BucketPlan(BucketLadder(buckets), profile, seconds_a_run=0.0)


def plan_by(seconds, rows=(8, 16, 64, 128, 256, 512)):
    """With `seconds(rows)`."""
    ladder = BucketLadder.of_rows(rows)
    return BucketPlan(ladder, LatencyProfile({bucket: seconds(bucket.rows) for bucket in ladder.buckets}))


def queue(plan=None, **options):
    return FixedDelayBatcher(plan or plan_of(8), **{"delay_us": DELAY * 1e6} | options)


def items(batch):
    return [part.item for part in batch.parts]


def test_a_lone_request_waits_for_the_delay():
    batcher = queue()
    batcher.add("a", 3, now=1.0)
    assert batcher.next_batch(0, 1.0) is None
    assert batcher.deferred_until == 1.0 + DELAY
    assert batcher.next_batch(0, 1.0 + DELAY / 2) is None
    batch = batcher.next_batch(0, batcher.deferred_until)
    assert items(batch) == ["a"]
    assert batch.bucket == Bucket(8, 1)
    assert batcher.num_queued_requests == batcher.num_queued_rows == 0
    assert batcher.deferred_until == batcher.wake_at == math.inf


def test_a_full_batch_and_one_that_the_next_does_not_fit_go_at_once():
    batcher = queue()
    for name, rows in (("a", 5), ("b", 3), ("c", 6), ("d", 3), ("e", 1)):
        batcher.add(name, rows, now=0.0)
    assert items(batcher.next_batch(0, 0.0)) == ["a", "b"]
    assert items(batcher.next_batch(0, 0.0)) == ["c"]  # d doesn't fit, and e doesn't go ahead of it
    assert batcher.next_batch(0, 0.0) is None
    assert items(batcher.next_batch(0, DELAY)) == ["d", "e"]


def test_the_oldest_request_ends_the_delay():
    batcher = queue()
    batcher.add("a", 1, now=0.0)
    batcher.add("b", 1, now=DELAY * 0.9)
    assert items(batcher.next_batch(0, DELAY)) == ["a", "b"]


def test_a_higher_level_comes_first_and_without_a_delay_nothing_waits():
    batcher = queue(delay_us=0)
    batcher.add("a", 6, now=0.0, priority=3)
    batcher.add("b", 6, now=0.1, priority=1)
    assert batcher.seconds_ahead(0.1, 2) == pytest.approx(8e-3)
    assert items(batcher.next_batch(0, 0.1)) == ["b"]
    assert items(batcher.next_batch(0, 0.1)) == ["a"]


def test_requests_leave_the_queue_unrun():
    batcher = queue()
    batcher.add("a", 1, now=0.0, deadline=0.001)
    batcher.add("b", 1, now=0.0)
    batcher.add("c", 1, now=0.0)
    assert batcher.drop("c")
    assert not batcher.drop("c")
    assert batcher.next_deadline == 0.001
    batcher.expire(0.002)
    assert batcher.wake_at == -math.inf
    assert batcher.take_late() == ["a"]
    assert batcher.take_late() == []
    assert [part.item for part in batcher.waiting()] == ["b"]
    assert batcher.queued_seconds == pytest.approx(1e-3)
    assert batcher.clear() == ["b"]
    with pytest.raises(BucketError, match=r"expected a request of 1 to 8 rows, got 9; this rule splits none"):
        batcher.add("d", 9, now=0.0)


def test_the_simulator_runs_it():
    plan = plan_of(8)  # a run takes 8 ms
    arrivals = [Arrival(0.0, 2), Arrival(0.001, 2), Arrival(0.02, 8)]
    held = run_simulation(plan, arrivals, make_batcher=fixed_delay(DELAY * 1e6))
    np.testing.assert_allclose(held.latencies, [0.013, 0.012, 0.008])
    ours = run_simulation(plan, arrivals)
    np.testing.assert_allclose(ours.latencies, [0.008, 0.015, 0.008])


@pytest.mark.parametrize("load", [0.5, 0.8, 0.95])
def test_ours_has_the_lower_p99_where_requests_fill_the_knee_s_buckets_badly(load):
    """167 rows on average, a knee of 256, where one wastes a third: Triton's rule takes three in 512."""
    plan = plan_by(lambda rows: 0.2e-3 + 8e-6 * rows)
    assert plan.knee_rows == 256
    traffic = mixed_sizes()
    arrivals, _ = arrivals_of(traffic, load * 535, 2000, seed=1)
    p99 = {
        rule: run_simulation(plan, arrivals, make_batcher=batcher_of(rule)).latency(0.99)
        for rule in (OURS, "500", "5000")
    }
    assert p99[OURS] < 0.95 * min(p99["500"], p99["5000"])


def test_threads_of_the_server_to_compare_with_take_turns_as_short_as_the_product_s(monkeypatch):
    seen = []

    def configure(**_):
        seen.append(sys.getswitchinterval())
        raise ConfigError("enough")

    monkeypatch.setattr(queue_server.device, "configure", configure)
    monkeypatch.setattr(sys, "argv", ["queue_server.py", "bundle", "--compile-cache", "cache"])
    with pytest.raises(ConfigError, match="enough"):
        queue_server.main()
    assert seen == [pytest.approx(5e-4)]
