"""What a model reads, looks up and answers: `FeatureSpec`, `TableSpec`, `TaskSpec`, `ModelSpec`."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from xlarank.errors import ConfigError
from xlarank.spec.preprocessing import (
    Bucketise,
    Clip,
    Hash,
    Log1p,
    Operation,
    Standardise,
    Vocabulary,
    operation_from_dict,
    operation_to_dict,
)

__all__ = [
    "Combiner",
    "FeatureKind",
    "FeatureSpec",
    "ModelSpec",
    "OutOfRange",
    "Scope",
    "TableSpec",
    "TaskKind",
    "TaskSpec",
    "ValueType",
]

_NAME = re.compile(r"[a-z][a-z0-9_]*")

# Parts of wire names and of the Flax activations that a feature may not take.
_RESERVED_NAMES = ("context", "candidate")


class FeatureKind(enum.StrEnum):
    """What one row of a feature holds."""

    DENSE = "dense"
    """`width` floats."""

    ID = "id"
    """One id, looked up: [D]."""

    ID_LIST = "id_list"
    """A bag of ids, looked up and pooled by the combiner: [D]. An empty bag gives zeros."""

    SEQUENCE = "sequence"
    """Ids in order, looked up and kept apart: [L, D] and a mask [L]."""


class Scope(enum.StrEnum):
    """How often a feature arrives."""

    CONTEXT = "context"
    """Once a request: the user and the moment."""

    CANDIDATE = "candidate"
    """Once a candidate."""


class ValueType(enum.StrEnum):
    """Type of a feature's raw values, on the wire and in data."""

    FLOAT32 = "float32"
    INT64 = "int64"
    STRING = "string"


class Combiner(enum.StrEnum):
    """How the rows of a bag become one vector."""

    SUM = "sum"
    MEAN = "mean"
    """Sum over the number of ids in the bag."""

    SQRTN = "sqrtn"
    """Sum over the square root of the number of ids in the bag."""


class OutOfRange(enum.StrEnum):
    """What becomes of a row number outside [0, R)."""

    ERROR = "error"
    """The request is refused."""

    ZERO = "zero"
    """It reads as a row of zeros, and counts in mean and sqrtn."""

    CLIP = "clip"
    """The nearest row number in range."""

    HASH = "hash"
    """XXH64 of its 8 bytes, seed 0, mod R."""


