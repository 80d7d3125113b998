"""Inputs and outputs of the device program: `Signature`. The compiler lowers for it, the server fills it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

from xlarank.errors import ConfigError
from xlarank.spec.buckets import Bucket
from xlarank.spec.features import Combiner, FeatureKind, FeatureSpec, Scope
from xlarank.spec.model import ModelSpec
from xlarank.spec.placement import TablePlacement, check_placements
from xlarank.spec.row_format import RowFormat

__all__ = ["MASK_SUFFIX", "REQUEST_OF_ROW", "DeviceLookup", "DeviceTable", "Leaf", "Signature", "Slot"]

MASK_SUFFIX = ".mask"
"""A sequence ``h`` reaches the model as ``h`` and ``h.mask``."""

REQUEST_OF_ROW = "request_of_row"
"""The leaf [B] int32 that gives each row's context."""


PLACES_SUFFIX = ".places"
"""Leaf [*, C] int32 of a feature that devices look up: places of its rows there."""

DIVISOR_SUFFIX = ".divisor"
"""Leaf [*, 1] float32: what the sum of a bag's rows is divided by."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the device program. Static."""

    name: str
    """``context``, ``candidate``, a sequence's name, its name and ``.mask``, a feature's name and ``.places``
    or ``.divisor``, or ``request_of_row``."""

    scope: Scope
    """context: leading axis Q; candidate: leading axis B."""

    tail: tuple[int, ...]
    """Shape after the leading axis."""

    dtype: str
    """numpy name: float32, bfloat16 (known to numpy once ``ml_dtypes`` is imported), bool or int32."""

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Shape in a bucket: [Q, *tail] or [B, *tail]."""
        return (self.leading(bucket), *self.tail)

    def leading(self, bucket: Bucket) -> int:
        """Q or B."""
        return bucket.requests if self.scope is Scope.CONTEXT else bucket.rows


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a feature's activation lies: columns ``[begin, end)`` of a leaf. Static."""

    leaf: str
    """Name of the leaf."""

    begin: int
    """First column; 0 for a sequence, which owns its leaf."""

    end: int
    """One past the last column."""


@dataclasses.dataclass(frozen=True)
class DeviceTable:
    """An argument of every program: rows of a table on the device, and after them a row that reads as zeros.
    Static."""

    name: str
    """Of the table."""

    num_rows: int
    """K, without the row of zeros, whose place is K."""

    dim: int
    """D."""

    format: RowFormat
    """Float formats are arrays [K + 1, D] of their own dtype, int8 and int4 encoded rows [K + 1, row_bytes]
    uint8."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array."""
        width = self.dim if self.dtype != "uint8" else self.format.row_bytes(self.dim)
        return self.num_rows + 1, width

    @property
    def dtype(self) -> str:
        """Of the array."""
        return "uint8" if self.format in (RowFormat.INT8, RowFormat.INT4) else self.format.value


