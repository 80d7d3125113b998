"""The scheduler's contract: devices, models and admission, with placements worked out by hand."""

import collections
import contextlib
import math
import random

import pytest

from xlarank.errors import DeadlineError, OverloadError, UnavailableError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.scheduler import Scheduler
from xlarank.spec import BucketLadder, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

LADDER = BucketLadder.of_rows((8, 32))


def plan_of(seconds_a_row, *, seconds=0.0, ladder=LADDER):
    """A run takes as long as its bucket has rows."""
    profile = LatencyProfile({b: seconds + seconds_a_row * b.rows for b in ladder.buckets})
    return BucketPlan(ladder, profile, seconds_a_run=0.0, max_batch_rows=ladder.max_rows)


ALIKE = plan_of(1 / 32)  # 32 rows take a second
FAST, SLOW = plan_of(1 / 32), plan_of(4 / 32)


def scheduler_of(*plans, costs=None, **config):
    """A scheduler of one model with these plans, and the model's queue."""
    scheduler = Scheduler(len(plans), costs=costs)
    return scheduler, scheduler.attach("feed", plans, QueueConfig(**{"max_queue_ms": 1e6} | config))


def ask(scheduler, queue, item, rows=32, now=0.0, **options):
    scheduler.submit(queue, item, rows, RequestOptions(**options), now)


def answer(scheduler, queue, sizes, now=0.0, **options):
    """Answers requests of so many rows, one after the other; returns when."""
    for rows in sizes:
        ask(scheduler, queue, "answered", rows, now, **options)
        while (turn := scheduler.next_turn(0, now)) is not None:
            now += turn.predicted_seconds
            scheduler.finished(turn, now)
    return now


def items(turn):
    return [] if turn is None else [part.item for part in turn.batch.parts]


def test_a_free_device_takes_what_is_first_whoever_it_is():
    scheduler, queue = scheduler_of(ALIKE, ALIKE)
    for name in "abc":
        ask(scheduler, queue, name)
    assert scheduler.is_uniform
    first = scheduler.next_turn(1, 0.0)
    assert items(first) == ["a"]
    assert items(scheduler.next_turn(0, 0.0)) == ["b"]
    scheduler.finished(first, 1.0)
    assert items(scheduler.next_turn(1, 1.0)) == ["c"]
    assert scheduler.turn_of(1).batch.num_rows == 32


def test_it_is_idle_once_nothing_waits_and_nothing_runs_on_a_device_that_works():
    scheduler, queue = scheduler_of(ALIKE, ALIKE)
    assert scheduler.is_idle
    ask(scheduler, queue, "a")
    assert not scheduler.is_idle  # waits
    turn = scheduler.next_turn(0, 0.0)
    assert not scheduler.is_idle  # runs
    scheduler.set_healthy(0, False)  # it hangs, and may for ever
    assert scheduler.is_idle
    scheduler.set_healthy(0, True)
    scheduler.finished(turn, 1.0)
    assert scheduler.is_idle


def test_of_devices_that_differ_the_one_that_finishes_soonest_gets_a_request():
    scheduler, queue = scheduler_of(FAST, SLOW)
    assert not scheduler.is_uniform
    for name in "abcdef":
        ask(scheduler, queue, name)
    # Fast takes 1 s a request, slow 4 s: a, b, c finish on fast at 1, 2, 3; d at 4 on either.
    assert items(scheduler.next_turn(1, 0.0)) == ["d"]
    turn = scheduler.next_turn(0, 0.0)
    assert items(turn) == ["a"]
    scheduler.finished(turn, 1.0)
    assert items(scheduler.next_turn(0, 1.0)) == ["b"]


def test_a_free_device_waits_only_where_a_busy_one_is_sooner():
    scheduler, queue = scheduler_of(FAST, SLOW)
    ask(scheduler, queue, "a")
    assert scheduler.next_turn(1, 0.0) is None  # fast, free as well, takes 1 s
    assert items(scheduler.next_turn(0, 0.0)) == ["a"]
    ask(scheduler, queue, "b")
    assert scheduler.next_turn(1, 0.0) is None  # 2 s on fast, 4 s here
    for name in "cd":
        ask(scheduler, queue, name)
    assert items(scheduler.next_turn(1, 0.0)) == ["d"]  # 4 s here, no sooner there


