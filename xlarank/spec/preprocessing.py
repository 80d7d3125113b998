"""Preprocessing operations as data. `xlarank.host.preprocessing` applies them, everywhere the same.

Dense operations (`Log1p`, `Clip`, `Standardise`) map float32 to float32, element by element, in the
order given. Id operations (`Hash`, `Vocabulary`, `Bucketise`) end a chain and give row numbers of the
feature's table.

An operation whose parameters are None is *unfitted*: training fits it (`xlarank train`) and a bundle
never holds one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from xlarank.errors import ConfigError

__all__ = [
    "Bucketise",
    "Clip",
    "Hash",
    "Log1p",
    "Operation",
    "Standardise",
    "Vocabulary",
    "operation_from_dict",
    "operation_to_dict",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log1p:
    """``log(1 + x)``; a request with ``x <= -1`` is refused."""

    is_fitted = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """``min(max(x, low), high)``."""

    low: float
    """Smallest value that passes."""

    high: float
    """Largest value that passes."""

    is_fitted = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ConfigError(f"clip: expected finite low <= high, got {self.low} and {self.high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardise:
    """``(x - mean) / std``, per column of the feature."""

    mean: tuple[float, ...] | None = None
    """One value, or one a column; None until fitted."""

    std: tuple[float, ...] | None = None
    """One value, or one a column, each > 0; None until fitted."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, (int, float)):
                object.__setattr__(self, name, (float(value),))
            elif value is not None:
                object.__setattr__(self, name, tuple(float(v) for v in value))
        if (self.mean is None) != (self.std is None):
            raise ConfigError("standardise: give both mean and std, or neither to have them fitted")
        if self.mean is None or self.std is None:
            return
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                f"standardise: expected as many means as stds, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(m) for m in self.mean):
            raise ConfigError(f"standardise: expected finite means, got {list(self.mean)}")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ConfigError(f"standardise: expected finite stds > 0, got {list(self.std)}")

    @property
    def is_fitted(self) -> bool:
        return self.mean is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash:
    """Row = XXH64(value, seed) mod rows of the table.

    A string is hashed as its bytes, an int64 as its 8 bytes, little-endian
    (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
    """

    seed: int = 0
    """Key of the hash, in [0, 2**64)."""

    is_fitted = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"hash: expected a seed in [0, 2**64), got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Row = 1 + position of the value in `values`; any other value gets row 0."""

    values: tuple[int, ...] | tuple[str, ...] | None = None
    """Distinct int64 values or strings, as the feature's dtype says; None until fitted."""

    min_count: int = 1
    """Fitting keeps the values seen at least this often."""

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ConfigError(f"vocabulary: min_count must be >= 1; was {self.min_count}")
        if self.values is None:
            return
        object.__setattr__(self, "values", tuple(self.values))
        if len(set(self.values)) != len(self.values):
            raise ConfigError("vocabulary: expected distinct values, got repeated ones")
        types = {type(value) for value in self.values}
        if not (types <= {int} or types <= {str}):
            names = sorted(t.__name__ for t in types)
            raise ConfigError(f"vocabulary: expected all int or all string values, got {names}")

    @property
    def is_fitted(self) -> bool:
        return self.values is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucketise:
    """Row = number of boundaries <= x (so ``len(boundaries) + 1`` rows)."""

    boundaries: tuple[float, ...] | None = None
    """Ascending; None until fitted to `num_buckets` quantiles."""

    num_buckets: int | None = None
    """How many buckets fitting makes; None when boundaries are given."""

    def __post_init__(self) -> None:
        if self.boundaries is None:
            if self.num_buckets is None or self.num_buckets < 2:
                raise ConfigError(
                    f"bucketise: give boundaries, or num_buckets >= 2; num_buckets was {self.num_buckets}"
                )
            return
        object.__setattr__(self, "boundaries", tuple(float(b) for b in self.boundaries))
        if not all(math.isfinite(b) for b in self.boundaries):
            raise ConfigError(f"bucketise: expected finite boundaries, got {list(self.boundaries)}")
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ConfigError(f"bucketise: expected ascending boundaries, got {list(self.boundaries)}")

    @property
    def is_fitted(self) -> bool:
        return self.boundaries is not None


Operation = Log1p | Clip | Standardise | Hash | Vocabulary | Bucketise

_OPERATIONS: dict[str, type[Operation]] = {
    "log1p": Log1p,
    "clip": Clip,
    "standardise": Standardise,
    "hash": Hash,
    "vocabulary": Vocabulary,
    "bucketise": Bucketise,
}
_NAMES = {cls: name for name, cls in _OPERATIONS.items()}


def operation_from_dict(value: str | Mapping[str, Any]) -> Operation:
    """Builds an operation from ``"log1p"`` or ``{"op": "clip", "low": 0, "high": 5}``.

    Raises:
      ConfigError: for an unknown operation or parameter.
    """
    fields: dict[str, Any] = {"op": value} if isinstance(value, str) else dict(value)
    name = fields.pop("op", None)
    if name not in _OPERATIONS:
        raise ConfigError(f"preprocessing: expected an op of {sorted(_OPERATIONS)}, got {name!r}")
    cls = _OPERATIONS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
        raise ConfigError(f"preprocessing {name!r}: unknown parameters {unknown}; it has {known}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"preprocessing {name!r}: {error}") from error


def operation_to_dict(operation: Operation) -> dict[str, Any]:
    """Inverse of `operation_from_dict`, as JSON values."""
    fields: dict[str, Any] = {"op": _NAMES[type(operation)]}
    for field in dataclasses.fields(operation):
        value = getattr(operation, field.name)
        if value is not None:
            fields[field.name] = list(value) if isinstance(value, Sequence) else value
    return fields
