"""Who decides when a device has time for a run that no request waits for: `Pace`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = ["Pace", "at_once"]

Result = TypeVar("Result")


class Pace(Protocol):
    """Runs a piece of work of one device when the device has time for it, and waits for it."""

    def __call__(self, work: Callable[[], Result], /) -> Result: ...


def at_once(work: Callable[[], Result], /) -> Result:
    """The pace of whoever has the device alone."""
    return work()
