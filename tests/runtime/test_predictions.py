"""What the scheduler expects runs to take, learnt from those that were, and that no mistake in it lasts."""

import contextlib
import random

import pytest

from xlarank.errors import DeadlineError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.scheduler import Scheduler
from xlarank.runtime.slowdown import Slowdown
from xlarank.spec import BucketLadder, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

LADDER = BucketLadder.of_rows((8, 32))


def plan_of(seconds, small_seconds=None):
    """A run of 32 rows takes so long, one of 8 a quarter."""
    times = {8: seconds / 4 if small_seconds is None else small_seconds, 32: seconds}
    profile = LatencyProfile({bucket: times[bucket.rows] for bucket in LADDER.buckets})
    return BucketPlan(LADDER, profile, seconds_a_run=0.0, max_batch_rows=32)


def scheduler_of(*plans):
    """A scheduler of one device and models with these plans, and their queues."""
    scheduler = Scheduler(1)
    config = QueueConfig(max_queue_ms=1e6)
    return scheduler, *(scheduler.attach(f"model{i}", [plan], config) for i, plan in enumerate(plans))


def run(scheduler, queue, seconds, now, *, rows=32, timeout=float("inf"), is_bad=False):
    """A request that comes to an idle device and takes so long; when it has ended."""
    scheduler.submit(queue, object(), rows, RequestOptions(deadline=now + timeout), now)
    turn = scheduler.next_turn(0, now)
    scheduler.finished(turn, now + seconds)
    if is_bad:
        turn = scheduler.retry(turn, 0, now + seconds)
        scheduler.finished(turn, now + 100 * seconds)
    return now + seconds


def expected(scheduler, queue, now, rows=32):
    """Seconds from now until the request that runs now is expected to end."""
    scheduler.submit(queue, object(), rows, RequestOptions(), now)
    scheduler.next_turn(0, now)
    return scheduler.predicted_start(queue, now) - now


def test_predictions_learn_from_what_runs_took():
    scheduler, queue = scheduler_of(plan_of(1.0))
    now = 0.0
    for _ in range(60):
        now = run(scheduler, queue, 2.0, now)
    assert expected(scheduler, queue, now) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("slower", [30.0, 1 / 30])
def test_a_device_that_has_become_much_slower_or_faster_is_believed(slower):
    scheduler, queue = scheduler_of(plan_of(1.0))
    now = 0.0
    for i in range(120):
        now = run(scheduler, queue, slower, now)
        if i == 0:  # one odd run moves predictions little
            assert 0.9 < scheduler.use_of(0, now)[2] < 1.4
    assert expected(scheduler, queue, now) == pytest.approx(slower, rel=0.1)


def test_after_a_slow_spell_requests_with_deadlines_are_let_in_again():
    """Nothing runs while all are refused, so nothing else could teach that the device is fast again."""
    scheduler, queue = scheduler_of(plan_of(3e-3))
    now = 0.0

    def answered(seconds, count):
        """How many of so many requests, one each tenth of a second, are let in; they take so long."""
        nonlocal now
        num_answered = 0
        for _ in range(count):
            now += 0.1
            with contextlib.suppress(DeadlineError):
                now = run(scheduler, queue, seconds, now, timeout=0.1)
                num_answered += 1
        return num_answered

    assert 5 < answered(0.15, 200) < 70  # believed within tens of runs; then one in five is tried
    assert 1 < answered(0.15, 600) < 150
    answered(3e-3, 200)  # fast again
    assert answered(3e-3, 100) == 100


def test_a_model_whose_runs_take_longer_than_priced_says_nothing_of_another():
    scheduler, light, heavy = scheduler_of(plan_of(2e-4), plan_of(30e-3))
    now = 0.0
    for i in range(400):
        queue, seconds = (heavy, 31e-3) if i % 20 == 0 else (light, 1.5e-3)
        now = run(scheduler, queue, seconds, now + 0.01, timeout=0.1)
    assert expected(scheduler, heavy, now) == pytest.approx(31e-3, rel=0.02)


def test_small_runs_that_take_long_for_the_hosts_sake_do_not_close_the_door_to_large_ones():
    """Each run takes 32 ms beside its price; four times the small ones' ratio would be too late."""
    scheduler, queue = scheduler_of(plan_of(30e-3, small_seconds=8e-3))
    now = 0.0
    for _ in range(400):
        now = run(scheduler, queue, 40e-3, now + 0.01, rows=8)
    now = run(scheduler, queue, 62e-3, now + 0.01, timeout=0.1)
    assert expected(scheduler, queue, now) == pytest.approx(62e-3, rel=0.1)


