"""The simulator: against closed forms of queueing theory, and by hand."""

import math

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.scheduler import Scheduler
from xlarank.runtime.simulation import Arrival, poisson_arrivals, simulate
from xlarank.spec import Bucket, BucketLadder, LatencyProfile
from xlarank.spec.serving import QueueConfig


def plan_of(buckets, seconds, **options):
    ladder = BucketLadder(tuple(sorted(buckets)))
    profile = LatencyProfile({bucket: seconds(bucket) for bucket in buckets})
    return BucketPlan(ladder, profile, **{"seconds_a_run": 0.0} | options)


def scheduler_of(plan, num_devices=1, **config):
    scheduler = Scheduler(num_devices)
    queue = scheduler.attach("feed", [plan] * num_devices, QueueConfig(**{"max_queue_ms": 1e9} | config))
    return scheduler, [queue]


def ones(rng, count):
    return np.ones(count, np.int64)


ALPHA, TAU = 1.0, 2.0
EVERY_SIZE = plan_of(
    [Bucket(n, n) for n in range(1, 257)], lambda bucket: ALPHA * bucket.rows + TAU, max_batch_rows=256
)


def inoue(load):
    """Mean latency where a free server takes all that waits and a batch of b takes ALPHA b + TAU: an upper
    bound that is nearly reached (Inoue 2019, arXiv 1912.06322)."""
    rate = load / ALPHA
    low = (ALPHA + TAU) / (2 * (1 - load)) * (1 + 2 * rate * TAU + (1 - rate * TAU) / (1 + load))
    high = 1.5 * TAU / (1 - load) + ALPHA / 2 * (load + 2) / (1 - load**2)
    return min(low, high)


