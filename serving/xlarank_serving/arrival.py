"""When and how ranking requests came: `Arrival`."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import time

import grpc

__all__ = ["Arrival", "arrival_of", "stamp_arrival"]

_NO_DEADLINE_SECONDS = 1e9
"""More than that is how gRPC tells that there is no deadline."""

# gRPC runs all of a call in one context of its own: what is seen with the headers is set here for the thread
# that answers, which may come to it much later.
_headers_at: contextvars.ContextVar[float] = contextvars.ContextVar("headers_at")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """How a ranking request came."""

    at: float
    """When its headers did, on the clock of `time.monotonic`: timeouts count from here, whatever it waits for
    then."""

    ends_at: float = math.inf
    """When the caller's own deadline passes, on the same clock."""

    trace_parent: str | None = None
    """The caller's span, as the traceparent header has it."""

    transport: str = "grpc"
    """Or http."""


def stamp_arrival() -> None:
    """Notes that a call's headers have come; called in the call's own context."""
    _headers_at.set(time.monotonic())


def arrival_of(context: grpc.ServicerContext, *, is_traced: bool, is_now: bool = False) -> Arrival:
    """How a request of a gRPC call came.

    Args:
      context: of the call.
      is_traced: whether anybody asks for the caller's span.
      is_now: whether it came just now, as those of a stream do, and not with the call.
    """
    now = time.monotonic()
    seconds = context.time_remaining()
    has_deadline = seconds is not None and seconds <= _NO_DEADLINE_SECONDS
    return Arrival(
        at=now if is_now else _headers_at.get(now),
        ends_at=now + seconds if has_deadline else math.inf,
        trace_parent=_trace_parent_of(context) if is_traced else None,
    )


def _trace_parent_of(context: grpc.ServicerContext) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            return value
    return None
