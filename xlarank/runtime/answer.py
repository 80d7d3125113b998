"""What a request gets: `Answer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

__all__ = ["Answer", "Timings"]


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in seconds."""

    queue: float
    """Submit to the start of the first gather."""

    gather: float
    """Gathering its batches: looking up, pooling and filling buffers, company included."""

    execute: float
    """Executing its batches: dispatch to scores on the host."""

    total: float
    """Submit to answer."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Scores of one request and what they took."""

    scores: Mapping[str, np.ndarray]
    """[N] float32 by task name."""

    timings: Timings
