"""Where the rows of a batch lie in a value: `RowAxis`, `Layout`."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["SAME", "Counts", "Layout", "Place", "RowAxis", "Same", "fits", "is_position", "meet", "resized"]


@dataclasses.dataclass(frozen=True)
class RowAxis:
    """Each row has a share of its own of one axis, made of that row's inputs alone, and alike for every row.

    Of an axis of ``outer * rows * inner`` entries, entry ``(o * rows + r) * inner + i`` is row r's.
    """

    axis: int

    inner: int | None = 1
    """None: all entries along the axis are equal, however they are dealt out."""


class Same(enum.Enum):
    """Has one member, `SAME`."""

    SAME = "same"
    """No rows: the same array at any row count."""


SAME = Same.SAME

Place = RowAxis | Same | None
"""Where the rows lie; None when it isn't known: rows may have met, or a row's number may be in it."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """The two row counts that a model was traced at."""

    rows: int
    """B."""

    contexts: int
    """Q, or a little more."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A value at two row counts."""

    shape: tuple[int, ...]
    """At B rows."""

    context_shape: tuple[int, ...]
    """At the context's row count."""

    place: Place
    """Where the rows lie."""

    constant: tuple[np.ndarray, np.ndarray] | None = None
    """The array itself at both row counts, if it is a small one of whole numbers that depends on nothing."""

    columns: tuple[Layout, ...] | None = None
    """What it is put together of along its last axis, if it is an array of indices."""


def resized(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """The shape with another size along one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def fits(place: Place, shape: Sequence[int], context_shape: Sequence[int], counts: Counts) -> bool:
    """Whether two shapes can hold rows as `place` says."""
    if place is None or len(shape) != len(context_shape):
        return False
    if not isinstance(place, RowAxis):
        return tuple(shape) == tuple(context_shape)
    axis, inner = place.axis, place.inner or 1
    if not 0 <= axis < len(shape) or shape[axis] == 0:
        return False
    outer, rest = divmod(shape[axis], counts.rows * inner)
    is_split = rest == 0 and context_shape[axis] == outer * counts.contexts * inner
    return is_split and resized(shape, axis, 0) == resized(context_shape, axis, 0)


def meet(layouts: Sequence[Layout]) -> Place:
    """Where the rows lie in what is made of these place by place; operands of size 1 are repeated."""
    found: Place = SAME
    for layout in layouts:
        place = layout.place
        if place is None:
            return None
        if not isinstance(place, RowAxis) or found == place:
            continue
        if not isinstance(found, RowAxis):
            found = place
        elif found.axis == place.axis and None in (found.inner, place.inner):
            found = found if found.inner is not None else place
        else:
            return None
    return found


def constant_place(at_rows: np.ndarray, at_context: np.ndarray, counts: Counts) -> Place:
    """Where the rows lie in an array that depends on nothing, if it is the same for each."""
    if at_rows is at_context:
        return SAME
    if at_rows.shape == at_context.shape:  # to the bit: NaN is NaN
        return (
            SAME if at_rows.dtype == at_context.dtype and at_rows.tobytes() == at_context.tobytes() else None
        )
    if at_rows.ndim != at_context.ndim:
        return None
    differing = [i for i, (a, b) in enumerate(zip(at_rows.shape, at_context.shape, strict=True)) if a != b]
    if len(differing) != 1 or 0 in at_rows.shape or 0 in at_context.shape:
        return None
    axis = differing[0]
    first, total = np.take(at_rows, [0], axis), at_rows.shape[axis] // counts.rows
    if (at_rows == first).all() and (at_context == first).all():
        place = RowAxis(axis, 1 if total == 1 else None)
        return place if fits(place, at_rows.shape, at_context.shape, counts) else None
    for inner in (total, 1):
        place = RowAxis(axis, inner)
        if fits(place, at_rows.shape, at_context.shape, counts):
            shares = [
                _shares(a, place, n) for a, n in ((at_rows, counts.rows), (at_context, counts.contexts))
            ]
            one = shares[0][:1]
            if all((share == one).all() for share in shares):
                return place
    return None


def _shares(array: np.ndarray, place: RowAxis, num_rows: int) -> np.ndarray:
    """Each row's share of an array, the rows first."""
    axis, inner = place.axis, place.inner or 1
    outer = array.shape[axis] // (num_rows * inner)
    parts = array.reshape(*array.shape[:axis], outer, num_rows, inner, *array.shape[axis + 1 :])
    return np.moveaxis(parts, axis + 1, 0)


def is_position(layout: Layout, axis: int) -> bool:
    """Whether a value counts the entries along one of its axes: 0, 1, 2, ..."""
    if layout.constant is None or axis >= len(layout.shape):
        return False
    for array in layout.constant:
        shape = [1] * array.ndim
        shape[axis] = array.shape[axis]
        if not (array == np.arange(array.shape[axis]).reshape(shape)).all():
            return False
    return True


def size_after(shape: Sequence[Any], axis: int) -> int:
    """Entries behind one of an axis."""
    return math.prod(shape[axis + 1 :])
