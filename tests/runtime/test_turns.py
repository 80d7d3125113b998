"""Models that share devices: none waits for what another saved up, and what is predicted of it holds."""

import random

import pytest

from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.model_queue import Turn
from xlarank.runtime.scheduler import Scheduler
from xlarank.spec import Bucket, BucketLadder, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

BUCKET = Bucket(8, 1)


def plan_of(seconds):
    """Every run takes so long."""
    return BucketPlan(BucketLadder((BUCKET,)), LatencyProfile({BUCKET: seconds}), seconds_a_run=0.0)


PLAN = plan_of(1.0)


def scheduler_of(num_models, plans=(PLAN,)):
    """A scheduler, and the queues of its models."""
    scheduler = Scheduler(len(plans))
    config = QueueConfig(max_queue_ms=1e9, max_queued_rows=10**9)
    return scheduler, [scheduler.attach(f"m{i}", plans, config) for i in range(num_models)]


def ask(scheduler, queue, now, count=1, **options):
    for _ in range(count):
        scheduler.submit(queue, object(), 8, RequestOptions(**options), now)


def run(scheduler, now, device=0, seconds=1.0):
    """One turn, which takes so long; whose it was, and when it ended."""
    turn = scheduler.next_turn(device, now)
    scheduler.finished(turn, now + seconds)
    return turn.queue, now + seconds


def turns_until(scheduler, queue, now, device=0):
    """How many turns others get before a model does."""
    count = 0
    while True:
        whose, now = run(scheduler, now, device)
        if whose is queue:
            return count
        count += 1


def test_a_model_that_asks_for_the_first_time_has_saved_up_nothing_even_while_the_others_are_idle():
    scheduler, (busy, new) = scheduler_of(2)
    now = 0.0
    for _ in range(100):
        ask(scheduler, busy, now)
        _, now = run(scheduler, now)
    ask(scheduler, new, now, 300)  # while the first has nothing queued, and nothing runs
    assert run(scheduler, now)[0] is new
    ask(scheduler, busy, now + 1)
    assert turns_until(scheduler, busy, now + 1) <= 1


def test_a_new_version_begins_level_whatever_a_model_that_is_never_asked_has_used():
    scheduler, (old, other, _) = scheduler_of(3)
    now = 0.0
    for _ in range(100):
        for queue in (old, other):
            ask(scheduler, queue, now)
            _, now = run(scheduler, now)
    new = scheduler.attach("m0", [PLAN], QueueConfig(max_queue_ms=1e9, max_queued_rows=10**9), version=2)
    scheduler.detach(old)
    ask(scheduler, new, now, 300)
    _, now = run(scheduler, now)
    ask(scheduler, other, now)
    assert turns_until(scheduler, other, now) <= 1


def test_a_model_does_not_pay_for_a_hang_or_a_stall():
    for is_given_up, most in ((True, 1), (False, 4)):
        scheduler, (stalled, other) = scheduler_of(2)
        ask(scheduler, stalled, 0.0)
        turn = scheduler.next_turn(0, 0.0)
        if is_given_up:
            scheduler.set_healthy(0, False)
            scheduler.set_healthy(0, True)
        scheduler.finished(turn, 60.0)
        ask(scheduler, other, 60.0, 300)
        _, now = run(scheduler, 60.0)
        ask(scheduler, stalled, now)
        assert turns_until(scheduler, stalled, now) <= most


@pytest.mark.parametrize("seed", range(5))
def test_of_models_that_always_have_something_queued_each_gets_its_share_of_every_device(seed):
    """Beside a model that comes and goes; runs are faster or slower than priced, and so are devices."""
    rng = random.Random(seed)
    plans = [PLAN, rng.choice((PLAN, plan_of(3.0)))]
    scheduler, (first, second, guest) = scheduler_of(3, plans)
    slowness = {queue: rng.choice((0.5, 1.0, 2.0)) for queue in (first, second, guest)}
    used = {(queue, device): 0.0 for queue in slowness for device in (0, 1)}
    ends: list[float] = [0.0, 0.0]
    running: list[Turn | None] = [None, None]
    for _ in range(600):
        device = ends.index(min(ends))
        now = ends[device]
        if running[device] is not None:
            scheduler.finished(running[device], now)
        for queue in (first, second):
            ask(scheduler, queue, now, 20 - queue.batcher.num_queued_requests)
        if rng.random() < 0.1:
            ask(scheduler, guest, now, rng.randrange(5))
        turn = running[device] = scheduler.next_turn(device, now)
        if turn is None:
            ends[device] = now + 0.1
            continue
        seconds = plans[device].seconds(8) * slowness[turn.queue]
        used[turn.queue, device] += seconds
        ends[device] = now + seconds
    for device, plan in enumerate(plans):
        assert abs(used[first, device] - used[second, device]) <= 4 * plan.seconds(8)
        assert used[guest, device] <= used[first, device] + 4 * plan.seconds(8)


@pytest.mark.parametrize("num_models", [1, 2, 3, 6])
def test_with_many_models_a_request_begins_when_predicted_to_within_a_turn_of_each(num_models):
    scheduler, (queue, *others) = scheduler_of(num_models)
    for other in others:
        ask(scheduler, other, 0.0, 200)
    ask(scheduler, queue, 0.0, 3)
    predicted = scheduler.predicted_start(queue, 0.0)
    assert predicted == pytest.approx(3.0 + (3.0 + 1.0) * len(others))
    ask(scheduler, queue, 0.0)
    now = 0.0
    for _ in range(4):
        before = now + turns_until(scheduler, queue, now)
        now = before + 1.0
    assert predicted - len(others) <= before <= predicted