def test_the_cheapest_device_that_meets_the_deadline_is_preferred():
    scheduler, queue = scheduler_of(FAST, SLOW, costs=[10.0, 1.0])
    ask(scheduler, queue, "patient", deadline=5.0)
    ask(scheduler, queue, "hurried", deadline=2.0)
    assert items(scheduler.next_turn(0, 0.0)) == ["hurried"]
    assert items(scheduler.next_turn(1, 0.0)) == ["patient"]


def test_never_a_dearer_device_while_a_cheaper_one_meets_the_deadline():
    rng = random.Random(7)
    for _ in range(300):
        speeds = [rng.choice((1, 2, 4)) / 32 for _ in range(3)]
        costs = [rng.choice((1.0, 2.0, 5.0)) for _ in range(3)]
        scheduler, queue = scheduler_of(*(plan_of(speed) for speed in speeds), costs=costs)
        rows, deadline = rng.choice((8, 32)), rng.uniform(0.3, 5)
        finish = [speed * rows for speed in speeds]
        meets = [i for i in range(3) if finish[i] <= deadline]
        if not meets:
            with pytest.raises(DeadlineError):
                ask(scheduler, queue, "a", rows, deadline=deadline)
            continue
        ask(scheduler, queue, "a", rows, deadline=deadline)
        takers = [i for i in range(3) if (turn := scheduler.next_turn(i, 0.0)) is not None and items(turn)]
        assert len(takers) == 1
        assert costs[takers[0]] == min(costs[i] for i in meets)
        equal = [finish[i] for i in meets if costs[i] == costs[takers[0]]]
        assert finish[takers[0]] == min(equal)


def homes(scheduler, queue, keys):
    """Which of two devices each key lives on."""
    found = {}
    for key in keys:
        ask(scheduler, queue, key, affinity_key=key)
        (found[key],) = [part.ticket.home for part in queue.batcher.waiting()]
        queue.batcher.drop(key)
    return found


def test_a_key_goes_to_its_home_and_overflows_when_that_is_busy():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, max_skip_ms=100)
    home = homes(scheduler, queue, [f"u{i}" for i in range(40)])
    assert len(set(home.values())) == 2
    assert home == homes(scheduler, queue, home)
    left, right = (next(key for key in home if home[key] == device) for device in (0, 1))
    ask(scheduler, queue, "a", affinity_key=left)
    assert scheduler.next_turn(1, 0.0) is None  # its home is idle
    assert items(scheduler.next_turn(0, 0.0)) == ["a"]
    ask(scheduler, queue, "b", affinity_key=left)
    ask(scheduler, queue, "c", affinity_key=right)
    own = scheduler.next_turn(1, 0.0)
    assert items(own) == ["c"]  # its own first
    scheduler.finished(own, 0.05)
    assert items(scheduler.next_turn(1, 0.05)) == ["b"]  # then what others have no time for


def test_once_nothing_that_prefers_a_device_is_queued_any_device_does_again():
    scheduler, queue = scheduler_of(ALIKE, ALIKE)
    spread = scheduler.attach("spread", [ALIKE] * 2, QueueConfig(policy="spread", max_queue_ms=1e6))
    ask(scheduler, queue, "taken", 64, affinity_key="u", deadline=1e3)
    assert not scheduler.is_uniform
    turns = [turn for i in (0, 1) if (turn := scheduler.next_turn(i, 0.0)) is not None]
    assert [items(turn) for turn in turns] == [["taken"]]
    assert not scheduler.is_uniform  # half of it is left
    ask(scheduler, queue, "dropped", affinity_key="u")
    assert queue.batcher.num_tied_requests == 2
    queue.batcher.drop("dropped")
    assert scheduler.next_turn(1 - turns[0].device, 1.0) is None  # had left "taken" to its home for 2 ms
    scheduler.take_late(1e3)
    assert scheduler.is_uniform
    ask(scheduler, spread, "shared", 2)
    assert not scheduler.is_uniform
    (free,) = {0, 1} - {turn.device for turn in turns}
    assert items(scheduler.next_turn(free, 1e3)) == ["shared"]
    assert not scheduler.is_uniform  # the other's share
    scheduler.finished(turns[0], 1e3)
    assert items(scheduler.next_turn(1 - free, 1e3)) == ["shared"]
    assert scheduler.is_uniform
    other = scheduler.attach("differs", [FAST, SLOW], QueueConfig())
    assert not scheduler.is_uniform
    scheduler.detach(other)
    assert scheduler.is_uniform


