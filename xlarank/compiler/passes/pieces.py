"""Makes values out of values for the rules of `hoist_context`: cut, joined, added up, left in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from xlarank.compiler.passes.rows import Layout, RowAxis, follow_program
from xlarank.compiler.passes.step import Step
from xlarank.compiler.passes.values import Kind, Value, join_kinds
from xlarank.compiler.tracing import evaluate

__all__ = ["added", "bound", "common_ends", "concatenated", "joined", "mapped", "sliced", "unbroken"]

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
    pieces = value.pieces
    if pieces is None:
        bounds = (begin, end), (_at_context(step, value, axis, begin), _at_context(step, value, axis, end))
        return mapped(
            step, [value], lambda arrays, side: jax.lax.slice_in_dim(arrays[0], *bounds[side], stride, axis)
        )
    if pieces.axis != axis:
        cuts = [sliced(step, piece, axis, begin, end, stride) for piece in pieces.values]
        return concatenated(step, cuts, pieces.axis)
    if stride != 1:
        return _cut(step, unbroken(step, value), axis, begin, end, stride)
    kept, start = [], 0
    for piece, stop in zip(pieces.values, pieces.ends, strict=True):
        low, high = max(begin, start), min(end, stop)
        if low < high:
            kept.append(sliced(step, piece, axis, low - start, high - start))
        start = stop
    return concatenated(step, kept, axis)


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
    """A concatenation, made."""
    if len(values) == 1:
        return values[0]
    return step.maker.once(
        ("joined", axis, *values),
        lambda: mapped(step, values, lambda arrays, _: jax.lax.concatenate(list(arrays), axis)),
    )


def concatenated(step: Step, values: Sequence[Value], axis: int) -> Value:
    """A concatenation, in as few pieces as keep apart what is computed once a request and what isn't."""
    flat: list[Value] = []
    for value in values:
        is_nested = value.pieces is not None and value.pieces.axis == axis
        flat += value.pieces.values if is_nested and value.pieces is not None else [value]
    merged: list[Value] = []
    for sort, run in itertools.groupby(flat, _sort):
        members = list(run)
        merged += members if sort is None else [joined(step, members, axis)]
    if len(merged) == 1:
        return merged[0]
    return step.maker.once(("pieces", axis, *merged), lambda: step.in_pieces(axis, merged))


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
