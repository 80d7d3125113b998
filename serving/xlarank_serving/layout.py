"""Which tensors a model has on the wire: the one definition that server, client and ModelMetadata share.

Per feature, n = N for scope candidate and 1 for scope context:

    raw values            tensors
    float32               `f` FP32 [n], or [n, k] for a dense feature of width k
    int64, string         `f` INT64 or BYTES [n]
    lists, sequences      `f` INT64 or BYTES [V] and `f.lengths` INT32 [n]

Packed, per scope, for models with hundreds of features:

    `<scope>.dense`       FP32 [n, K]: all float32 features of the scope, bucketised ids included
    `<scope>.values`      INT64 [V]: all int64 features of the scope, one after the other
    `<scope>.lengths`     INT32 [F, n]: the number of values in each row of each of them; 1 for a plain id,
                          0 in every row for one that is left out: it has a default, or
                          candidate_ids come, and the store has it

Both follow the order of the ModelSpec, which is the order of ModelMetadata's inputs. A packed tensor holds
all features of its group; strings travel beside by name. The two forms may be mixed as long as no feature
comes twice. Another float type does for FP32, another integer type for INT64 and for lengths, and BOOL for
values of both; see `tensors`.

A model that is served with a feature store has one more, `candidate_ids` INT64 [N]: a request that brings it
may leave out candidate features, which then come from the store.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterator

from xlarank.errors import FeatureError
from xlarank.spec import CANDIDATE_IDS, FeatureSpec, ModelSpec, Scope, ValueType

__all__ = [
    "CANDIDATE_IDS_INPUT",
    "INFER_METHOD",
    "LENGTHS_SUFFIX",
    "RANKING_METHODS",
    "SERVICE_NAME",
    "STREAM_METHOD",
    "Role",
    "WireInput",
    "feature_inputs",
    "float_features",
    "id_features",
    "packed_inputs",
]

SERVICE_NAME = "inference.GRPCInferenceService"
"""Full name of the gRPC service."""

INFER_METHOD = f"/{SERVICE_NAME}/ModelInfer"
STREAM_METHOD = f"/{SERVICE_NAME}/ModelStreamInfer"
RANKING_METHODS = frozenset((INFER_METHOD, STREAM_METHOD))
"""Full names of the methods that rank."""

LENGTHS_SUFFIX = ".lengths"
"""`f.lengths` are the lengths of `f`."""

_DATATYPES = {ValueType.FLOAT32: "FP32", ValueType.INT64: "INT64", ValueType.STRING: "BYTES"}

_INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")

_ACCEPTED = {
    "FP32": ("FP32", "FP64", "FP16", "BF16", "BOOL"),
    "INT64": (*_INTEGERS, "BOOL"),
    "BYTES": ("BYTES",),
    "INT32": _INTEGERS,  # lengths
}

_EXPECTED = {
    "FP32": "FP32 or another float",
    "INT64": "INT64 or another integer",
    "BYTES": "BYTES",
    "INT32": "INT32 or another integer",
}

Form = tuple[int | str, ...]
"""A shape: a size, or a letter (N or V) for any size."""


class Role(enum.Enum):
    """What an input holds."""

    VALUES = enum.auto()
    """Values of one feature."""

    LENGTHS = enum.auto()
    """Lengths of one list or sequence."""

    PACKED_DENSE = enum.auto()
    PACKED_VALUES = enum.auto()
    PACKED_LENGTHS = enum.auto()

    CANDIDATE_IDS = enum.auto()
    """Ids of the candidates, whose features a store has."""


@dataclasses.dataclass(frozen=True)
class WireInput:
    """An input that a model accepts."""

    name: str
    datatype: str
    """As ModelMetadata states it; `accepted` may hold others."""

    forms: tuple[Form, ...]
    """Shapes that will do; ModelMetadata states the first."""

    role: Role
    scope: Scope

    where: str
    """Opening of error messages: names the feature, or the packed input."""

    @functools.cached_property
    def accepted(self) -> tuple[str, ...]:
        """Datatypes that may be sent."""
        return _ACCEPTED[self.datatype]

    @property
    def metadata_shape(self) -> tuple[int, ...]:
        """The first form, -1 for any size."""
        return tuple(size if isinstance(size, int) else -1 for size in self.forms[0])

    @functools.cached_property
    def expected(self) -> str:
        """Datatypes and shapes, in words."""
        shapes = [f"[{', '.join(map(str, form))}]" for form in self.forms]
        return f"{_EXPECTED[self.datatype]} of shape {' or '.join(shapes)}"

    @functools.cached_property
    def _tail(self) -> Form | None:
        """The first form without its rows, if their number is open."""
        rows, *tail = self.forms[0]
        return tuple(tail) if isinstance(rows, str) and not any(isinstance(s, str) for s in tail) else None

    @functools.cached_property
    def _rows_at(self) -> int | None:
        """Which size of a shape is N, if any."""
        form = self.forms[0]
        return form.index("N") if "N" in form else None

    def check_rows(self, shape: tuple[int, ...], max_candidates: int) -> None:
        """Refuses a shape that `allows` lets pass if it is of too many candidates; FeatureError."""
        if self._rows_at is not None and shape[self._rows_at] > max_candidates:
            raise FeatureError(
                f"{self.where}: expected at most {max_candidates} candidates, got {shape[self._rows_at]}; "
                f"send them in several requests"
            )

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is one of the forms."""
        # Nearly every tensor of a request is of the first form: a context's, or any number of rows.
        if shape == self.forms[0] or (shape[1:] == self._tail and shape and shape[0] >= 0):
            return True
        return any(_matches(shape, form) for form in self.forms)


