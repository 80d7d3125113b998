"""The search for bad data, without threads: who is answered when, in how many runs, by which rows."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest

from xlarank.runtime.isolation import FaultSearch
from xlarank.runtime.part_queue import Part


def part_of(name, rows=1):
    return Part(SimpleNamespace(item=name), 0, rows)


def search_of(parts, now=0.0):
    search = FaultSearch()
    return search, search.begin(None, parts, RuntimeError("overflow"), now)


def run_all(search, fails, *, now=0.0):
    """Runs a search to its end. What ran: parts, whether it was for rows, whether it failed; and culprits."""
    runs, culprits = [], []
    while (step := search.take(now, is_idle=True)) is not None:
        error = RuntimeError("overflow") if fails(step.parts) else None
        runs.append((step.parts, step.culprit is not None, error is not None))
        if (culprit := search.ran(step, error, now, 0.0)) is not None:
            culprits.append(culprit)
    assert search.num_steps == 0
    return runs, culprits


@pytest.mark.parametrize("seed", range(20))
def test_all_others_have_run_before_rows_are_looked_for_and_no_more_runs_than_promised(seed):
    rng = random.Random(seed)
    num_requests, num_rows = rng.randint(2, 40), rng.randint(1, 200)
    bad = {name: rng.randrange(num_rows) for name in rng.sample(range(num_requests), rng.randint(1, 2))}
    search, culprit = search_of([part_of(name, num_rows) for name in range(num_requests)])
    assert culprit is None

    def fails(parts):
        return any(part.begin <= bad.get(part.item, -1) < part.end for part in parts)

    runs, culprits = run_all(search, fails)
    assert {(c.part.item, c.begin, c.end) for c in culprits} == {(n, r, r + 1) for n, r in bad.items()}
    for_rows = [is_for_rows for _, is_for_rows, _ in runs]
    assert for_rows == sorted(for_rows)
    answered = [
        part.item for parts, is_for_rows, failed in runs if not (is_for_rows or failed) for part in parts
    ]
    assert sorted(answered) == [name for name in range(num_requests) if name not in bad]
    assert for_rows.count(False) <= 2 * len(bad) * math.ceil(math.log2(num_requests))
    assert for_rows.count(True) <= 2 * len(bad) * math.ceil(math.log2(num_rows))


def test_a_half_that_ran_is_answered_before_the_other_is_taken_apart():
    search, _ = search_of([part_of(name) for name in "abcd"])
    runs, _ = run_all(search, lambda parts: any(part.item == "a" for part in parts))
    assert [[part.item for part in parts] for parts, *_ in runs] == [["a", "b"], ["c", "d"], ["a"], ["b"]]


def test_rows_that_fail_together_alone_are_told_together():
    search, _ = search_of([part_of("a", 16)])
    _, (culprit,) = run_all(search, lambda parts: parts[0].begin <= 4 and parts[0].end > 7)
    assert (culprit.begin, culprit.end) == (4, 8)


def test_while_requests_wait_rows_get_a_quarter_of_the_time():
    search, _ = search_of([part_of("a", 64)])
    search.ran(search.take(0.0, is_idle=False), RuntimeError("overflow"), 0.25, seconds=0.25)
    assert search.take(0.99, is_idle=False) is None
    assert search.take(1.0, is_idle=False).parts[0].end == 16


def test_a_device_with_nothing_else_to_do_looks_for_rows_all_the_time():
    search, _ = search_of([part_of("a", 64)])
    search.ran(search.take(0.0, is_idle=False), RuntimeError("overflow"), 0.25, seconds=0.25)
    assert search.take(0.25, is_idle=True).parts[0].end == 16


def test_requests_are_looked_for_while_rows_rest():
    search, _ = search_of([part_of("a", 64)])
    search.ran(search.take(0.0, is_idle=False), RuntimeError("overflow"), 0.25, seconds=0.25)
    search.begin(None, [part_of("b"), part_of("c")], RuntimeError("overflow"), 0.25)
    assert [part.item for part in search.take(0.25, is_idle=False).parts] == ["b"]


@pytest.mark.parametrize("fails", [True, False])
def test_after_a_second_the_rows_that_are_left_are_told(fails):
    search, _ = search_of([part_of("a", 64)], now=100.0)
    error = RuntimeError("overflow") if fails else None
    culprit = search.ran(search.take(100.0, is_idle=True), error, 101.0, 0.1)
    assert (culprit.begin, culprit.end) == (0, 32 if fails else 64)
    assert search.num_steps == 0


def test_of_many_requests_at_fault_at_a_time_the_rows_are_looked_for_in_eight():
    search, _ = search_of([part_of(0, 64)])
    told = [search.begin(None, [part_of(name, 64)], RuntimeError("overflow"), 0.0) for name in range(1, 10)]
    assert told[:7] == [None] * 7
    assert [(culprit.part.item, culprit.begin, culprit.end) for culprit in told[7:]] == [
        (8, 0, 64),
        (9, 0, 64),
    ]
    _, culprits = run_all(search, lambda parts: parts[0].begin == 0)
    assert [culprit.part.item for culprit in culprits] == list(range(8))  # each before the next is begun
    assert {culprit.end for culprit in culprits} == {1}


def test_what_is_left_can_be_given_up():
    search, _ = search_of([part_of(name) for name in "abcd"])
    search.begin(None, [part_of("e", 2)], RuntimeError("overflow"), 0.0)
    left = list(itertools.chain.from_iterable(step.parts for step in search.clear()))
    assert [part.item for part in left] == ["a", "b", "c", "d", "e"]
    assert search.num_steps == 0
