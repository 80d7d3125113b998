"""Makes values out of values for the rules of `hoist_context`: cut, joined, added up, left in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from xlarank.compiler.passes.rows import SAME, Layout, RowAxis, follow_program
from xlarank.compiler.passes.rows.layout import resized
from xlarank.compiler.passes.step import Step, picked_along
from xlarank.compiler.passes.values import Cut, Joint, Kind, Pieces, Value, join_kinds
from xlarank.compiler.tracing import evaluate

__all__ = [
    "added",
    "bound",
    "common_ends",
    "concatenated",
    "each",
    "grouped",
    "joined",
    "mapped",
    "of_pieces",
    "sliced",
    "taken",
    "unbroken",
]

_FEW = 8
"""Pieces up to which each is worked on by itself: more are put together by kind first."""

_FEW_CUTS = 16
"""Cuts of one array up to which they are joined; more are picked by their indices."""

Result = TypeVar("Result", bound=Value | None)
"""Of a rule: None where it finds none."""

Run = Callable[[Sequence[Any], bool], Any]
"""(arrays, whether they are at the context's row count) -> an array."""


def mapped(step: Step, operands: Sequence[Value], run: Run) -> Value:
    """What `run` makes of some operands, once a request if that is as good for every row.

    Args:
      step: the equation that it stands for.
      operands: read whole.
      run: at B rows it does what the plain program would.
    """
    kind = join_kinds(operands)
    if kind is not Kind.ROW:
        layout = _layout_of(step, operands, run)
        if layout is not None and layout.place is not None:
            array = run([value.at_context() for value in operands], True)
            if kind is Kind.CONTEXT:
                step.note_hoisted(array.shape)
            return step.maker.made(kind, array, layout)
    return step.maker.row(run([step.rows_of(value) for value in operands], False))


def _layout_of(step: Step, operands: Sequence[Value], run: Run) -> Layout | None:
    layouts = [value.known_layout() for value in operands]
    if any(layout.place is None for layout in layouts):
        return None
    programs: list[Any] = []
    for at_context in (False, True):
        shapes = [layout.context_shape if at_context else layout.shape for layout in layouts]
        avals = [jax.ShapeDtypeStruct(s, v.dtype) for s, v in zip(shapes, operands, strict=True)]
        try:
            programs.append(jax.make_jaxpr(lambda *arrays: run(arrays, at_context))(*avals))  # noqa: B023
        except (TypeError, ValueError):  # the same can't be done to one request's share
            return None
    results = follow_program(programs[0], programs[1], layouts, step.maker.counts)
    return results[0] if results else None


def bound(step: Step, operands: Sequence[Value], **changed: Any) -> Value:
    """The equation itself, bound to other operands; `changed` parameters are the same at both row counts."""

    def run(arrays: Sequence[Any], at_context: bool) -> Any:
        equation = step.pair.context_equation if at_context else step.pair.equation
        return evaluate(equation, arrays, **changed)[0]

    return mapped(step, operands, run)


def sliced(step: Step, value: Value, axis: int, begin: int, end: int, stride: int = 1) -> Value:
    """Entries ``[begin, end)`` along an axis; of a concatenation, its pieces' share."""
    if (begin, end, stride) == (0, value.shape[axis], 1):
        return value
    return step.maker.once(
        ("cut", value, axis, begin, end, stride), lambda: _cut(step, value, axis, begin, end, stride)
    )


def _cut(step: Step, value: Value, axis: int, begin: int, end: int, stride: int) -> Value:
    pieces, origin = value.pieces, value.origin
    if isinstance(origin, Cut) and origin.axis == axis and stride == 1:
        return sliced(step, origin.base, axis, origin.begin + begin, origin.begin + end)
    if isinstance(origin, Joint) and origin.axis == axis and stride == 1:
        return joined(step, _shares(step, origin.values, axis, begin, end), axis)
    if pieces is None:
        return _cut_array(step, value, axis, begin, end, stride)
    if pieces.axis != axis:
        cuts = [sliced(step, piece, axis, begin, end, stride) for piece in pieces.values]
        return concatenated(step, cuts, pieces.axis)
    if stride != 1:
        return _cut(step, unbroken(step, value), axis, begin, end, stride)
    return concatenated(step, _shares(step, pieces.values, axis, begin, end), axis)


def _shares(step: Step, values: Sequence[Value], axis: int, begin: int, end: int) -> list[Value]:
    """Entries ``[begin, end)`` of values that lie side by side."""
    kept, start = [], 0
    for value in values:
        stop = start + value.shape[axis]
        low, high = max(begin, start), min(end, stop)
        if low < high:
            kept.append(sliced(step, value, axis, low - start, high - start))
        start = stop
    return kept or [sliced(step, values[0], axis, 0, 0)]


def _cut_array(step: Step, value: Value, axis: int, begin: int, end: int, stride: int) -> Value:
    layout = value.layout
    place = layout.place if layout is not None else None
    is_beside_rows = place is SAME or (isinstance(place, RowAxis) and place.axis != axis)
    if layout is not None and is_beside_rows and layout.constant is None:
        # What `mapped` would find out in many times the time.
        array = jax.lax.slice_in_dim(value.at_context(), begin, end, stride, axis)
        shape, context_shape = (
            resized(shape, axis, array.shape[axis]) for shape in (layout.shape, layout.context_shape)
        )
        cut = step.maker.made(value.kind, array, Layout(shape, context_shape, place))
    else:
        bounds = (begin, end), (_at_context(step, value, axis, begin), _at_context(step, value, axis, end))
        cut = mapped(
            step, [value], lambda arrays, side: jax.lax.slice_in_dim(arrays[0], *bounds[side], stride, axis)
        )
    if stride == 1:
        cut.origin = Cut(value, axis, begin, end)
    return cut


def _at_context(step: Step, value: Value, axis: int, place: int) -> int:
    """Where an axis is cut at the context's row count: the rows' own axis has another size there."""
    rows = value.layout.place if value.layout is not None else None
    if not isinstance(rows, RowAxis) or rows.axis != axis:
        return place
    return place * step.maker.counts.contexts // step.maker.counts.rows


def unbroken(step: Step, value: Value) -> Value:
    """A value without pieces."""
    return value if value.pieces is None else step.maker.row(step.rows_of(value))


def joined(step: Step, values: Sequence[Value], axis: int) -> Value:
    """A concatenation, made; of cuts of one value without a copy where they are neighbours."""
    whole: list[Value] = []
    for value in values:
        is_joint = isinstance(value.origin, Joint) and value.origin.axis == axis
        for part in value.origin.values if is_joint else (value,):  # type: ignore[union-attr]
            last, cut = (whole[-1].origin if whole else None), part.origin
            if _are_neighbours(last, cut, axis):
                whole[-1] = sliced(step, cut.base, axis, last.begin, cut.end)  # type: ignore[union-attr]
            else:
                whole.append(part)
    if len(whole) == 1:
        return whole[0]
    return step.maker.once(("joined", axis, *whole), lambda: _joined(step, whole, axis))


def _are_neighbours(a: Cut | Joint | None, b: Cut | Joint | None, axis: int) -> bool:
    if not isinstance(a, Cut) or not isinstance(b, Cut):
        return False
    return a.base is b.base and a.axis == b.axis == axis and a.end == b.begin


def _joined(step: Step, values: Sequence[Value], axis: int) -> Value:
    cuts = [value.origin for value in values if isinstance(value.origin, Cut) and value.origin.axis == axis]
    if len(values) > _FEW_CUTS and len(cuts) == len(values) and len({cut.base for cut in cuts}) == 1:
        indices = np.concatenate([np.arange(cut.begin, cut.end) for cut in cuts])
        return taken(step, cuts[0].base, axis, indices)
    value = mapped(step, values, lambda arrays, _: jax.lax.concatenate(list(arrays), axis))
    value.origin = Joint(tuple(values), axis)
    return value


def taken(step: Step, value: Value, axis: int, indices: np.ndarray) -> Value:
    """Entries along an axis of a value without pieces, in the order of indices; one may be taken twice."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    if len(runs) <= _FEW_CUTS:
        return joined(step, [sliced(step, value, axis, int(run[0]), int(run[-1]) + 1) for run in runs], axis)
    return step.maker.once(
        ("taken", value, axis, *indices.tolist()),
        lambda: mapped(step, [value], lambda arrays, _: picked_along(arrays[0], axis, indices)),
    )


def concatenated(step: Step, values: Sequence[Value], axis: int) -> Value:
    """A concatenation, in as few pieces as keep apart what is computed once a request and what isn't."""
    flat: list[Value] = []
    for value in values:
        is_nested = value.pieces is not None and value.pieces.axis == axis
        flat += value.pieces.values if is_nested and value.pieces is not None else [value]
    flat = [value for value in flat if value.shape[axis]] or flat[:1]
    merged: list[Value] = []
    for sort, run in itertools.groupby(flat, _sort):
        members = list(run)
        merged += members if sort is None else [joined(step, members, axis)]
    if len(merged) == 1:
        return merged[0]
    return step.maker.once(("pieces", axis, *merged), lambda: step.in_pieces(axis, merged))


def each(
    step: Step,
    members: Sequence[tuple[Value, ...]],
    axes: Sequence[int | None],
    new_axis: int,
    run: Callable[[tuple[Value, ...]], Result],
    *,
    by_kind: bool = False,
) -> Value | Result:
    """What `run` makes of each piece, put back in order.

    Args:
      step: the equation.
      members: one operand or more of each piece.
      axes: along which the pieces of an operand lie; None for one that is the same for all.
      new_axis: along which the results lie; each has a share of it as large as its piece's.
      run: from a piece's operands to its result.
      by_kind: give it all pieces of a kind at once, even where they are few.

    Returns:
      None where `run` finds no result.
    """
    groups = {n: [n] for n in range(len(members))}
    if by_kind or len(members) > _FEW:
        groups = grouped(members)
    measured = next(i for i, axis in enumerate(axes) if axis is not None)
    sizes = [member[measured].shape[axes[measured]] for member in members]  # type: ignore[index]
    results: dict[int, Value] = {}
    for group in groups.values():
        parts = tuple(
            members[group[0]][i] if axis is None else joined(step, [members[n][i] for n in group], axis)
            for i, axis in enumerate(axes)
        )
        result, begin = run(parts), 0
        if result is None:
            return result
        total = sum(sizes[n] for n in group)
        for n in group:
            end = begin + sizes[n] * result.shape[new_axis] // total
            results[n] = sliced(step, result, new_axis, begin, end)
            begin = end
    return concatenated(step, [results[n] for n in range(len(members))], new_axis)


def of_pieces(step: Step, pieces: Pieces, new_axis: int, run: Callable[[Value], Result]) -> Value | Result:
    """`each` of one operand's pieces."""
    members = [(piece,) for piece in pieces.values]
    return each(step, members, (pieces.axis,), new_axis, lambda parts: run(parts[0]))


def grouped(members: Sequence[tuple[Value, ...]]) -> dict[Any, list[int]]:
    """Numbers of members that can be worked on as one: of like rates; one in pieces along another axis is
    alone."""
    groups: dict[Any, list[int]] = {}
    for number, member in enumerate(members):
        is_nested = any(value.pieces is not None for value in member)
        key = number if is_nested else tuple(value.is_once_a_request for value in member)
        groups.setdefault(key, []).append(number)
    return groups


def _sort(value: Value) -> bool | None:
    """What neighbours of may be joined: None for a value that is in pieces along another axis."""
    return None if value.pieces is not None else value.is_once_a_request


def added(step: Step, shares: Sequence[Value], combine: Callable[[Any, Any], Any]) -> Value:
    """Shares of one result, put together; those once a request are put together before they are expanded."""
    shares = [unbroken(step, share) for share in shares]
    once = [share for share in shares if share.is_once_a_request]
    while len(once) > 1:
        once[:2] = [mapped(step, once[:2], lambda arrays, _: combine(*arrays))]
    rows = [share for share in shares if not share.is_once_a_request]
    if not rows:
        return once[0]
    total = rows[0].at_rows()
    for share in rows[1:]:
        total = combine(total, share.at_rows())
    for share in once:
        total = combine(
            total, step.rows_of(share, f"the context's share of {step.name} joins the candidate's")
        )
    return step.maker.row(total)


def common_ends(values: Sequence[Value], axes: Sequence[int]) -> list[int]:
    """Where any of some values that lie side by side has the end of a piece."""
    ends: set[int] = set()
    for value, axis in zip(values, axes, strict=True):
        if value.pieces is not None and value.pieces.axis == axis:
            ends |= set(value.pieces.ends)
    return sorted(ends)