CANDIDATE_IDS_INPUT = WireInput(
    CANDIDATE_IDS, "INT64", (("N",),), Role.CANDIDATE_IDS, Scope.CANDIDATE, f"input {CANDIDATE_IDS!r}"
)
"""Of models that are served with a feature store: features that a request leaves out come from there."""


def float_features(spec: ModelSpec, scope: Scope) -> tuple[FeatureSpec, ...]:
    """Features of `<scope>.dense`, in its order."""
    return _features(spec, scope, ValueType.FLOAT32)


def id_features(spec: ModelSpec, scope: Scope) -> tuple[FeatureSpec, ...]:
    """Features of `<scope>.values` and `<scope>.lengths`, in their order."""
    return _features(spec, scope, ValueType.INT64)


def feature_inputs(spec: ModelSpec) -> Iterator[WireInput]:
    """The per-feature inputs, in the order of the ModelSpec."""
    for feature in spec.features:
        rows = _rows(feature.scope)
        where = f"feature {feature.name!r}"
        forms: tuple[Form, ...] = ((rows,),)
        if feature.is_ragged:
            forms = (("V",),)
        elif feature.width > 1:
            forms = ((rows, feature.width),)
        elif not feature.is_lookup:
            forms = ((rows,), (rows, 1))
        yield WireInput(feature.name, _DATATYPES[feature.dtype], forms, Role.VALUES, feature.scope, where)
        if feature.is_ragged:
            name = feature.name + LENGTHS_SUFFIX
            yield WireInput(
                name, "INT32", ((rows,),), Role.LENGTHS, feature.scope, f"{where}: input {name!r}"
            )


def packed_inputs(spec: ModelSpec) -> Iterator[WireInput]:
    """The packed inputs; none for a group without features."""
    for scope in Scope:
        rows = _rows(scope)
        inputs: list[tuple[str, str, Form, Role]] = []
        if floats := float_features(spec, scope):
            form = (rows, sum(feature.width for feature in floats))
            inputs.append((f"{scope.value}.dense", "FP32", form, Role.PACKED_DENSE))
        if ids := id_features(spec, scope):
            inputs.append((f"{scope.value}.values", "INT64", ("V",), Role.PACKED_VALUES))
            form = (len(ids), rows)
            inputs.append((scope.value + LENGTHS_SUFFIX, "INT32", form, Role.PACKED_LENGTHS))
        for name, datatype, form, role in inputs:
            yield WireInput(name, datatype, (form,), role, scope, f"input {name!r}")


def _matches(shape: tuple[int, ...], form: Form) -> bool:
    if len(shape) != len(form):
        return False
    for got, want in zip(shape, form, strict=True):
        if got != want and (got < 0 or isinstance(want, int)):
            return False
    return True


def _features(spec: ModelSpec, scope: Scope, dtype: ValueType) -> tuple[FeatureSpec, ...]:
    return tuple(f for f in spec.features if f.scope is scope and f.dtype is dtype)


def _rows(scope: Scope) -> int | str:
    return 1 if scope is Scope.CONTEXT else "N"