def test_another_devices_request_is_taken_first_once_it_has_waited():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, max_skip_ms=100)
    home = homes(scheduler, queue, [f"u{i}" for i in range(40)])
    left, right = (next(key for key in home if home[key] == device) for device in (0, 1))
    ask(scheduler, queue, "a", affinity_key=left)
    assert items(scheduler.next_turn(0, 0.0)) == ["a"]
    ask(scheduler, queue, "b", affinity_key=left)
    ask(scheduler, queue, "c", now=0.2, affinity_key=right)
    assert items(scheduler.next_turn(1, 0.2)) == ["b"]


def test_a_request_does_not_wait_for_a_home_that_takes_nothing():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, max_skip_ms=100)
    home = homes(scheduler, queue, [f"u{i}" for i in range(40)])
    left = next(key for key in home if home[key] == 0)
    for hold in (scheduler.set_suspended, scheduler.set_aside):
        hold(0, True)
        assert not scheduler.is_uniform
        ask(scheduler, queue, "a", affinity_key=left)
        turn = scheduler.next_turn(1, 0.0)
        assert items(turn) == ["a"]
        scheduler.finished(turn, 0.0)
        hold(0, False)


def test_what_is_left_to_a_home_that_does_not_come_for_it_is_looked_at_again_once_it_has_waited():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, max_skip_ms=100)
    key = next(key for key, home in homes(scheduler, queue, [f"u{i}" for i in range(9)]).items() if home == 0)
    ask(scheduler, queue, "a", now=1.0, affinity_key=key)
    assert scheduler.next_turn(1, 1.05) is None
    assert scheduler.wake_at() == 1.1
    assert items(scheduler.next_turn(1, 1.1)) == ["a"]
    assert scheduler.wake_at() == math.inf


def test_a_device_that_answers_is_busy_and_its_requests_took_no_longer_for_it():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, max_skip_ms=1e9)
    key = next(key for key, home in homes(scheduler, queue, [f"u{i}" for i in range(9)]).items() if home == 0)
    ask(scheduler, queue, "a", affinity_key=key)
    turn = scheduler.next_turn(0, 0.0)
    scheduler.finished(turn, 1.0)
    scheduler.set_answering(0, 1.0)
    assert scheduler.is_idle
    ask(scheduler, queue, "b", now=3.0, affinity_key=key)
    assert items(scheduler.next_turn(1, 3.0)) == ["b"]
    ask(scheduler, queue, "c", now=3.0)
    assert scheduler.predicted_start(queue, 3.0) == 5.0  # one is overdue by 2 s, the other has "b" and "c"
    scheduler.set_answering(0, math.inf)
    assert items(scheduler.next_turn(0, 4.0)) == ["c"]
    assert scheduler.use_of(0, 4.0)[:3] == (1, 1.0, 1.0)


def test_a_slower_device_takes_over_from_one_that_answers_for_long():
    scheduler, queue = scheduler_of(FAST, SLOW)
    scheduler.set_answering(0, 0.0)
    ask(scheduler, queue, "a", now=1.0)
    assert scheduler.next_turn(1, 1.0) is None  # in 1 + 1 s by the fast one, in 4 s by the slow one
    assert scheduler.wake_at() == 2.0
    assert scheduler.next_turn(1, 2.0) is None
    assert items(scheduler.next_turn(1, 4.0)) == ["a"]  # 4 + 1 s


def test_where_devices_differ_a_home_is_preferred_while_it_costs_no_more_than_the_wait_allowed():
    keys = [f"u{i}" for i in range(40)]
    home = homes(*scheduler_of(ALIKE, ALIKE), keys)
    key = next(key for key in home if home[key] == 1)
    for skip, device in ((2900, 0), (3100, 1)):  # slow takes 4 s where fast takes one
        scheduler, queue = scheduler_of(FAST, SLOW, max_skip_ms=skip)
        ask(scheduler, queue, "a", affinity_key=key)
        assert scheduler.next_turn(1 - device, 0.0) is None
        assert items(scheduler.next_turn(device, 0.0)) == ["a"]


