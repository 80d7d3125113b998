"""What a device defers, or leaves to another, is looked at again in time, whatever is asked meanwhile."""

import math
import random

import pytest

from xlarank.errors import DeadlineError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.scheduler import Scheduler
from xlarank.runtime.simulation import Arrival, simulate
from xlarank.spec import BucketLadder, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

LADDER = BucketLadder.of_rows((8, 64))


def plan_of(seconds, seconds_a_row=0.01):
    profile = LatencyProfile({b: seconds + seconds_a_row * b.rows for b in LADDER.buckets})
    return BucketPlan(LADDER, profile, seconds_a_run=0.0)


PLAN, SLOW = plan_of(0.1), plan_of(5.0)


def attach(scheduler, *plans, **config):
    return scheduler.attach("feed", plans, QueueConfig(**{"max_queue_ms": 1e9, "max_defer_ms": 500} | config))


def ask(scheduler, queue, item, rows=3, now=1.0, **options):
    scheduler.submit(queue, item, rows, RequestOptions(**options), now)


def load(scheduler, queue, now=1.0):
    """So much has run just now that a device may defer."""
    for i in range(20):
        ask(scheduler, queue, i, 64, now)
        for device in range(len(queue.plans)):
            if (turn := scheduler.next_turn(device, now)) is not None:
                scheduler.finished(turn, now)


def key_of(device):
    scheduler = Scheduler(2)
    queue = attach(scheduler, PLAN, PLAN)
    for number in range(100):
        ask(scheduler, queue, number, affinity_key=str(number))
        (part,) = queue.batcher.waiting()
        if part.ticket.home == device:
            return str(number)
        queue.batcher.drop(number)
    raise AssertionError("no key lives there")


@pytest.mark.parametrize(
    ("plans", "config", "options"),
    [
        ((PLAN, PLAN), {}, {"affinity_key": key_of(0)}),
        ((PLAN, SLOW), {}, {}),
    ],
    ids=["home", "faster"],
)
def test_what_one_device_defers_is_not_lost_when_another_that_may_not_take_it_looks(plans, config, options):
    scheduler = Scheduler(2)
    queue = attach(scheduler, *plans, **config)
    load(scheduler, queue)
    ask(scheduler, queue, "last", **options)
    assert [scheduler.next_turn(device, 1.0) for device in (0, 1)] == [None, None]
    turns = []
    while not turns:
        now = scheduler.wake_at()
        assert 1.0 < now <= 1.5
        turns = [turn for device in (0, 1) if (turn := scheduler.next_turn(device, now)) is not None]
    assert [part.item for part in turns[0].batch.parts] == ["last"]
    assert scheduler.wake_at() == math.inf


def test_a_device_that_defers_and_then_takes_something_else_leaves_the_look_to_the_others():
    scheduler = Scheduler(2)
    queue, other = attach(scheduler, PLAN, PLAN), attach(scheduler, PLAN, PLAN, max_defer_ms=0)
    load(scheduler, queue)
    ask(scheduler, queue, "deferred")
    assert scheduler.is_uniform
    assert scheduler.next_turn(0, 1.0) is None
    assert not scheduler.is_uniform  # waking the one that defers is not enough
    ask(scheduler, other, "at once")
    turn = scheduler.next_turn(0, 1.0)
    assert turn.queue is other
    assert scheduler.next_turn(1, 1.0) is None
    until = scheduler.wake_at()
    assert 1.0 < until <= 1.5
    assert scheduler.next_turn(1, until).queue is queue
    assert scheduler.wake_at() == math.inf  # both are at work


def test_a_device_that_takes_nothing_is_not_asked_again_for_what_it_deferred():
    scheduler = Scheduler(1)
    queue = attach(scheduler, PLAN)
    load(scheduler, queue)
    ask(scheduler, queue, "deferred")
    for hold in (scheduler.set_suspended, scheduler.set_aside):
        assert scheduler.next_turn(0, 1.0) is None
        assert scheduler.wake_at() < math.inf
        hold(0, True)
        assert scheduler.wake_at() == math.inf
        hold(0, False)
    queue.batcher.drop("deferred")
    assert scheduler.next_turn(0, 1.0) is None
    assert scheduler.wake_at() == math.inf