@dataclasses.dataclass(frozen=True)
class DeviceLookup:
    """How the device's share of a feature's rows comes in. Static."""

    table: int
    """Index in `Signature.device_tables`."""

    places: str
    """Name of a leaf [*, C] int32: places in that table; K where there is none, or the host looks it up."""

    divisor: str | None
    """Name of a leaf [*, 1] float32; None where the rows of a bag are added up, or there is no bag."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """Leaves in the order of the program's arguments, and each feature's place in them. Static.

    One matrix [Q, C] holds every dense and pooled feature of the context, one [B, C] those of the
    candidates, in the order of the ModelSpec; each sequence has a leaf [*, L, D] and a mask [*, L] bool.
    Matrices and sequences are all float32 or all bfloat16. ``request_of_row`` [B] int32 gives each row's
    context. A leaf that would be empty is left out. Features of a table that devices hold rows of have leaves
    of their places there; their activation is what the host looked up plus what the device does.
    """

    leaves: tuple[Leaf, ...]
    """All leaves of scope context first, then those of scope candidate, ``request_of_row`` last."""

    slots: Mapping[str, Slot]
    """By feature name; without the features that the program doesn't read."""

    tasks: tuple[str, ...]
    """Task names; each output is [B] float32."""

    device_tables: tuple[DeviceTable, ...] = ()
    """Arguments of the program too."""

    lookups: Mapping[str, DeviceLookup] = dataclasses.field(default_factory=dict)
    """By feature name, of those that read `device_tables`."""

    def __hash__(self) -> int:
        return hash((self.leaves, tuple(self.slots.items()), self.tasks, self.device_tables))

    @functools.cached_property
    def leaf_by_name(self) -> dict[str, Leaf]:
        """The leaves by name."""
        return {leaf.name: leaf for leaf in self.leaves}

    @functools.cached_property
    def context_leaves(self) -> tuple[Leaf, ...]:
        """Leaves of scope context."""
        return tuple(leaf for leaf in self.leaves if leaf.scope is Scope.CONTEXT)

    @functools.cached_property
    def candidate_leaves(self) -> tuple[Leaf, ...]:
        """Leaves of scope candidate without ``request_of_row``."""
        return tuple(
            leaf for leaf in self.leaves if leaf.scope is Scope.CANDIDATE and leaf.name != REQUEST_OF_ROW
        )

    @classmethod
    def of_model(
        cls,
        spec: ModelSpec,
        unused: Collection[str] = (),
        dtype: str = "float32",
        placements: Sequence[TablePlacement] = (),
    ) -> Signature:
        """The one layout that compiler, kernel and server agree on.

        Args:
          spec: the model.
          unused: names of features that the program doesn't read; they get no slot and no columns.
          dtype: of the matrices and sequences, "float32" or "bfloat16".
          placements: of the tables that devices hold rows of.

        Raises:
          ConfigError: for another dtype, an unused name that is no feature's, or placements that don't suit
            the model.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"activations must be 'float32' or 'bfloat16'; was {dtype!r}")
        unknown = sorted(set(unused) - {feature.name for feature in spec.features})
        if unknown:
            raise ConfigError(f"model {spec.name!r}: unused: expected names of its features, got {unknown}")
        check_placements(spec, unused, placements)
        capacities = {name: c for placement in placements for name, c in placement.capacities.items()}
        table_of = {name: i for i, placement in enumerate(placements) for name in placement.capacities}
        leaves: list[Leaf] = []
        slots: dict[str, Slot] = {}
        lookups: dict[str, DeviceLookup] = {}
        for scope in (Scope.CONTEXT, Scope.CANDIDATE):
            features = [f for f in spec.features if f.scope is scope and f.name not in unused]
            column = 0
            sequences: list[Leaf] = []
            for feature in features:
                if feature.kind is FeatureKind.SEQUENCE:
                    length, dim = feature.max_length or 0, spec.table_of(feature).dim
                    sequences.append(Leaf(feature.name, scope, (length, dim), dtype))
                    sequences.append(Leaf(feature.name + MASK_SUFFIX, scope, (length,), "bool"))
                    slots[feature.name] = Slot(feature.name, 0, dim)
                    continue
                width = spec.table_of(feature).dim if feature.is_lookup else feature.width
                slots[feature.name] = Slot(scope.value, column, column + width)
                column += width
            if column:
                leaves.append(Leaf(scope.value, scope, (column,), dtype))
            leaves += sequences
            for feature in (f for f in features if f.name in capacities):
                places = Leaf(feature.name + PLACES_SUFFIX, scope, (capacities[feature.name],), "int32")
                leaves.append(places)
                divisor = None
                if _is_divided(feature):
                    divisor = feature.name + DIVISOR_SUFFIX
                    leaves.append(Leaf(divisor, scope, (1,), "float32"))
                lookups[feature.name] = DeviceLookup(table_of[feature.name], places.name, divisor)
        leaves.append(Leaf(REQUEST_OF_ROW, Scope.CANDIDATE, (), "int32"))
        tables = tuple(_device_table(spec, placement) for placement in placements)
        return cls(tuple(leaves), slots, tuple(task.name for task in spec.tasks), tables, lookups)


def _device_table(spec: ModelSpec, placement: TablePlacement) -> DeviceTable:
    table = spec.table_by_name[placement.table]
    return DeviceTable(table.name, placement.num_rows, table.dim, table.dtype)


def _is_divided(feature: FeatureSpec) -> bool:
    return feature.kind is FeatureKind.ID_LIST and feature.combiner is not Combiner.SUM