@pytest.mark.parametrize("rows", [64, 32 * 40])
def test_a_request_of_many_runs_takes_longer_by_as_much_as_each_of_them(rows):
    """Runs of one size alone have come: none says what a run of a greater price would take."""
    scheduler, queue = scheduler_of(plan_of(10e-3))
    now = 0.0
    for _ in range(100):
        now = run(scheduler, queue, 20e-3, now)
    seconds = 20e-3 * rows / 32
    scheduler.submit(queue, "in time", rows, RequestOptions(deadline=now + 1.05 * seconds), now)
    assert queue.batcher.drop("in time")
    with pytest.raises(DeadlineError, match=rf"would come in {1e3 * seconds:.0f}\.\d ms, the deadline is in"):
        scheduler.submit(queue, "late", rows, RequestOptions(deadline=now + 0.9 * seconds), now)


def test_a_request_of_many_runs_that_turns_out_to_be_late_is_given_up_at_the_first():
    """Else each of its runs is in vain, and keeps others waiting."""
    scheduler, queue = scheduler_of(plan_of(10e-3))
    now = 0.0
    scheduler.submit(queue, "large", 32 * 40, RequestOptions(deadline=0.6), now)  # 0.4 s, by the prices
    num_runs = 0
    while (turn := scheduler.next_turn(0, now)) is not None:
        now += 30e-3
        scheduler.finished(turn, now)
        num_runs += 1
    assert scheduler.take_late(now) == [(queue, "large")]
    assert num_runs < 10


def test_a_deadline_that_has_passed_is_told_as_such():
    scheduler, queue = scheduler_of(plan_of(10e-3))
    with pytest.raises(DeadlineError, match=r"in 10\.0 ms, the deadline passed 250\.0 ms ago"):
        scheduler.submit(queue, "late", 32, RequestOptions(deadline=0.75), 1.0)


def test_the_search_for_what_is_at_fault_teaches_nothing():
    scheduler, queue = scheduler_of(plan_of(3e-3))
    now = 0.0
    for _ in range(100):
        now = run(scheduler, queue, 3e-3, now, is_bad=True)
    assert expected(scheduler, queue, now) == pytest.approx(3e-3, rel=0.01)


@pytest.mark.parametrize(("base", "slope"), [(0.0, 1.0), (0.0, 3.0), (5.0, 1.0), (0.0, 0.5)])
def test_runs_of_several_prices_tell_what_greater_ones_take(base, slope):
    slowdown, rng = Slowdown(), random.Random(1)
    for now in range(300):
        price = rng.choice((1.0, 2.0, 4.0))
        slowdown.begin(now)
        slowdown.end(now + 1, price=price, taken=(base + slope * price) * rng.uniform(0.9, 1.1))
    # Never less than the prices differ by: who is let in by mistake teaches.
    mean = base + slope * 7 / 3
    assert slowdown.seconds(6.0, 300) == pytest.approx(mean + max(1.0, slope) * (6 - 7 / 3), rel=0.15)
    # Nor anything of prices far beyond those that were seen.
    assert slowdown.seconds(1000.0, 300) - slowdown.seconds(100.0, 300) == pytest.approx(900.0)
    slowdown.begin(400)
    assert slowdown.seconds(10.0, 400) == pytest.approx(10.0, rel=0.01)  # it has faded


def test_what_was_learnt_fades_while_nothing_runs_and_only_then():
    slowdown = Slowdown()
    now = 0.0
    for _ in range(100):
        slowdown.begin(now)
        now += 30.0  # longer than it takes to fade
        slowdown.end(now, price=10.0, taken=30.0)
    assert slowdown.ratio(now) == pytest.approx(3.0, rel=0.01)
    assert slowdown.ratio(now + 10.0) == pytest.approx(1 + 2 / 2.718, rel=0.01)
    assert slowdown.ratio(now + 100.0) == pytest.approx(1.0, rel=0.01)
    slowdown.begin(now + 1.0)
    assert slowdown.ratio(now + 60.0) == slowdown.ratio(now + 1.0) > 2.5
    slowdown.end(now + 60.0)
    assert slowdown.ratio(now + 60.0) > 2.5
