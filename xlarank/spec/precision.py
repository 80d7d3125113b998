"""Numeric formats of the dense part: `PrecisionPolicy`."""

from __future__ import annotations

import dataclasses

from xlarank.errors import ConfigError
from xlarank.spec.features import TaskKind
from xlarank.spec.fields import to_number

__all__ = ["FLOAT32", "PrecisionPolicy", "Tolerance"]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest difference from the reference score that verify lets pass."""

    probability: float = 1e-5
    """Absolute, on scores of binary tasks."""

    regression: float = 1e-5
    """Times max(1, |score|), on scores of regression tasks."""

    def of(self, kind: TaskKind) -> float:
        """The bound for scores of a kind of task."""
        return self.probability if kind is TaskKind.BINARY else self.regression

    def __post_init__(self) -> None:
        for name in ("probability", "regression"):
            object.__setattr__(self, name, to_number("tolerance", name, getattr(self, name)))
        if not (self.probability > 0 and self.regression > 0):
            raise ConfigError(f"tolerance: expected values > 0, got {self}")


@dataclasses.dataclass(frozen=True)
class PrecisionPolicy:
    """How matmuls are computed and how far their scores may be off. Static."""

    name: str = "float32"
    """float32: true float32 on every device (XLA precision HIGHEST)."""

    tolerance: Tolerance = Tolerance()
    """Verified at compile time and at every load."""

    def __post_init__(self) -> None:
        if self.name != "float32":
            raise ConfigError(f"precision: expected 'float32', got {self.name!r}")
        if not isinstance(self.tolerance, Tolerance):
            raise ConfigError(f"precision: tolerance must be a Tolerance; was {self.tolerance!r}")


FLOAT32 = PrecisionPolicy()
