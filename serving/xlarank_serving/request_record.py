"""What is known of a ranking request once it is answered: `RequestRecord`, for logs and traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from xlarank.runtime import Timings

__all__ = ["Observer", "RequestRecord"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One ranking request, answered or refused."""

    ended_at: float
    """Seconds since 1970."""

    model: str
    version: str
    """That answered; what was asked for where none did."""

    id: str
    """The request's own."""

    candidates: int | None
    """None if it couldn't be read."""

    status: str
    """The name of its gRPC code; OK for an answer."""

    message: str
    """What the caller was told; empty for an answer."""

    total_seconds: float
    """From its headers' arrival."""

    wait_seconds: float = 0.0
    """Of them, until a thread had it to read."""

    decode_seconds: float | None
    """None if it wasn't read to its end."""

    timings: Timings | None
    """None without an answer."""

    transport: str = "grpc"
    """Or http."""

    trace_parent: str | None = None
    """The caller's span, as W3C's traceparent header has it."""


Observer = Callable[[RequestRecord], None]
"""Is told of requests, on the thread that answered; must be quick and must not raise."""
