"""Work beside requests: at a lower priority, but not so low that it waits for a core with the lock."""

import os
import threading

import pytest

from xlarank.runtime.background import in_background


def test_background_work_has_a_lower_priority_but_not_the_lowest():
    """With 19, a 1.5% share of a busy core, the interpreter's lock waited with it for a fifth of a second."""
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    niceness = in_background(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert own < niceness <= 7
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_what_background_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)
