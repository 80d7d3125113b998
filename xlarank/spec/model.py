"""The root that everything hangs from: `ModelSpec`."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from xlarank.errors import ConfigError
from xlarank.spec.features import FeatureSpec, OutOfRange, TableSpec, TaskSpec
from xlarank.spec.fields import check_keys, from_mapping, to_tuple
from xlarank.spec.preprocessing import operation_to_dict

__all__ = ["ModelSpec", "rows_needed"]

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Features, tables and tasks of one model, in device-buffer order. Everything hangs from it."""

    name: str
    """Name of the model in a repository and on the wire."""

    features: tuple[FeatureSpec, ...]
    """In the order of the packed wire form and of the device buffer's columns."""

    tables: tuple[TableSpec, ...] = ()
    """Embedding tables; every one is used by a feature."""

    tasks: tuple[TaskSpec, ...]
    """At least one."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _MODEL_NAME.fullmatch(self.name):
            raise ConfigError(
                f"model: expected a name of [A-Za-z0-9_.-], at most 128 characters, got {self.name!r}"
            )
        where = f"model {self.name!r}"
        for field, cls in (("features", FeatureSpec), ("tables", TableSpec), ("tasks", TaskSpec)):
            items = to_tuple(where, field, getattr(self, field))
            for item in items:
                if not isinstance(item, cls):
                    raise ConfigError(f"{where}: {field} must be {cls.__name__}s; one was {item!r}")
            object.__setattr__(self, field, items)
        for kind, items in (
            ("feature", self.features),
            ("table", self.tables),
            ("task", self.tasks),
        ):
            if repeated := _repeated(item.name for item in items):
                raise ConfigError(f"{where}: {kind} names must be distinct; repeated: {repeated}")
        if repeated := _repeated(task.output for task in self.tasks):
            raise ConfigError(f"{where}: task outputs must be distinct; repeated: {repeated}")
        if not self.tasks:
            raise ConfigError(f"{where}: expected at least one task, got none")
        if not self.candidate_features:
            raise ConfigError(f"{where}: expected at least one feature of scope 'candidate', got none")
        self._check_tables(where)
        for feature in self.features:
            self._check_default(feature)

    @functools.cached_property
    def feature_by_name(self) -> dict[str, FeatureSpec]:
        """The features by name."""
        return {feature.name: feature for feature in self.features}

    @functools.cached_property
    def table_by_name(self) -> dict[str, TableSpec]:
        """The tables by name."""
        return {table.name: table for table in self.tables}

    @functools.cached_property
    def context_features(self) -> tuple[FeatureSpec, ...]:
        """Features of scope context, in order."""
        return tuple(f for f in self.features if f.is_context)

    @functools.cached_property
    def candidate_features(self) -> tuple[FeatureSpec, ...]:
        """Features of scope candidate, in order."""
        return tuple(f for f in self.features if not f.is_context)

    def table_of(self, feature: FeatureSpec) -> TableSpec:
        """The table that a lookup feature reads."""
        assert feature.table is not None
        return self.table_by_name[feature.table]

    @property
    def is_fitted(self) -> bool:
        """Whether every operation and table has its parameters."""
        return all(f.is_fitted for f in self.features) and all(t.rows is not None for t in self.tables)

    def check_fitted(self) -> None:
        """Raises ConfigError naming what training still has to fit."""
        unfitted = [f"feature {f.name!r}" for f in self.features if not f.is_fitted]
        unfitted += [f"rows of table {t.name!r}" for t in self.tables if t.rows is None]
        if unfitted:
            raise ConfigError(
                f"model {self.name!r} is not fitted: {', '.join(unfitted)}; `xlarank train` fits it"
            )

    def takes_requests_of(self, other: ModelSpec) -> bool:
        """Whether a request made for `other` is one of this model: all that requests are checked by is equal.

        How tables are stored (dtype, updatable), which a compile may choose anew, is no matter.
        """
        if self is other:
            return True

        def checked_by(spec: ModelSpec) -> tuple[object, ...]:
            tables = [(table.name, table.dim, table.rows, table.out_of_range) for table in spec.tables]
            return spec.name, spec.features, tables, spec.tasks

        return checked_by(self) == checked_by(other)

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` reads back to an equal spec."""
        return {
            "name": self.name,
            "features": [_feature_to_dict(feature) for feature in self.features],
            "tables": [_plain(table) for table in self.tables],
            "tasks": [_plain(task) for task in self.tasks],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Builds a spec from TOML or JSON values.

        Raises:
          ConfigError: for an unknown key, or anything that the constructors refuse.
        """
        keys = ("name", "features", "tables", "tasks")
        check_keys(value, keys, "model", required=("name", "features", "tasks"))
        where = f"model {value['name']!r}"

        def build(cls: type, key: str) -> tuple[Any, ...]:
            items = to_tuple(where, key, value.get(key, ()))
            return tuple(from_mapping(cls, item, key.removesuffix("s")) for item in items)

        return cls(
            name=value["name"],
            features=build(FeatureSpec, "features"),
            tables=build(TableSpec, "tables"),
            tasks=build(TaskSpec, "tasks"),
        )

    def _check_tables(self, where: str) -> None:
        used = {feature.table for feature in self.features if feature.is_lookup}
        known = {table.name for table in self.tables}
        if missing := sorted(str(name) for name in used - known):
            raise ConfigError(f"{where}: features name tables {missing}; it has {sorted(known)}")
        if unused := sorted(known - used):
            raise ConfigError(f"{where}: no feature reads tables {unused}")
        for feature in self.features:
            if not feature.is_lookup or self.table_of(feature).rows is None or not feature.is_fitted:
                continue
            needed = rows_needed(feature)
            if self.table_of(feature).num_rows < needed:
                raise ConfigError(
                    f"feature {feature.name!r}: its preprocessing gives {needed} rows, "
                    f"table {feature.table!r} has {self.table_of(feature).rows}"
                )

    def _check_default(self, feature: FeatureSpec) -> None:
        """Refuses a default row number that would have every request without the feature refused."""
        if feature.default is None or not feature.is_lookup or feature.preprocessing:
            return
        table = self.table_of(feature)
        if table.out_of_range is not OutOfRange.ERROR:
            return
        end = 2**63 if table.rows is None else table.rows
        defaults: Any = feature.default if feature.is_ragged else (feature.default,)
        if not all(0 <= row < end for row in defaults):
            bounds = ">= 0" if table.rows is None else f"in [0, {end})"
            raise ConfigError(
                f"feature {feature.name!r}: default must be {bounds}, a row of table {table.name!r} whose "
                f"out_of_range is 'error'; was {feature.default!r}"
            )


def rows_needed(feature: FeatureSpec) -> int:
    """Smallest number of table rows that a fitted feature's preprocessing can address."""
    if feature.vocabulary is not None:
        return 1 + len(feature.vocabulary.values or ())
    if feature.bucketise is not None:
        return 1 + len(feature.bucketise.boundaries or ())
    return 1


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def _plain(instance: Any) -> dict[str, Any]:
    fields = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    return {
        name: value.value if isinstance(value, enum.StrEnum) else value
        for name, value in fields.items()
        if value is not None
    }


def _feature_to_dict(feature: FeatureSpec) -> dict[str, Any]:
    fields = _plain(feature)
    fields["preprocessing"] = [operation_to_dict(op) for op in feature.preprocessing]
    if isinstance(feature.default, tuple):
        fields["default"] = list(feature.default)
    return fields
