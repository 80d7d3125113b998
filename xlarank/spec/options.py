"""What a caller may ask for beside its scores: `RequestOptions`."""

from __future__ import annotations

import dataclasses
import math

from xlarank.errors import RequestError

__all__ = ["DEFAULT_PRIORITY", "NUM_PRIORITIES", "RequestOptions"]

NUM_PRIORITIES = 4
"""Levels that a request may ask for; 1 is the highest."""

DEFAULT_PRIORITY = 2
"""Of a request that asks for none, so that there is a level above it and there are two below."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How one request wants to be served."""

    priority: int = DEFAULT_PRIORITY
    """1 (highest) to NUM_PRIORITIES."""

    deadline: float = math.inf
    """On the clock of `time.monotonic`, in seconds: an answer after it is of no use to the caller."""

    affinity_key: str | None = None
    """Requests of the same key go to the same device while it isn't busier than others."""

    arrived_at: float | None = None
    """When it came to whoever submits it, on the same clock: what it waited for until then is part of its
    duration in metrics, and of what makes it slow. None if it comes with the submit."""

    def __post_init__(self) -> None:
        if self.priority not in range(1, NUM_PRIORITIES + 1):
            raise RequestError(
                f"priority must be in [1, {NUM_PRIORITIES}], 1 the highest; was {self.priority!r}"
            )
        if math.isnan(self.deadline):
            raise RequestError("deadline must be a number; was nan")
        if self.arrived_at is not None and math.isnan(self.arrived_at):
            raise RequestError("arrived_at must be a number; was nan")
