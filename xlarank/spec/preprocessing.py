"""Preprocessing operations as data. `xlarank.host.preprocessing` applies them, everywhere the same.

Dense operations (`Log1p`, `Clip`, `Standardise`) map float32 to float32, element by element, in the
order given. Id operations (`Hash`, `Vocabulary`, `Bucketise`) end a chain and give row numbers of the
feature's table.

An operation whose parameters are None is *unfitted*: training fits it (`xlarank train`) and a bundle
never holds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec.fields import check_strings, from_mapping, to_integer, to_number, to_numbers, to_tuple

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

# What isn't above rounds to 0.
_HALF_OF_LEAST_FLOAT32 = 2.0**-150


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
        for name in ("low", "high"):
            object.__setattr__(self, name, to_number("clip", name, getattr(self, name)))
        if self.low > self.high:
            raise ConfigError(f"clip: expected low <= high, got {self.low} and {self.high}")


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
            if value is None:
                continue
            many = isinstance(value, (list, tuple, np.ndarray))
            object.__setattr__(self, name, to_numbers("standardise", name, value if many else (value,)))
        if (self.mean is None) != (self.std is None):
            raise ConfigError("standardise: give both mean and std, or neither to have them fitted")
        if self.mean is None or self.std is None:
            return
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                f"standardise: expected as many means as stds, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(s > _HALF_OF_LEAST_FLOAT32 for s in self.std):
            raise ConfigError(f"standardise: expected stds > 0 in float32, got {list(self.std)}")

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
        object.__setattr__(self, "seed", to_integer("hash", "seed", self.seed, least=0, below=2**64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Row = 1 + position of the value in `values`; any other value gets row 0."""

    values: tuple[int, ...] | tuple[str, ...] | None = None
    """Distinct int64 values or strings, as the feature's dtype says; None until fitted."""

    min_count: int = 1
    """Fitting keeps the values seen at least this often."""

    def __post_init__(self) -> None:
        min_count = to_integer("vocabulary", "min_count", self.min_count, least=1)
        object.__setattr__(self, "min_count", min_count)
        if self.values is None:
            return
        values = to_tuple("vocabulary", "values", self.values)
        object.__setattr__(self, "values", values)
        types = {type(value) for value in values}
        if not (types <= {int} or types <= {str}):
            names = sorted(t.__name__ for t in types)
            raise ConfigError(f"vocabulary: expected all int or all string values, got {names}")
        if len(set(values)) != len(values):
            raise ConfigError("vocabulary: expected distinct values, got repeated ones")
        if types == {int} and not -(2**63) <= min(values) <= max(values) < 2**63:
            raise ConfigError(f"vocabulary: expected int64 values, got {min(values)} to {max(values)}")
        if types == {str}:
            check_strings("vocabulary", values)

    @property
    def is_fitted(self) -> bool:
        return self.values is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucketise:
    """Row = number of boundaries <= x (so ``len(boundaries) + 1`` rows)."""

    boundaries: tuple[float, ...] | None = None
    """Ascending; None until fitted to `num_buckets` quantiles."""

    num_buckets: int | None = None
    """How many buckets fitting makes, >= 2; needed only when boundaries aren't given."""

    def __post_init__(self) -> None:
        if self.num_buckets is not None:
            num_buckets = to_integer("bucketise", "num_buckets", self.num_buckets, least=2)
            object.__setattr__(self, "num_buckets", num_buckets)
        if self.boundaries is None:
            if self.num_buckets is None:
                raise ConfigError("bucketise: give boundaries, or num_buckets to have them fitted")
            return
        object.__setattr__(self, "boundaries", to_numbers("bucketise", "boundaries", self.boundaries))
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
    fields: Any = {"op": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        raise ConfigError(f"preprocessing: expected an op's name or a table with one, got {value!r}")
    name = fields.get("op")
    if not isinstance(name, str) or name not in _OPERATIONS:
        raise ConfigError(f"preprocessing: expected an op of {sorted(_OPERATIONS)}, got {name!r}")
    parameters = {key: fields[key] for key in fields if key != "op"}
    return from_mapping(_OPERATIONS[name], parameters, f"preprocessing {name!r}")


def operation_to_dict(operation: Operation) -> dict[str, Any]:
    """Inverse of `operation_from_dict`, as JSON values."""
    fields: dict[str, Any] = {"op": _NAMES[type(operation)]}
    for field in dataclasses.fields(operation):
        value = getattr(operation, field.name)
        if value is not None:
            fields[field.name] = list(value) if isinstance(value, tuple) else value
    return fields
