"""Which candidate features a store or a file holds, and in what form: `FeatureSchema`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from xlarank.errors import ConfigError
from xlarank.host.preprocessing import truncate
from xlarank.spec import Column, FeatureSpec, ModelSpec, Ragged, RankRequest

__all__ = ["FeatureSchema", "checked_columns", "select_features", "shortened"]

_ANY_ROWS = 2**31 - 1
"""Of a table that training has yet to fit: its ids are checked when a request is made."""


@dataclasses.dataclass(frozen=True)
class FeatureSchema:
    """Candidate features in order, as the kernel's records hold them."""

    features: tuple[tuple[str, str, str, int], ...]
    """Name, kind, dtype and width of each."""

    @classmethod
    def of(cls, features: Sequence[FeatureSpec]) -> FeatureSchema:
        """The schema of candidate features."""
        return cls(tuple((f.name, f.kind.value, f.dtype.value, f.width) for f in features))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(name for name, *_ in self.features)

    @property
    def native(self) -> list[tuple[str, str, int]]:
        """What the kernel is told: kind, dtype and width."""
        return [(kind, dtype, width) for _, kind, dtype, width in self.features]

    @property
    def fingerprint(self) -> str:
        """sha256 of names, kinds, dtypes and widths: equal for what may be read as each other."""
        return hashlib.sha256(json.dumps(self.features).encode()).hexdigest()

    def max_lengths(self, spec: ModelSpec) -> list[int]:
        """Of each feature, as a model that has them states it; 0 for none."""
        return [spec.feature_by_name[name].max_length or 0 for name in self.names]

    def rows_spec(self, spec: ModelSpec) -> ModelSpec:
        """The model that has these features of `spec` alone: rows are checked against it.

        Args:
          spec: a model; tables without fitted rows take any row number.

        Raises:
          ConfigError: names the first feature that `spec` doesn't have as a candidate feature of this form.
        """
        for name, kind, dtype, width in self.features:
            feature = spec.feature_by_name.get(name)
            if feature is None or feature.is_context:
                known = [f.name for f in spec.candidate_features]
                raise ConfigError(
                    f"stored feature {name!r}: model {spec.name!r} has no such candidate feature; "
                    f"it has {known}"
                )
            found = (feature.kind.value, feature.dtype.value, feature.width)
            if found != (kind, dtype, width):
                raise ConfigError(
                    f"stored feature {name!r}: expected {_text(*found)}, as model {spec.name!r} has it, "
                    f"got {_text(kind, dtype, width)}; build the store again for this model"
                )
        features = tuple(spec.feature_by_name[name] for name in self.names)
        used = {feature.table for feature in features}
        tables = tuple(
            table if table.rows is not None else dataclasses.replace(table, rows=_ANY_ROWS)
            for table in spec.tables
            if table.name in used
        )
        return ModelSpec(name=spec.name, features=features, tables=tables, tasks=spec.tasks)


def select_features(spec: ModelSpec, without: Collection[str] = ()) -> tuple[FeatureSpec, ...]:
    """The candidate features of a model, but those that its requests bring themselves.

    Raises:
      ConfigError: if `without` names no candidate feature, or leaves none.
    """
    known = [feature.name for feature in spec.candidate_features]
    if unknown := sorted(set(without) - set(known)):
        raise ConfigError(f"model {spec.name!r} has no candidate feature {unknown[0]!r}; it has {known}")
    features = tuple(feature for feature in spec.candidate_features if feature.name not in without)
    if not features:
        raise ConfigError(f"model {spec.name!r}: expected at least one candidate feature to store, got none")
    return features


def checked_columns(rows_spec: ModelSpec, ids: np.ndarray, features: Mapping[str, Any]) -> list[Column]:
    """The columns of rows to store, one a feature of `FeatureSchema.rows_spec`, checked as a request's are.

    Args:
      rows_spec: the features, in order.
      ids: [n] int64.
      features: a value for each feature by name, as `RankRequest` takes them; one with a default may be left
        out.

    Raises:
      FeatureError: for values that a request could not have either.
    """
    return list(RankRequest(rows_spec, features, num_candidates=len(ids)).columns)


def shortened(rows_spec: ModelSpec, columns: Sequence[Column]) -> list[Column]:
    """The columns without what the model doesn't read: of a list its last `max_length` ids stay."""
    return [
        truncate(feature, column) if isinstance(column, Ragged) else column
        for feature, column in zip(rows_spec.features, columns, strict=True)
    ]


def _text(kind: str, dtype: str, width: int) -> str:
    return f"{kind} of {dtype}" + (f", width {width}" if width != 1 else "")
