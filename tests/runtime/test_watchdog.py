"""Time that a watchdog saw pass, and time that it didn't."""

import math

from xlarank.runtime.watchdog import Watchdog


def watch(watchdog, *times):
    """Looks at each of these times, as it meant to; what hangs at the last."""
    hung = []
    for now in times:
        watchdog.rest(now)
        hung = watchdog.look(now)
    return hung


def test_a_run_hangs_once_its_time_was_seen_to_pass():
    watchdog = Watchdog(10.0)
    watchdog.begin(1, 100.0)
    assert watch(watchdog, *range(100, 110)) == []
    assert watch(watchdog, 110.0) == [1]
    watchdog.end(1)
    assert watch(watchdog, 111.0) == []


def test_time_that_was_overslept_counts_for_no_run():
    watchdog = Watchdog(10.0)
    watchdog.begin(0, 100.0)
    watch(watchdog, 101.0)
    watchdog.rest(102.0)
    watchdog.begin(1, 125.0)  # before the owner is back
    assert watchdog.look(130.0) == []
    assert watch(watchdog, 137.0) == []
    assert watch(watchdog, 138.0) == [0]  # 2 s before, 8 s after
    watchdog.end(0)
    assert watch(watchdog, 139.0) == []
    assert watch(watchdog, 140.0) == [1]


def test_a_pause_before_the_first_look_counts_neither():
    watchdog = Watchdog(10.0)
    watchdog.begin(0, 100.0)
    assert watchdog.look(120.0) == []
    assert watch(watchdog, 128.9) == []
    assert watch(watchdog, 129.0) == [0]


def test_it_wakes_ten_times_in_the_time_that_a_run_may_take_and_not_when_nothing_runs():
    watchdog = Watchdog(10.0)
    assert watchdog.wake_at == math.inf
    watchdog.begin(0, 100.0)
    watchdog.look(100.0)
    assert watchdog.wake_at == 101.0
    watch(watchdog, 109.5)
    assert watchdog.wake_at == 110.0
    watchdog.end(0)
    assert watchdog.wake_at == math.inf
