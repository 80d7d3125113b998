"""The queue's order and its sums, against a sorted list."""

import itertools
import random
import sys

import numpy as np
import pytest

from xlarank.runtime.batcher import Batcher
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.part_queue import Part, PartQueue, Ticket
from xlarank.spec import BucketLadder, LatencyProfile


@pytest.mark.parametrize("seed", range(10))
def test_order_and_sums_are_those_of_a_sorted_list(seed):
    rng = random.Random(seed)
    queue, kept = PartQueue(), {}
    for step in range(2000):
        if rng.random() < (0.7 if step < 1500 else 0.2) or not kept:
            ticket = Ticket(step, 0.0, 1.0, (rng.choice((step, step / 2, rng.random() * 2000)), step))
            rows = [0, *sorted(rng.sample(range(1, 50), rng.randint(1, 3)))]
            parts = [Part(ticket, begin, end) for begin, end in itertools.pairwise(rows)]
            for part in rng.sample(parts, len(parts)):
                kept[part] = rng.random()
                queue.insert(part, kept[part])
        else:
            part = rng.choice(list(kept)) if rng.random() < 0.5 else next(iter(queue))
            del kept[part]
            queue.remove(part)
        if step % 50 == 0:
            ordered = sorted(kept, key=lambda part: (*part.ticket.order, part.begin))
            assert list(queue) == ordered
            assert queue.seconds == pytest.approx(sum(kept.values()), abs=1e-12)
            for order in (-1.0, rng.random() * 2000, step / 2, float(step), 1e9):
                before = [part for part in ordered if part.ticket.order[0] <= order]
                seconds = sum(kept[part] for part in before)
                assert queue.seconds_before(order) == pytest.approx(seconds, abs=1e-12)
                assert queue.rows_before(order) == sum(part.num_rows for part in before)
            of_rows = np.repeat([kept[p] / p.num_rows for p in ordered], [p.num_rows for p in ordered])
            for num_rows in (0, 1, rng.randint(0, len(of_rows)), len(of_rows)):
                assert queue.seconds_of_first(num_rows) == pytest.approx(of_rows[:num_rows].sum(), abs=1e-9)
    for part in list(queue):
        queue.remove(part)
    assert queue.seconds == queue.seconds_before(1e9) == queue.rows_before(1e9) == 0
    assert queue.seconds_of_first(9) == 0
    assert list(queue) == []


def test_an_arrival_is_no_dearer_for_a_long_queue():
    """Calls of Python functions are counted; times would be of the machine."""
    ladder = BucketLadder.of_rows((8, 32, 128))
    plan = BucketPlan(ladder, LatencyProfile(dict.fromkeys(ladder.buckets, 1.0)))
    batcher = Batcher(plan)
    for number in range(5000):
        batcher.add(number, 1 + number % 20, now=number * 1e-6, priority=1 + number % 3)
    num_calls = 0

    def count(frame, event, arg):
        nonlocal num_calls
        num_calls += event == "call"

    sys.setprofile(count)
    try:
        ahead = [batcher.seconds_ahead(0.006, level) for level in (1, 2, 3)]
        batcher.add("urgent", 5, now=0.006, priority=1)
    finally:
        sys.setprofile(None)
    assert ahead == sorted(ahead)
    assert ahead[0] > 0
    assert num_calls < 300