def test_a_device_more_moves_only_the_keys_that_it_wins():
    keys = [f"u{i}" for i in range(300)]
    two, three = (homes(*scheduler_of(*[ALIKE] * count), keys) for count in (2, 3))
    moved = [key for key in keys if two[key] != three[key]]
    assert {three[key] for key in moved} == {2}
    assert 60 < len(moved) < 140


def test_spread_runs_a_share_on_every_device():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, policy="spread")
    ask(scheduler, queue, "a", 15)
    turns = [scheduler.next_turn(device, 0.0) for device in range(2)]
    assert [(part.begin, part.end) for turn in turns for part in turn.batch.parts] == [(0, 7), (7, 15)]


def test_models_take_turns_by_the_device_time_they_used():
    scheduler = Scheduler(1)
    heavy, light = (scheduler.attach(name, [ALIKE], QueueConfig(max_queue_ms=1e6)) for name in ("h", "l"))
    for i in range(20):
        ask(scheduler, heavy, f"h{i}", 32)
        for j in range(4):
            ask(scheduler, light, f"l{i}.{j}", 8)
    used, now = collections.Counter(), 0.0
    for _ in range(20):
        turn = scheduler.next_turn(0, now)
        seconds = 1.0 if turn.queue is heavy else 0.25 * turn.batch.num_rows / 8
        now += seconds
        used[turn.queue.name] += seconds
        scheduler.finished(turn, now)
        assert abs(used["h"] - used["l"]) <= 1.0


def test_a_model_that_was_idle_has_saved_up_no_turns():
    scheduler = Scheduler(1)
    busy, idle = (scheduler.attach(name, [ALIKE], QueueConfig(max_queue_ms=1e6)) for name in ("b", "i"))
    now = 0.0
    for i in range(50):
        ask(scheduler, busy, i, now=now)
    for _ in range(30):
        turn = scheduler.next_turn(0, now)
        now += 1.0
        scheduler.finished(turn, now)
    for i in range(20):
        ask(scheduler, idle, f"i{i}", now=now)
    order = []
    for _ in range(10):
        turn = scheduler.next_turn(0, now)
        order.append(turn.queue.name)
        now += 1.0
        scheduler.finished(turn, now)
    assert order.count("b") == order.count("i") == 5


def test_a_request_that_would_finish_too_late_is_refused_at_once():
    scheduler, queue = scheduler_of(ALIKE, ALIKE)
    for name in "ab":
        ask(scheduler, queue, name, now=10.0)
    turns = [scheduler.next_turn(device, 10.0) for device in (0, 1)]
    assert all(turns)
    ask(scheduler, queue, "c", now=10.5, deadline=12.5)  # 0.5 s to wait, 1 s to run
    with pytest.raises(
        DeadlineError, match=r"model 'feed': the answer would come in 2000.0 ms, the deadline is in 1900.0 ms"
    ):
        ask(scheduler, queue, "d", now=10.5, deadline=12.4)  # half of c's second on each device
    assert queue.batcher.num_queued_requests == 1


def test_the_servers_own_timeout_is_a_deadline_too():
    scheduler, queue = scheduler_of(ALIKE, default_timeout_ms=900)
    with pytest.raises(DeadlineError, match=r"the deadline is in 900\.0 ms"):
        ask(scheduler, queue, "a", deadline=math.inf)


def test_a_longer_queue_than_allowed_is_refused_and_says_when_to_come_again():
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=2500)
    for i in range(3):
        ask(scheduler, queue, i)
    with pytest.raises(
        OverloadError,
        match=r"model 'feed': the queue is full: a request would wait 3000.0 ms, max_queue_ms is 2500",
    ) as refused:
        ask(scheduler, queue, 3)
    assert refused.value.retry_after_seconds == pytest.approx(3.0 - 1.25)
    ask(scheduler, queue, "urgent", priority=1)  # nothing of its level is ahead


