"""Numeric formats of the dense part and how far scores may be off: `Precision`, `PrecisionPolicy`."""

from __future__ import annotations

import dataclasses
import enum

from xlarank.errors import ConfigError
from xlarank.spec.features import TaskKind
from xlarank.spec.fields import to_number
from xlarank.spec.row_format import RowFormat

__all__ = ["ErrorBudget", "Precision", "PrecisionPolicy", "Tolerance"]


class Precision(enum.StrEnum):
    """Format that matmuls with weights multiply in. What isn't a matmul stays float32."""

    FLOAT32 = "float32"
    """True float32 on every device (XLA precision HIGHEST)."""

    BFLOAT16 = "bfloat16"
    """Products of bfloat16, added up in float32."""

    FLOAT16 = "float16"
    """Products of float16, added up in float32; for devices without bfloat16."""

    INT8 = "int8"
    """Products of int8, added up in int32: a scale an output channel of the weights, one a row of
    activations."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest difference from the reference score that verify lets pass in float32."""

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
class ErrorBudget:
    """What a lower precision may cost."""

    max_score_error: float = 2e-3
    """99th percentile over golden rows of the difference from the reference score: absolute on probabilities,
    divided by max(1, |score|) on regressions."""

    max_auc_loss: float = 5e-4
    """Reference AUC minus AUC, by binary task, on labelled golden rows."""

    def __post_init__(self) -> None:
        for name in ("max_score_error", "max_auc_loss"):
            value = to_number("error budget", name, getattr(self, name))
            object.__setattr__(self, name, value)
            if value <= 0:
                raise ConfigError(f"error budget: {name} must be > 0; was {value!r}")


@dataclasses.dataclass(frozen=True)
class PrecisionPolicy:
    """How matmuls may be computed and tables kept, and how far scores may be off. Static."""

    precision: Precision | None = None
    """None: the fastest that the budget allows, by bucket ("auto"). Else this one, which then must keep to
    it."""

    tables: RowFormat | None = None
    """Of all tables. None: by table the smallest that the budget allows ("auto"), or what its spec states if
    that isn't float32."""

    tolerance: Tolerance = Tolerance()
    """Of float32 forms; verified at compile time and at every load."""

    budget: ErrorBudget = ErrorBudget()
    """Of lower precisions and smaller tables together; verified at compile time."""

    def __post_init__(self) -> None:
        if self.precision is not None:
            try:
                object.__setattr__(self, "precision", Precision(self.precision))
            except ValueError:
                allowed = ["auto", *(p.value for p in Precision)]
                raise ConfigError(f"precision: expected one of {allowed}, got {self.precision!r}") from None
        if self.tables is not None:
            try:
                object.__setattr__(self, "tables", RowFormat(self.tables))
            except ValueError:
                allowed = ["auto", *(f.value for f in RowFormat)]
                raise ConfigError(
                    f"table precision: expected one of {allowed}, got {self.tables!r}"
                ) from None
        for name, kind in (("tolerance", Tolerance), ("budget", ErrorBudget)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(
                    f"precision: {name} must be of type {kind.__name__}; was {getattr(self, name)!r}"
                )

    @classmethod
    def named(cls, name: str, budget: ErrorBudget | None = None, *, tables: str = "auto") -> PrecisionPolicy:
        """The policy of ``--precision`` and ``--table-precision``: "auto" or a name each.

        Raises:
          ConfigError: for another name.
        """
        return cls(
            None if name == "auto" else name,  # type: ignore[arg-type]
            None if tables == "auto" else tables,  # type: ignore[arg-type]
            budget=budget or ErrorBudget(),
        )
