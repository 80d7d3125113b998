"""How requests wait, when devices are given up, which requests are kept: sections of a server's config."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.spec.fields import check_wait, set_enum, to_integer, to_number

__all__ = ["CaptureConfig", "DispatchPolicy", "FaultConfig", "QueueConfig"]


class DispatchPolicy(enum.StrEnum):
    """What becomes of a request where there are several devices."""

    AFFINITY = "affinity"
    """All of a request runs on one device."""

    SPREAD = "spread"
    """Every device runs an equal share of its rows. To compare with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """How the requests of each model wait for devices, and how many may."""

    max_queued_rows: int = 65536
    """Rows accepted and not yet running; a request beyond it is refused, unless nothing is queued. What would
    run after the request, of lower levels, doesn't count."""

    max_queue_ms: float = 1000.0
    """Predicted wait beyond which a request is refused, in milliseconds."""

    default_timeout_ms: float = 0.0
    """Longest time from arrival to answer, in milliseconds; a request's own deadline may be shorter, not
    longer. 0 for none."""

    max_batch_rows: int = 0
    """Most rows that requests are merged to, and 1 merges none; 0 for the knee of the measured times, and for
    what a larger request leaves free of its bucket."""

    max_skip_ms: float = 2.0
    """Longest time that smaller requests may overtake one that doesn't fit; 0 for strict order."""

    ageing_ms: float = 100.0
    """A level of priority counts as so many milliseconds of waiting."""

    max_defer_ms: float = 0.0
    """Longest time that a free device waits for company under high load; 0 for never."""

    policy: DispatchPolicy = dataclasses.field(
        default=DispatchPolicy.AFFINITY, metadata={"flag": "dispatch-policy"}
    )
    """Whether a request runs on one device (affinity) or is split over all (spread)."""

    @classmethod
    def unbounded(cls) -> QueueConfig:
        """Nothing is refused: for callers in the same process, who hold what they submit anyhow."""
        return cls(max_queued_rows=2**62, max_queue_ms=1e15)

    def __post_init__(self) -> None:
        set_enum(self, "policy", DispatchPolicy, "queue")
        to_integer("queue", "max_queued_rows", self.max_queued_rows, least=1)
        to_integer("queue", "max_batch_rows", self.max_batch_rows, least=0)
        for name in ("max_queue_ms", "default_timeout_ms", "max_skip_ms", "ageing_ms", "max_defer_ms"):
            if to_number("queue", name, getattr(self, name)) < 0:
                raise ConfigError(f"queue: {name} must be >= 0; was {getattr(self, name)}")
        check_wait("queue", "default_timeout_ms", self.default_timeout_ms, unit_seconds=1e-3)
        if self.max_queue_ms == 0:
            raise ConfigError("queue: max_queue_ms must be > 0; was 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """When a device is given up, and when it is tried again."""

    watchdog_seconds: float = 10.0
    """A batch that takes longer than this has hung its device, and so have answers to one."""

    probe_seconds: float = 1.0
    """First wait before a quarantined device is tried again."""

    def __post_init__(self) -> None:
        for name in ("watchdog_seconds", "probe_seconds"):
            if to_number("faults", name, getattr(self, name)) <= 0:
                raise ConfigError(f"faults: {name} must be > 0; was {getattr(self, name)}")
            check_wait("faults", name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Which requests are kept, with their inputs, for `xlarank replay`."""

    folder: Path | None = dataclasses.field(default=None, metadata={"flag": "captures"})
    """Where they are written; without one they are kept in memory alone."""

    num_kept: int = dataclasses.field(default=16, metadata={"flag": "captures-kept"})
    """Of each reason: the last so many. 0 keeps none."""

    slow_ms: float = dataclasses.field(default=0.0, metadata={"flag": "capture-slow-ms"})
    """Requests that took longer, from their arrival on, are kept as slow, in milliseconds; 0 for none."""

    def __post_init__(self) -> None:
        to_integer("captures", "num_kept", self.num_kept, least=0)
        if to_number("captures", "slow_ms", self.slow_ms) < 0:
            raise ConfigError(f"captures: slow_ms must be >= 0; was {self.slow_ms}")