def test_a_request_is_refused_unread_while_the_queue_has_no_room_for_it():
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=2500, max_queued_rows=128)
    assert scheduler.overload(1000, 0.0) is None  # nobody knows yet what they will be
    now = answer(scheduler, queue, [32] * 20)
    for i in range(2):
        ask(scheduler, queue, i, now=now)
    assert scheduler.overload(0, now) is None  # 2 s to wait
    refusal = scheduler.overload(1, now)  # what is on its way counts as if it were queued
    assert str(refusal) == (
        "the server's queues are full: where there is room again soonest, a request would wait 3000.0 ms, "
        "max_queue_ms is 2500"
    )
    assert refusal.retry_after_seconds == pytest.approx(3.0 - 1.25)
    scheduler.next_turn(0, now)
    assert scheduler.overload(0, now + 0.9) is None
    assert "32 rows are queued, 97 more would pass max_queued_rows, 128" in str(
        scheduler.overload(3, now + 0.9)
    )


@pytest.mark.parametrize("first", ["quick", "slow"])
def test_a_refusal_of_what_is_unread_names_no_model_and_waits_for_the_soonest(first):
    # Nobody knows yet whom it is for, so what it says must hold for callers of either, or of no model at all.
    scheduler = Scheduler(1)
    longest = {"quick": 1500, "slow": 1200}
    names = sorted(longest, reverse=first == "slow")
    queues = {
        name: scheduler.attach(name, [ALIKE], QueueConfig(max_queue_ms=longest[name])) for name in names
    }
    for name in names:
        ask(scheduler, queues[name], name)
    refusal = scheduler.overload(0, 0.0)
    # A second of the one queue and one of the other are ahead of either.
    assert str(refusal) == (
        "the server's queues are full: where there is room again soonest, a request would wait 2000.0 ms, "
        "max_queue_ms is 1500"
    )
    assert refusal.retry_after_seconds == pytest.approx(2.0 - 0.75)


def test_what_is_on_its_way_counts_by_what_came_lately():
    scheduler, queue = scheduler_of(*[ALIKE] * 4, max_queue_ms=500)
    now = answer(scheduler, queue, [32] * 20)
    ask(scheduler, queue, 0, now=now)
    assert scheduler.next_turn(0, now) is not None
    # There is a device for three of them. 48 of a row each, which they may be, take the three half a second.
    assert scheduler.overload(3 + 47, now) is None
    assert scheduler.overload(3 + 49, now) is not None
    for device in (1, 2, 3):
        ask(scheduler, queue, device, now=now)
        assert scheduler.next_turn(device, now) is not None
    ask(scheduler, queue, "waits", now=now + 0.6)
    assert (
        scheduler.overload(0, now + 0.9) is None
    )  # a tenth of a second of the turns, and a quarter of its own
    assert scheduler.overload(1, now + 0.9) is not None  # and a quarter more
    # Many of a lower level are not before one of a higher.
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500, ageing_ms=1e5)
    for i in range(40):
        with contextlib.suppress(OverloadError):
            ask(scheduler, queue, i, priority=4)
    ask(scheduler, queue, "urgent", priority=1)
    scheduler.next_turn(0, 0.0)
    assert scheduler.overload(3, 0.9) is None
    # Nor are many for another model of one's own.
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500)
    slow = scheduler.attach("slow", [plan_of(1)], QueueConfig(max_queue_ms=2000))
    ask(scheduler, slow, "s")
    scheduler.next_turn(0, 0.0)
    for i in range(40):
        with contextlib.suppress(OverloadError):
            ask(scheduler, queue, i, 1, now=31.9)
    assert scheduler.overload(4, 31.9) is None


def test_a_model_that_left_with_nearly_all_requests_leaves_the_door_as_it_is():
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500)
    ask(scheduler, queue, 0)
    other = scheduler.attach("other", [ALIKE], QueueConfig())
    for i in range(8000):  # after these the first one's share is the least number above 0, and stays so
        with contextlib.suppress(OverloadError):
            ask(scheduler, other, i, 1)
    scheduler.detach(other)
    assert 0 < sum(queue.shares.values()) < 1e-300
    assert scheduler.overload(5, 0.0) is not None
    assert scheduler.next_turn(0, 0.0) is not None
    assert scheduler.overload(0, 0.9) is None


@pytest.mark.parametrize("sizes", [[5000], [1, 1, 1, 5000, 1], [5000] * 50])
def test_large_requests_do_not_close_an_idle_servers_door_on_small_ones(sizes):
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500)
    now = answer(scheduler, queue, sizes)
    assert scheduler.overload(8, now) is None  # none is known to be large
    for i in range(8):
        ask(scheduler, queue, i, 1, now=now)
        assert scheduler.overload(7 - i, now) is None


