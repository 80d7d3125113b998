"""Work that must not take time from requests: `in_background`, `lower_priority`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_background", "lower_priority"]

Result = TypeVar("Result")

_NICENESS = 5
"""Not 19: such a thread gets 1.5% of a busy core, and may have the interpreter's lock while it waits a fifth
of a second for its turn; all that answer requests then wait with it. At 5 it gets a quarter of a core."""


def lower_priority() -> None:
    """Gives the calling thread, and those that it starts, a lower priority; there is no way back."""
    # Linux keeps priorities by thread. Elsewhere this would slow the whole process down.
    if hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def in_background(work: Callable[[], Result]) -> Result:
    """Does a piece of work in a thread of lower priority, and waits for it.

    Not for work that starts threads which serve later: they would have that priority too.
    """
    with ThreadPoolExecutor(1, "xlarank-background", lower_priority) as thread:
        return thread.submit(work).result()