@pytest.mark.parametrize("load", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_mean_latency_agrees_with_inoues_closed_form(load):
    means = []
    for seed in range(3):
        arrivals = poisson_arrivals(load / ALPHA, ones, 6000, seed=seed)
        means.append(simulate(*scheduler_of(EVERY_SIZE), arrivals).mean_latency)
    assert np.mean(means) == pytest.approx(inoue(load), rel=0.1)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_without_batching_it_is_an_m_d_1_queue(load):
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) of a service time."""
    plan = plan_of([Bucket(1, 1)], lambda bucket: 1.0)
    arrivals = poisson_arrivals(load, ones, 20_000, seed=1)
    result = simulate(*scheduler_of(plan), arrivals)
    assert result.mean_latency == pytest.approx(1 + load / (2 * (1 - load)), rel=0.08)
    assert result.utilisation == pytest.approx(load, rel=0.03)
    assert result.padding_share == 0


def test_gaps_are_exponential_and_a_rate_must_be_one():
    times = np.array([arrival.at for arrival in poisson_arrivals(50.0, ones, 20_000, seed=2)])
    gaps = np.sort(np.diff(times, prepend=0.0))
    expected = 1 - np.exp(-50.0 * gaps)  # Kolmogorov and Smirnov: the distance at a level of 0.1%
    assert np.abs(expected - (np.arange(len(gaps)) + 0.5) / len(gaps)).max() < 1.95 / math.sqrt(len(gaps))
    with pytest.raises(ConfigError, match=r"simulation: rate must be > 0; was 0"):
        poisson_arrivals(0, ones, 1)


def test_by_hand():
    """Two devices, rows of a second each four at a time: latencies, padding, throughput and goodput."""
    plan = plan_of([Bucket(4, 4)], lambda bucket: 1.0)
    arrivals = [Arrival(0.0, 4), Arrival(0.0, 4), Arrival(0.5, 1), Arrival(0.5, 2), Arrival(0.5, 6)]
    result = simulate(*scheduler_of(plan, 2, max_skip_ms=0), arrivals)
    # At 1 one device takes the small two, the other the first 4 rows of the large one, and at 2 its last 2.
    np.testing.assert_allclose(result.latencies, [1.0, 1.0, 1.5, 1.5, 2.5])
    assert result.seconds == 3.0
    assert result.num_batches == 5
    assert result.padding_share == pytest.approx(3 / 20)
    assert result.rows_a_second == pytest.approx(17 / 3)
    assert result.requests_a_second == pytest.approx(5 / 3)
    assert result.goodput(1.5) == pytest.approx(4 / 3)
    assert result.latency(0.5) == 1.5
    assert result.utilisation == pytest.approx(5 / 6)


def test_rows_of_a_request_that_is_dropped_later_are_no_padding():
    """Four rows run, for longer than was predicted; the other two are late before the device is free."""
    plan = plan_of([Bucket(4, 4)], lambda bucket: 1.0)
    arrivals = [Arrival(0.0, 6, timeout=2.5)]
    result = simulate(*scheduler_of(plan), arrivals, service_seconds=lambda turn: 3.0)
    assert (result.num_late, result.num_batches, result.num_rows_run) == (1, 1, 4)
    assert result.num_candidates_run == 4
    assert result.padding_share == 0


def test_refused_and_late_requests_are_counted_and_have_no_latency():
    plan = plan_of([Bucket(1, 1)], lambda bucket: 1.0)
    arrivals = [
        Arrival(0.0, 1),
        Arrival(0.1, 1, timeout=3.0),
        Arrival(0.2, 1, timeout=2.0),  # would finish at 3
        Arrival(0.3, 3, timeout=5.0, priority=1),  # goes before the second, which is late then
    ]
    result = simulate(*scheduler_of(plan, ageing_ms=1000), arrivals)
    np.testing.assert_allclose(result.latencies, [1.0, math.nan, math.nan, 3.7])
    assert (result.num_refused, result.num_late) == (1, 1)


def test_overhead_comes_before_the_queue_and_in_each_latency():
    plan = plan_of([Bucket(1, 1)], lambda bucket: 1.0)
    arrivals = [Arrival(0.0, 1), Arrival(0.5, 1, timeout=2.4), Arrival(0.6, 1, timeout=5.0)]
    result = simulate(*scheduler_of(plan), arrivals, overhead_seconds=1.0)
    np.testing.assert_allclose(result.latencies, [2.0, math.nan, 2.4])  # the second would have needed 2.5
    slowed = simulate(*scheduler_of(plan), arrivals, service_seconds=lambda turn: 2 * turn.predicted_seconds)
    np.testing.assert_allclose(slowed.latencies, [2.0, math.nan, 3.4])


def test_nothing_arrives():
    result = simulate(*scheduler_of(EVERY_SIZE), [])
    assert math.isnan(result.mean_latency)
    assert math.isnan(result.latency(0.99))
    assert result.padding_share == 0


def test_deferring_ends_by_itself():
    plan = plan_of([Bucket(1, 1), Bucket(8, 8)], lambda bucket: 0.3 + 0.0875 * (bucket.rows - 1))
    arrivals = poisson_arrivals(7.0, ones, 500, seed=3)
    greedy = simulate(*scheduler_of(plan), arrivals)
    deferred = simulate(*scheduler_of(plan, max_defer_ms=2000), arrivals)
    assert deferred.is_answered.all()
    assert deferred.num_batches < greedy.num_batches
    assert deferred.padding_share < greedy.padding_share


@pytest.mark.parametrize("num_devices", [1, 3])
@pytest.mark.parametrize("load", [1.2, 3.0])
@pytest.mark.parametrize("slow", [1.0, 2.0])
def test_beyond_capacity_requests_with_deadlines_are_answered_as_fast_as_without(load, num_devices, slow):
    """Nothing is run for an answer that comes too late, and runs are full all the same: also where
    they all take longer than their bucket was measured to, once that is learnt."""
    plan = plan_of(
        [Bucket(rows, min(rows, 64)) for rows in (8, 64, 512)], lambda bucket: 0.0005 + 2e-5 * bucket.rows
    )
    timeout = 5 * plan.knee_seconds * slow
    rng = np.random.default_rng(0)
    sizes = rng.choice([8, 16, 40], 6000)
    gaps = rng.exponential(slow * plan.seconds_a_row * sizes.mean() / (load * num_devices), len(sizes))
    arrivals = [
        Arrival(at, int(rows), timeout=timeout) for at, rows in zip(gaps.cumsum(), sizes, strict=True)
    ]
    result = simulate(
        *scheduler_of(plan, num_devices), arrivals, service_seconds=lambda turn: slow * turn.predicted_seconds
    )
    late = result.latencies > timeout + 1e-9
    assert late.mean() <= (0.0 if slow == 1.0 else 0.03)
    num_rows = sizes[result.is_answered & ~late].sum()
    assert num_rows * slow * plan.seconds_a_row / num_devices >= 0.9 * gaps.sum()


def test_a_device_that_has_become_slow_gets_what_it_can_do_in_time_alone():
    plan = plan_of([Bucket(rows, 1) for rows in (8, 64, 512)], lambda bucket: 0.0005 + 2e-5 * bucket.rows)
    timeout = 3 * plan.seconds(500)
    sizes = [500] * 4000
    gaps = np.random.default_rng(0).exponential(plan.seconds(500) / (0.3 * 4), len(sizes))
    arrivals = [Arrival(at, 500, timeout=timeout) for at in gaps.cumsum()]

    def taken(turn):
        return turn.predicted_seconds * (10.0 if turn.device == 0 else 1.0)

    result = simulate(*scheduler_of(plan, 4), arrivals, service_seconds=taken)
    assert result.is_answered.mean() > 0.99
    assert (result.latencies > timeout).mean() < 0.01  # until it is known, and each time that this has faded


def test_a_request_that_one_kind_of_device_can_answer_in_time_is_left_to_it():
    """One is the fastest by the row, and slower than the other where rows are few."""
    wide = plan_of([Bucket(8, 8), Bucket(512, 64)], lambda b: {8: 0.003, 512: 0.005}[b.rows])
    quick = plan_of([Bucket(8, 8), Bucket(512, 64)], lambda b: {8: 0.001, 512: 0.041}[b.rows])
    scheduler = Scheduler(2)
    queue = scheduler.attach("feed", [wide, quick], QueueConfig())
    arrivals = poisson_arrivals(200, ones, 1000, options=lambda _: {"timeout": 0.0025})
    result = simulate(scheduler, [queue], arrivals)
    assert result.is_answered.mean() > 0.97