@pytest.mark.parametrize("bulk_priority", [1, 4])
def test_bulk_requests_do_not_close_the_door_on_small_ones_of_users(bulk_priority):
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500, ageing_ms=1e6, max_queued_rows=4096)
    now = 0.0
    for _ in range(30):
        now = answer(scheduler, queue, [2048], now, priority=bulk_priority)
        now = answer(scheduler, queue, [1] * 5, now, priority=1)
    ask(scheduler, queue, "bulk", 32, now, priority=bulk_priority)
    turn = scheduler.next_turn(0, now)
    now += 0.8
    assert turn is not None
    ask(scheduler, queue, "behind", 32 if bulk_priority == 1 else 2048, now, priority=4)
    for i in range(8):  # a fifth of a second is left of the turn, and none of these takes more than 30 ms
        assert scheduler.overload(8 - i, now) is None
        ask(scheduler, queue, i, 1, now, priority=1)


def test_a_request_is_read_while_another_model_or_level_that_came_lately_has_room():
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500)
    other = scheduler.attach("other", [ALIKE], QueueConfig(max_queue_ms=1e6))
    ask(scheduler, queue, 0)
    assert scheduler.overload(0, 0.0) is not None  # the other is asked for nothing
    ask(scheduler, other, 1)
    assert scheduler.overload(0, 0.0) is None
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500)
    ask(scheduler, queue, 0, priority=1)
    assert scheduler.overload(0, 0.0) is not None
    scheduler, queue = scheduler_of(ALIKE, max_queue_ms=500)
    ask(scheduler, queue, 0, priority=1)
    turn = scheduler.next_turn(0, 0.0)
    ask(scheduler, queue, 1, now=0.9)
    assert scheduler.overload(0, 0.9) is None  # nothing of the first level is ahead
    scheduler.finished(turn, 1.0)
    assert scheduler.overload(0, 60.5) is not None  # that one came more than a minute ago
    scheduler.set_healthy(0, False)
    assert scheduler.overload(0, 60.5) is None  # for that a request has an error of its own


def test_what_is_refused_unread_would_be_refused_if_it_were_read():
    count = sum((_count_refused_unread(seed) for seed in range(20)), collections.Counter())
    assert count[True] > 1000
    assert count[False] > 1000


def _count_refused_unread(seed):
    """Drives a random scheduler with random requests; how often one that comes would be refused unread."""
    rng = random.Random(seed)
    plans = rng.choice(([ALIKE], [ALIKE] * 3, [FAST, SLOW]))
    scheduler = Scheduler(len(plans))
    config = QueueConfig(max_queue_ms=rng.choice((500, 3000)), max_queued_rows=rng.choice((64, 256)))
    queues = [scheduler.attach(name, plans, config) for name in "ab"[: rng.choice((1, 2))]]
    levels = rng.choice(((2,), (1, 2), (2, 3, 4)))
    running, now, count = {}, 0.0, collections.Counter()
    for step in range(400):
        now += rng.random() / 10 * (step % 100 < 70 or 10)
        while running and min(end for _, end in running.values()) <= now:
            device, (turn, end) = min(running.items(), key=lambda entry: entry[1][1])
            del running[device]
            scheduler.finished(turn, end)
        is_full = scheduler.overload(0, now) is not None
        count[is_full] += 1
        for queue in queues if is_full else []:
            for level in queue.seen_at:
                with pytest.raises(OverloadError):
                    ask(scheduler, queue, "x", 1, now, priority=level)
        with contextlib.suppress(OverloadError):
            rows, level = rng.choice((1, 30, 90)), rng.choice(levels)
            ask(scheduler, rng.choice(queues), step, rows, now, priority=level)
        for device in range(len(plans)):
            if device not in running and (turn := scheduler.next_turn(device, now)) is not None:
                running[device] = (turn, now + turn.predicted_seconds * rng.choice((0.8, 1.0, 1.5)))
    return count


def test_rows_are_bounded_but_a_lone_request_is_taken():
    scheduler, queue = scheduler_of(ALIKE, max_queued_rows=40)
    ask(scheduler, queue, "a", 100)
    with pytest.raises(OverloadError, match=r"100 rows are queued, 1 more would pass max_queued_rows, 40"):
        ask(scheduler, queue, "b", 1)


