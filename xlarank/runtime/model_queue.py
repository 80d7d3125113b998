"""What a scheduler knows of one model, and of a batch that a device runs: `ModelQueue`, `Turn`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from xlarank.runtime.batcher import Batch, Batcher
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.slowdown import Slowdown

__all__ = ["ModelQueue", "Turn"]

Item = TypeVar("Item", bound=Hashable)


@dataclasses.dataclass(eq=False)
class ModelQueue(Generic[Item]):
    """One model's share of the devices. Owned by a scheduler."""

    name: str
    batcher: Batcher[Item]
    plans: Sequence[BucketPlan]
    """By device; the same object for devices that are alike."""

    version: int = 0
    slowdowns: Sequence[Slowdown] = ()
    """By device: what was learnt of this model's runs on it."""

    used_seconds: list[float] = dataclasses.field(default_factory=list)
    """By device: of its time, those that were used, from the level on at which the model began."""

    is_uneven: bool = False
    """Whether devices of one kind have come to differ, as of the last run."""

    least_rows: dict[int, float] = dataclasses.field(default_factory=dict)
    """Of the requests of each level that came lately; 1 or a little more where few have come."""

    shares: dict[int, float] = dataclasses.field(default_factory=dict)
    """Of all requests of all models lately, those of this model, by level."""

    seen_at: dict[int, float] = dataclasses.field(default_factory=dict)
    """When a request of each level came last."""

    @property
    def has_kinds(self) -> bool:
        """Whether devices differ in speed."""
        return self.is_uneven or self._has_plans

    @functools.cached_property
    def _has_plans(self) -> bool:
        return len({id(plan) for plan in self.plans}) > 1


@dataclasses.dataclass(frozen=True, eq=False)
class Turn(Generic[Item]):
    """A batch that a device was given."""

    queue: ModelQueue[Item]
    batch: Batch[Item]
    device: int
    started_at: float
    predicted_seconds: float
    """By the measured times of its bucket."""

    expected_seconds: float
    """The same as slow as runs of the model were lately."""

    is_retry: bool = False
    """Whether another device failed with it."""