def test_a_simulation_goes_on_while_a_device_runs_another_model_than_it_defers():
    scheduler = Scheduler(1)
    queues = [
        attach(scheduler, plan_of(1e-3, 1e-4), max_defer_ms=5),
        attach(scheduler, plan_of(5e-2, 1e-4), max_defer_ms=0),
    ]
    arrivals = [Arrival(1 + 0.008 * i, 64, 0) for i in range(250)]  # one ends before the next comes
    at = 1 + 0.008 * 250
    arrivals += [Arrival(at, 3, 0), Arrival(at + 0.001, 3, 1), Arrival(at + 0.1, 3, 1)]
    result = simulate(scheduler, queues, arrivals)
    assert result.is_answered.all()
    assert result.latencies[-3] > 0.05  # it was deferred, and waited for the other model's run


@pytest.mark.parametrize("costs", [None, (2.0, 1.0), (1.0, 2.0)])
def test_a_slower_device_takes_over_soon_from_one_that_hangs(costs):
    scheduler = Scheduler(2, costs=costs)
    queue = attach(scheduler, PLAN, SLOW, max_defer_ms=0)
    ask(scheduler, queue, "hangs", 8, deadline=2.0)
    turn = scheduler.next_turn(0, 1.0)
    assert [part.item for part in turn.batch.parts] == ["hangs"]
    ask(scheduler, queue, "next", 8)
    assert scheduler.next_turn(1, 1.0) is None  # the faster one is expected to be free in 0.18 s
    now, looks = 1.0, 0
    while (turn := scheduler.next_turn(1, now)) is None:
        assert scheduler.wake_at() > now
        now, looks = scheduler.wake_at(), looks + 1
    assert [part.item for part in turn.batch.parts] == ["next"]
    assert now <= 1.0 + PLAN.seconds(8) + 2 * SLOW.seconds(8)
    assert looks <= 3


def test_a_turn_that_is_overdue_is_predicted_to_last_as_long_again():
    scheduler = Scheduler(1)
    queue = attach(scheduler, PLAN)
    ask(scheduler, queue, "hangs", 8)
    due = 1.0 + scheduler.next_turn(0, 1.0).expected_seconds
    for now, free in ((1.0, due), (due, due), (due + 2.0, due + 4.0)):
        assert scheduler.predicted_start(queue, now) == pytest.approx(free)
    with pytest.raises(
        DeadlineError, match=r"the answer would come in 2180\.0 ms, the deadline is in 1000\.0 ms"
    ):
        ask(scheduler, queue, "hurried", 8, due + 2.0, deadline=due + 3.0)


def test_a_simulated_hang_holds_up_one_request():
    scheduler = Scheduler(2)
    queue = attach(scheduler, PLAN, SLOW, max_defer_ms=0)
    result = simulate(
        scheduler,
        [queue],
        [Arrival(1.0, 8), Arrival(1.01, 8)],
        service_seconds=lambda turn: 1000.0 if turn.device == 0 else turn.predicted_seconds,
    )
    assert result.latencies[0] == pytest.approx(1000.0)
    assert result.latencies[1] < 3 * SLOW.seconds(8)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_time_goes_on_and_everything_is_answered(seed):
    """Models that defer, devices that differ, cost, are overdue; keys, shares and deadlines."""
    rng = random.Random(seed)
    speeds = [rng.choice((1e-3, 1e-3, 4e-3)) for _ in range(rng.randint(1, 3))]
    by_speed = {speed: plan_of(speed, speed / 10) for speed in speeds}
    plans = [by_speed[speed] for speed in speeds]
    scheduler = Scheduler(len(plans), costs=rng.choice((None, [rng.choice((1.0, 2.0)) for _ in plans])))
    queues = [
        attach(scheduler, *plans, max_defer_ms=rng.choice((0, 5)), policy=rng.choice(("affinity", "spread")))
        for _ in range(rng.randint(1, 3))
    ]
    gap = 0.01 / len(plans)
    arrivals = [
        Arrival(
            1 + i * gap * rng.uniform(0.9, 1.0),
            rng.choice((1, 3, 64, 200)),
            rng.randrange(len(queues)),
            timeout=rng.choice((math.inf, 0.1)),
            affinity_key=rng.choice((None, "a", "b")),
        )
        for i in range(300)
    ]
    arrivals.sort(key=lambda arrival: arrival.at)
    result = simulate(
        scheduler,
        queues,
        arrivals,
        service_seconds=lambda turn: turn.predicted_seconds * rng.choice((0.5, 1.0, 1.0, 20.0)),
    )
    assert result.is_answered.sum() + result.num_refused + result.num_late == len(arrivals)
