"""What a model reads, looks up and answers: `FeatureSpec`, `TableSpec`, `TaskSpec`."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from typing import Any

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec.fields import check_name, check_strings, set_enum, to_integer, to_number
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
from xlarank.spec.row_format import RowFormat

__all__ = [
    "CANDIDATE_IDS",
    "Combiner",
    "FeatureKind",
    "FeatureSpec",
    "OutOfRange",
    "Scope",
    "TableSpec",
    "TaskKind",
    "TaskSpec",
    "ValueType",
]

_OUTPUT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")

CANDIDATE_IDS = "candidate_ids"
"""The input that names the candidates of a request, whose features a store then gives; never a feature."""

# `context.lengths` is packed, not the lengths of a feature; `request_of_row` is an input of the program.
_RESERVED_NAMES = ("context", "candidate", "request_of_row", CANDIDATE_IDS)

_INT32 = 2**31


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

    dtype: RowFormat = RowFormat.FLOAT32
    """Row format in the bundle and in host memory."""

    out_of_range: OutOfRange = OutOfRange.ERROR
    """Policy for row numbers outside [0, rows)."""

    updatable: bool = False
    """Whether rows may be written while it serves; such a table is never mapped from its file."""

    def __post_init__(self) -> None:
        check_name("table", self.name)
        where = f"table {self.name!r}"
        set_enum(self, "dtype", RowFormat, where)
        set_enum(self, "out_of_range", OutOfRange, where)
        if not isinstance(self.updatable, bool):
            raise ConfigError(f"{where}: updatable must be true or false; was {self.updatable!r}")
        object.__setattr__(self, "dim", to_integer(where, "dim", self.dim, least=1, below=_INT32))
        if self.rows is not None:
            object.__setattr__(self, "rows", to_integer(where, "rows", self.rows, least=1, below=_INT32))

    @property
    def num_rows(self) -> int:
        """R. Raises ConfigError while unfitted."""
        if self.rows is None:
            raise ConfigError(f"table {self.name!r}: rows are not fitted yet; `xlarank train` fits them")
        return self.rows

    @property
    def num_bytes(self) -> int:
        """Of all rows, encoded. Raises ConfigError while unfitted."""
        return self.num_rows * self.dtype.row_bytes(self.dim)


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
        check_name("feature", self.name)
        where = f"feature {self.name!r}"
        if self.name in _RESERVED_NAMES:
            raise ConfigError(f"{where}: the name is reserved; reserved are {list(_RESERVED_NAMES)}")
        set_enum(self, "kind", FeatureKind, where)
        set_enum(self, "scope", Scope, where)
        if self.combiner is not None:
            set_enum(self, "combiner", Combiner, where)
        object.__setattr__(self, "width", to_integer(where, "width", self.width, least=1, below=_INT32))
        if self.max_length is not None:
            max_length = to_integer(where, "max_length", self.max_length, least=1, below=_INT32)
            object.__setattr__(self, "max_length", max_length)
        object.__setattr__(self, "preprocessing", _operations(where, self.preprocessing))
        if self.dtype is None:
            floats = self.kind is FeatureKind.DENSE or self.bucketise is not None
            object.__setattr__(self, "dtype", ValueType.FLOAT32 if floats else ValueType.INT64)
        set_enum(self, "dtype", ValueType, where)
        self._check_kind(where)
        self._check_preprocessing(where)
        if self.default is not None:
            object.__setattr__(self, "default", self._checked_default(where))

    @functools.cached_property
    def is_lookup(self) -> bool:
        """Whether ids are looked up in a table."""
        return self.kind is not FeatureKind.DENSE

    @functools.cached_property
    def is_context(self) -> bool:
        """Whether it arrives once a request."""
        return self.scope is Scope.CONTEXT

    @functools.cached_property
    def array_dtype(self) -> np.dtype | None:
        """numpy dtype of raw values; None for strings."""
        return None if self.dtype is ValueType.STRING else np.dtype(self.dtype.value)

    @functools.cached_property
    def is_ragged(self) -> bool:
        """Whether rows hold a varying number of ids, so that lengths travel beside the values."""
        return self.kind in (FeatureKind.ID_LIST, FeatureKind.SEQUENCE)

    @functools.cached_property
    def hash(self) -> Hash | None:
        """The hash that makes row numbers, if any."""
        return next((op for op in self.preprocessing if isinstance(op, Hash)), None)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary that makes row numbers, if any."""
        return next((op for op in self.preprocessing if isinstance(op, Vocabulary)), None)

    @functools.cached_property
    def bucketise(self) -> Bucketise | None:
        """The bucketisation that makes row numbers, if any."""
        return next((op for op in self.preprocessing if isinstance(op, Bucketise)), None)

    @functools.cached_property
    def dense_operations(self) -> tuple[Log1p | Clip | Standardise, ...]:
        """The float-to-float operations, in order."""
        return tuple(op for op in self.preprocessing if isinstance(op, (Log1p, Clip, Standardise)))

    @functools.cached_property
    def is_fitted(self) -> bool:
        """Whether every operation has its parameters."""
        return all(op.is_fitted for op in self.preprocessing)

    @functools.cached_property
    def log1p_needs_check(self) -> bool:
        """Whether a finite value can reach log1p at -1 or below: no clip before it lifts them."""
        for operation in self.preprocessing:
            if isinstance(operation, Log1p):
                return True
            if isinstance(operation, Clip) and operation.low > -1:
                return False
        return False

    def _check_kind(self, where: str) -> None:
        if self.kind is FeatureKind.DENSE:
            extra = [n for n in ("table", "combiner", "max_length") if getattr(self, n) is not None]
            if extra:
                raise ConfigError(f"{where}: a dense feature has no {', '.join(extra)}")
        else:
            if self.table is None:
                raise ConfigError(f"{where}: kind {self.kind.value!r} needs a table")
            check_name(f"{where}: table", self.table)
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

    def _checked_default(self, where: str) -> float | int | str | tuple[int | str, ...]:
        if self.is_ragged != isinstance(self.default, (list, tuple)):
            form = "a list of ids" if self.is_ragged else "one value"
            raise ConfigError(f"{where}: default must be {form}; was {self.default!r}")
        if self.dtype is ValueType.FLOAT32:
            number = to_number(where, "default", self.default)
            if abs(number) > float(np.finfo(np.float32).max):
                raise ConfigError(f"{where}: default must fit float32; was {number}")
            if self.log1p_needs_check and number <= -1:
                raise ConfigError(f"{where}: default must be > -1, which log1p needs; was {number}")
            return number
        values = self.default if isinstance(self.default, (list, tuple)) else (self.default,)
        if self.dtype is ValueType.INT64:
            checked = tuple(
                to_integer(where, "default", value, least=-(2**63), below=2**63) for value in values
            )
        else:
            if not all(isinstance(value, str) for value in values):
                raise ConfigError(f"{where}: default must be of dtype string; was {self.default!r}")
            checked = tuple(str(value) for value in values)
            check_strings(f"{where}: default", checked)
        return checked if self.is_ragged else checked[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One answer of a model."""

    name: str
    """Key of the logit that the Flax module returns."""

    kind: TaskKind = TaskKind.BINARY
    """binary or regression."""

    output: str = ""
    """Name on the wire, of [A-Za-z0-9_.:/-]; the task's name when empty."""

    def __post_init__(self) -> None:
        check_name("task", self.name)
        set_enum(self, "kind", TaskKind, f"task {self.name!r}")
        if self.output == "":
            object.__setattr__(self, "output", self.name)
        if not isinstance(self.output, str) or not _OUTPUT.fullmatch(self.output):
            raise ConfigError(
                f"task {self.name!r}: output must be of [A-Za-z0-9_.:/-], at most 128 characters; "
                f"was {self.output!r}"
            )


def _operations(where: str, value: Any) -> tuple[Operation, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: preprocessing must be a list of operations; was {value!r}")
    try:
        return tuple(op if isinstance(op, Operation) else operation_from_dict(op) for op in value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
