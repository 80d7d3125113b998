"""Inputs and outputs of the device program: `Signature`. The compiler lowers for it, the server fills it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping

from xlarank.errors import ConfigError
from xlarank.spec.buckets import Bucket
from xlarank.spec.features import FeatureKind, Scope
from xlarank.spec.model import ModelSpec

__all__ = ["MASK_SUFFIX", "REQUEST_OF_ROW", "Leaf", "Signature", "Slot"]

MASK_SUFFIX = ".mask"
"""A sequence ``h`` reaches the model as ``h`` and ``h.mask``."""

REQUEST_OF_ROW = "request_of_row"
"""The leaf [B] int32 that gives each row's context."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the device program. Static."""

    name: str
    """``context``, ``candidate``, a sequence's name, its name and ``.mask``, or ``request_of_row``."""

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
class Signature:
    """Leaves in the order of the program's arguments, and each feature's place in them. Static.

    One matrix [Q, C] holds every dense and pooled feature of the context, one [B, C] those of the
    candidates, in the order of the ModelSpec; each sequence has a leaf [*, L, D] and a mask [*, L] bool.
    Matrices and sequences are all float32 or all bfloat16. ``request_of_row`` [B] int32 gives each row's
    context. A leaf that would be empty is left out.
    """

    leaves: tuple[Leaf, ...]
    """All leaves of scope context first, then those of scope candidate, ``request_of_row`` last."""

    slots: Mapping[str, Slot]
    """By feature name; without the features that the program doesn't read."""

    tasks: tuple[str, ...]
    """Task names; each output is [B] float32."""

    def __hash__(self) -> int:
        return hash((self.leaves, tuple(self.slots.items()), self.tasks))

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
    def of_model(cls, spec: ModelSpec, unused: Collection[str] = (), dtype: str = "float32") -> Signature:
        """The one layout that compiler, kernel and server agree on.

        Args:
          spec: the model.
          unused: names of features that the program doesn't read; they get no slot and no columns.
          dtype: of the matrices and sequences, "float32" or "bfloat16".

        Raises:
          ConfigError: for another dtype, or an unused name that is no feature's.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"activations must be 'float32' or 'bfloat16'; was {dtype!r}")
        unknown = sorted(set(unused) - {feature.name for feature in spec.features})
        if unknown:
            raise ConfigError(f"model {spec.name!r}: unused: expected names of its features, got {unknown}")
        leaves: list[Leaf] = []
        slots: dict[str, Slot] = {}
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
        leaves.append(Leaf(REQUEST_OF_ROW, Scope.CANDIDATE, (), "int32"))
        return cls(tuple(leaves), slots, tuple(task.name for task in spec.tasks))