class TaskKind(enum.StrEnum):
    """How a task's logit becomes its score."""

    BINARY = "binary"
    """Score = sigmoid(logit), a probability."""

    REGRESSION = "regression"
    """Score = logit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One embedding table in host memory."""

    name: str
    """[a-z][a-z0-9_]*."""

    dim: int
    """D, floats a row."""

    rows: int | None = None
    """R; None until training fits it to the vocabularies and buckets that point at the table."""

    dtype: str = "float32"
    """Row format in the bundle."""

    out_of_range: OutOfRange = OutOfRange.ERROR
    """Policy for row numbers outside [0, rows)."""

    def __post_init__(self) -> None:
        _check_name("table", self.name)
        _coerce(self, "out_of_range", OutOfRange, f"table {self.name!r}")
        if self.dim < 1:
            raise ConfigError(f"table {self.name!r}: dim must be >= 1; was {self.dim}")
        if self.rows is not None and not 1 <= self.rows < 2**31:
            raise ConfigError(f"table {self.name!r}: rows must be in [1, 2**31); was {self.rows}")
        if self.dtype != "float32":
            raise ConfigError(f"table {self.name!r}: dtype must be 'float32'; was {self.dtype!r}")

    @property
    def num_rows(self) -> int:
        """R. Raises ConfigError while unfitted."""
        if self.rows is None:
            raise ConfigError(f"table {self.name!r}: rows are not fitted yet; `xlarank train` fits them")
        return self.rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One input of a model. How it is stated here is how training, reference and server treat it."""

    name: str
    """[a-z][a-z0-9_]*; also the name on the wire."""

    kind: FeatureKind
    """dense, id, id_list or sequence."""

    scope: Scope
    """context (once a request) or candidate (once a candidate)."""

    dtype: ValueType = None  # type: ignore[assignment]
    """Type of raw values: float32 for dense and bucketised ids, else int64 (default) or string."""

    width: int = 1
    """K_f, floats a row of a dense feature."""

    table: str | None = None
    """Name of the table that ids are looked up in; several features may share one."""

    combiner: Combiner | None = None
    """How an id_list is pooled."""

    max_length: int | None = None
    """L: longer bags and sequences keep their last L ids. Required for a sequence."""

    preprocessing: tuple[Operation, ...] = ()
    """Operations in order; without one, ids are row numbers."""

    default: float | int | str | tuple[int | str, ...] | None = None
    """Raw value used when the feature is left out of a request, or where a float is NaN; a tuple of
    ids for an id_list or sequence. None makes the feature required and its floats finite."""

    def __post_init__(self) -> None:
        _check_name("feature", self.name)
        where = f"feature {self.name!r}"
        if self.name in _RESERVED_NAMES:
            raise ConfigError(f"{where}: the name is reserved")
        _coerce(self, "kind", FeatureKind, where)
        _coerce(self, "scope", Scope, where)
        if self.combiner is not None:
            _coerce(self, "combiner", Combiner, where)
        operations = self.preprocessing
        if isinstance(operations, (str, Mapping)):
            raise ConfigError(f"{where}: preprocessing must be a list of operations; was {operations!r}")
        object.__setattr__(
            self,
            "preprocessing",
            tuple(operation_from_dict(op) if isinstance(op, (str, Mapping)) else op for op in operations),
        )
        if self.dtype is None:
            floats = self.kind is FeatureKind.DENSE or self.bucketise is not None
            object.__setattr__(self, "dtype", ValueType.FLOAT32 if floats else ValueType.INT64)
        _coerce(self, "dtype", ValueType, where)
        if isinstance(self.default, list):
            object.__setattr__(self, "default", tuple(self.default))
        self._check_kind(where)
        self._check_preprocessing(where)
        self._check_default(where)

    @property
    def is_lookup(self) -> bool:
        """Whether ids are looked up in a table."""
        return self.kind is not FeatureKind.DENSE

    @property
    def is_ragged(self) -> bool:
        """Whether rows hold a varying number of ids, so that lengths travel beside the values."""
        return self.kind in (FeatureKind.ID_LIST, FeatureKind.SEQUENCE)

    @property
    def hash(self) -> Hash | None:
        """The hash that makes row numbers, if any."""
        return next((op for op in self.preprocessing if isinstance(op, Hash)), None)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary that makes row numbers, if any."""
        return next((op for op in self.preprocessing if isinstance(op, Vocabulary)), None)

    @property
    def bucketise(self) -> Bucketise | None:
        """The bucketisation that makes row numbers, if any."""
        return next((op for op in self.preprocessing if isinstance(op, Bucketise)), None)

    @property
    def dense_operations(self) -> tuple[Log1p | Clip | Standardise, ...]:
        """The float-to-float operations, in order."""
        return tuple(op for op in self.preprocessing if isinstance(op, (Log1p, Clip, Standardise)))

    @property
    def is_fitted(self) -> bool:
        """Whether every operation has its parameters."""
        return all(op.is_fitted for op in self.preprocessing)

    def _check_kind(self, where: str) -> None:
        if self.kind is FeatureKind.DENSE:
            extra = [n for n in ("table", "combiner", "max_length") if getattr(self, n) is not None]
            if extra:
                raise ConfigError(f"{where}: a dense feature has no {', '.join(extra)}")
            if self.width < 1:
                raise ConfigError(f"{where}: width must be >= 1; was {self.width}")
        else:
            if self.table is None:
                raise ConfigError(f"{where}: kind {self.kind.value!r} needs a table")
            if self.width != 1:
                raise ConfigError(f"{where}: width is for dense features; was {self.width}")
        if self.kind is FeatureKind.ID_LIST and self.combiner is None:
            raise ConfigError(f"{where}: an id_list needs a combiner of {[c.value for c in Combiner]}")
        if self.kind is not FeatureKind.ID_LIST and self.combiner is not None:
            raise ConfigError(f"{where}: combiner is for kind 'id_list'; kind is {self.kind.value!r}")
        if self.kind is FeatureKind.SEQUENCE and self.max_length is None:
            raise ConfigError(f"{where}: a sequence needs max_length")
        if not self.is_ragged and self.max_length is not None:
            raise ConfigError(f"{where}: max_length is for id_list and sequence")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"{where}: max_length must be >= 1; was {self.max_length}")

    def _check_preprocessing(self, where: str) -> None:
        ops = self.preprocessing
        names = [operation_to_dict(op)["op"] for op in ops]
        if len(set(names)) != len(names):
            raise ConfigError(f"{where}: each operation may appear once, got {names}")
        before_log1p = names[: names.index("log1p")] if "log1p" in names else []
        if set(before_log1p) - {"clip"}:
            raise ConfigError(f"{where}: only clip may come before log1p, got {names}")
        to_rows = [name for name in names if name in ("hash", "vocabulary", "bucketise")]
        if self.kind is FeatureKind.DENSE:
            if to_rows:
                raise ConfigError(f"{where}: {to_rows} make row numbers; a dense feature has none")
        elif self.bucketise is not None:
            if self.kind is not FeatureKind.ID:
                raise ConfigError(f"{where}: bucketise is for kind 'id'; kind is {self.kind.value!r}")
            if names[-1] != "bucketise" or len(to_rows) > 1:
                raise ConfigError(f"{where}: bucketise must come last and alone, got {names}")
        elif len(names) > 1 or len(to_rows) != len(names):
            raise ConfigError(f"{where}: ids take one of hash, vocabulary, bucketise, got {names}")
        for op in self.dense_operations:
            means = op.mean if isinstance(op, Standardise) else None
            if means is not None and len(means) not in (1, self.width):
                raise ConfigError(f"{where}: standardise has {len(means)} means for width {self.width}")
        self._check_dtype(where)

    def _check_dtype(self, where: str) -> None:
        if self.kind is FeatureKind.DENSE or self.bucketise is not None:
            allowed = [ValueType.FLOAT32]
        elif self.hash is not None or self.vocabulary is not None:
            allowed = [ValueType.INT64, ValueType.STRING]
        else:
            allowed = [ValueType.INT64]
        if self.dtype not in allowed:
            hint = "; strings need a hash or a vocabulary" if self.dtype is ValueType.STRING else ""
            raise ConfigError(
                f"{where}: expected dtype {' or '.join(a.value for a in allowed)}, "
                f"got {self.dtype.value}{hint}"
            )
        if self.vocabulary is not None and self.vocabulary.values:
            expected = str if self.dtype is ValueType.STRING else int
            if not isinstance(self.vocabulary.values[0], expected):
                raise ConfigError(
                    f"{where}: dtype is {self.dtype.value} but the vocabulary holds "
                    f"{type(self.vocabulary.values[0]).__name__} values"
                )

    def _check_default(self, where: str) -> None:
        if self.default is None:
            return
        if self.is_ragged != isinstance(self.default, tuple):
            form = "a list of ids" if self.is_ragged else "one value"
            raise ConfigError(f"{where}: default must be {form}; was {self.default!r}")
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        types = {
            ValueType.FLOAT32: (int, float),
            ValueType.INT64: int,
            ValueType.STRING: str,
        }[self.dtype]
        for value in values:
            if not isinstance(value, types) or isinstance(value, bool) or value != value:
                raise ConfigError(
                    f"{where}: default must be of dtype {self.dtype.value}; was {self.default!r}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One answer of a model."""

    name: str
    """Key of the logit that the Flax module returns."""

    kind: TaskKind = TaskKind.BINARY
    """binary or regression."""

    output: str = ""
    """Name on the wire; the task's name when empty."""

    def __post_init__(self) -> None:
        _check_name("task", self.name)
        _coerce(self, "kind", TaskKind, f"task {self.name!r}")
        if not self.output:
            object.__setattr__(self, "output", self.name)


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
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ConfigError(f"model: expected a name of [A-Za-z0-9_.-], got {self.name!r}")
        for field in ("features", "tables", "tasks"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        where = f"model {self.name!r}"
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

    @functools.cached_property
    def feature_by_name(self) -> dict[str, FeatureSpec]:
        return {feature.name: feature for feature in self.features}

    @functools.cached_property
    def table_by_name(self) -> dict[str, TableSpec]:
        return {table.name: table for table in self.tables}

    @functools.cached_property
    def context_features(self) -> tuple[FeatureSpec, ...]:
        return tuple(f for f in self.features if f.scope is Scope.CONTEXT)

    @functools.cached_property
    def candidate_features(self) -> tuple[FeatureSpec, ...]:
        return tuple(f for f in self.features if f.scope is Scope.CANDIDATE)

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
        _check_keys(value, ("name", "features", "tables", "tasks"), "model")
        try:
            return cls(
                name=value["name"],
                features=tuple(_build(FeatureSpec, f, "feature") for f in value["features"]),
                tables=tuple(_build(TableSpec, t, "table") for t in value.get("tables", ())),
                tasks=tuple(_build(TaskSpec, t, "task") for t in value["tasks"]),
            )
        except KeyError as error:
            raise ConfigError(f"model: missing key {error}") from error

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


def rows_needed(feature: FeatureSpec) -> int:
    """Smallest number of table rows that a fitted feature's preprocessing can address."""
    if feature.vocabulary is not None:
        return 1 + len(feature.vocabulary.values or ())
    if feature.bucketise is not None:
        return 1 + len(feature.bucketise.boundaries or ())
    return 1


def _check_name(kind: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{kind}: expected a name of [a-z][a-z0-9_]*, got {name!r}")


def _coerce(instance: Any, field: str, enumeration: type[enum.StrEnum], where: str) -> None:
    value = getattr(instance, field)
    try:
        object.__setattr__(instance, field, enumeration(value))
    except ValueError:
        allowed = [member.value for member in enumeration]
        raise ConfigError(f"{where}: {field} must be one of {allowed}; was {value!r}") from None


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def _check_keys(value: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    if unknown := sorted(set(value) - set(known)):
        raise ConfigError(f"{where}: unknown keys {unknown}; expected of {known}")


def _build(cls: type, value: Mapping[str, Any], kind: str) -> Any:
    where = f"{kind} {value.get('name', '?')!r}"
    _check_keys(value, [field.name for field in dataclasses.fields(cls)], where)
    try:
        return cls(**value)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


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