@pytest.mark.parametrize(("num_rows", "seconds"), [(64, 1.5), (100, 0.5 + 68 / 32), (1000, 3.5)])
def test_who_comes_again_when_told_to_finds_room_for_its_rows(num_rows, seconds):
    scheduler, queue = scheduler_of(ALIKE, max_queued_rows=128)  # and a wait that is no reason to refuse
    ask(scheduler, queue, "bulk", 128)
    turn = scheduler.next_turn(0, 0.0)
    with pytest.raises(OverloadError, match=f"96 rows are queued, {num_rows} more would pass") as refused:
        ask(scheduler, queue, "next", num_rows, now=0.5)
    # Half a second is left of the run, and each 32 rows that are in the way take a second.
    assert refused.value.retry_after_seconds == pytest.approx(seconds)
    again = 0.5 + refused.value.retry_after_seconds
    for end in range(1, math.floor(again) + 1):
        scheduler.finished(turn, end)
        turn = scheduler.next_turn(0, end)
    ask(scheduler, queue, "next", num_rows, now=again)


def test_rows_of_low_levels_keep_no_higher_ones_out():
    scheduler, queue = scheduler_of(ALIKE, max_queued_rows=40, max_queue_ms=1e9, ageing_ms=1000)
    ask(scheduler, queue, "bulk", 100, priority=4)
    for number in range(2):
        ask(scheduler, queue, number, 20, priority=1)
    for priority, num_rows in ((1, 40), (4, 140)):
        with pytest.raises(OverloadError, match=f"{num_rows} rows are queued, 1 more would pass"):
            ask(scheduler, queue, "one more", 1, priority=priority)
    # By 3 s the bulk has aged past whoever comes then.
    assert "140 rows are queued, 1 more" in str(scheduler.overload(0, 3.5))


def test_predictions_count_other_models_as_far_as_they_take_turns():
    scheduler = Scheduler(1)
    config = QueueConfig(max_queue_ms=1e6)
    own, other = (scheduler.attach(name, [ALIKE], config) for name in ("own", "other"))
    for i in range(10):
        ask(scheduler, other, i)
    assert scheduler.predicted_start(own, 0.0) == pytest.approx(1.0)  # one turn of the other's
    for i in range(3):
        ask(scheduler, own, f"own{i}")
    assert scheduler.predicted_start(own, 0.0) == pytest.approx(3.0 + 4.0)


def test_work_ahead_fills_devices_level_each_from_when_it_is_free():
    scheduler, queue = scheduler_of(ALIKE, ALIKE, ALIKE, max_queue_ms=1e6)
    for i in range(2):
        ask(scheduler, queue, i)
        scheduler.next_turn(i, 0.0)
    assert scheduler.predicted_start(queue, 0.25) == 0.25  # the third is free
    ask(scheduler, queue, "x", now=0.25)
    ask(scheduler, queue, "y", now=0.25)
    # 2 s of work: the third device alone until 1.0, then three of them.
    assert scheduler.predicted_start(queue, 0.25) == pytest.approx(1.0 + (2.0 - 0.75) / 3)


def test_a_device_out_of_service_gets_nothing_and_what_it_held_goes_to_others():
    scheduler, queue = scheduler_of(ALIKE, ALIKE)
    ask(scheduler, queue, "a", 64)  # two runs
    assert items(scheduler.next_turn(0, 0.0)) == ["a"]
    scheduler.set_healthy(0, False)
    assert scheduler.num_healthy == 1
    assert scheduler.next_turn(0, 1.0) is None
    rest = scheduler.next_turn(1, 1.0)
    assert [(part.begin, part.end) for part in rest.batch.parts] == [(32, 64)]
    scheduler.set_healthy(1, False)
    with pytest.raises(UnavailableError, match="model 'feed': no device is healthy"):
        ask(scheduler, queue, "b")
    scheduler.set_healthy(0, True)
    ask(scheduler, queue, "b", now=2.0)
    assert items(scheduler.next_turn(0, 2.0)) == ["b"]


def test_late_requests_are_told_and_a_detached_model_is_forgotten():
    scheduler, queue = scheduler_of(ALIKE)
    ask(scheduler, queue, "a")
    scheduler.next_turn(0, 0.0)
    ask(scheduler, queue, "b", deadline=2.5)
    assert scheduler.wake_at() == 2.5
    assert scheduler.take_late(2.4) == []
    assert scheduler.take_late(2.5) == [(queue, "b")]
    scheduler.detach(queue)
    scheduler.detach(queue)
    assert list(scheduler.queues) == []
    assert scheduler.wake_at() == math.inf


@pytest.mark.parametrize("seed", range(10))
def test_no_device_idles_while_rows_are_queued_and_all_are_answered(seed):
    """Three models, keys, priorities, alike devices: at no time is a device free and something queued."""
    rng = random.Random(seed)
    scheduler = Scheduler(3)
    plans = [plan_of(rng.choice((1, 3)) / 320, seconds=0.01) for _ in range(3)]
    queues = [
        scheduler.attach(f"m{i}", [plan] * 3, QueueConfig(max_skip_ms=rng.choice((0, 5)), max_queue_ms=1e9))
        for i, plan in enumerate(plans)
    ]
    running, done, asked, now = {}, collections.Counter(), {}, 0.0
    for step in range(400):
        now += rng.random() / 50
        for device, (turn, end) in list(running.items()):
            if end <= now:
                del running[device]
                scheduler.finished(turn, end)
                for part in turn.batch.parts:
                    done[part.item] += part.num_rows
        if step < 300:
            asked[step] = rng.choice((1, 5, 30, 90))
            key = rng.choice((None, f"u{rng.randrange(5)}"))
            ask(
                scheduler,
                rng.choice(queues),
                step,
                asked[step],
                now,
                affinity_key=key,
                priority=rng.randint(1, 4),
            )
        for _ in range(2):  # what one takes may free what another left for it
            for device in range(3):
                if device not in running and (turn := scheduler.next_turn(device, now)) is not None:
                    running[device] = (turn, now + turn.predicted_seconds)
        waiting = [part.pin for queue in queues for part in queue.batcher.waiting()]
        # A device that has begun a request keeps the rest of it.
        assert len(running) == 3 or all(pin in running for pin in waiting)
    while running or scheduler.num_queued_requests:
        device, (turn, end) = min(running.items(), key=lambda entry: entry[1][1])
        now = end
        del running[device]
        scheduler.finished(turn, now)
        for part in turn.batch.parts:
            done[part.item] += part.num_rows
        for device in range(3):
            if device not in running and (turn := scheduler.next_turn(device, now)) is not None:
                running[device] = (turn, now + turn.predicted_seconds)
    assert done == asked


@pytest.mark.parametrize("seed", range(10))
def test_devices_that_differ_are_never_all_idle_while_rows_are_queued(seed):
    """Speeds, costs, keys, deadlines: a request waits only for a device that is at work."""
    rng = random.Random(seed)
    plans = [plan_of(1 / 3200), plan_of(rng.choice((1, 4)) / 3200, seconds=0.002), plan_of(2 / 3200)]
    scheduler, queue = scheduler_of(
        *plans, costs=rng.choice((None, (3, 1, 2))), max_skip_ms=rng.choice((0, 5))
    )
    running, now = {}, 0.0
    for step in range(400):
        now += rng.random() / 50
        while running and min(end for _, end in running.values()) <= now:
            device, (turn, end) = min(running.items(), key=lambda entry: entry[1][1])
            del running[device]
            scheduler.finished(turn, end)
            _start_all(scheduler, running, end, rng)
        key = rng.choice((None, f"u{rng.randrange(5)}"))
        deadline = rng.choice((math.inf, now + 0.1))
        with contextlib.suppress(DeadlineError):
            ask(scheduler, queue, step, rng.choice((1, 5, 30, 90)), now, affinity_key=key, deadline=deadline)
        _start_all(scheduler, running, now, rng)
        assert running or not scheduler.num_queued_requests


def _start_all(scheduler, running, now, rng):
    """Asks every free device, as those that wait are all told of a change."""
    for device in rng.sample(range(3), 3):
        if device not in running and (turn := scheduler.next_turn(device, now)) is not None:
            running[device] = (turn, now + turn.predicted_seconds * rng.choice((0.8, 1.0, 1.5)))
    scheduler.take_late(now)
