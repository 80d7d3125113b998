"""Rules for matmuls of concatenations in pieces, and of candidates with what is alike for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from xlarank.compiler.passes.pieces import added, bound, common_ends, each, grouped, joined, sliced
from xlarank.compiler.passes.rows import RowAxis
from xlarank.compiler.passes.step import Step
from xlarank.compiler.passes.values import Kind, Value, join_kinds
from xlarank.compiler.tracing import evaluate

__all__ = ["dot"]


def dot(step: Step, lhs: Value, rhs: Value) -> Value | None:
    """A `dot_general` of two values; None where the plain one is as good."""
    return _split(step, lhs, rhs) or _alike_for_all(step, lhs, rhs)


def _product(step: Step, sides: Sequence[Value]) -> Value:
    """The same, made in any case."""
    return dot(step, sides[0], sides[1]) or bound(step, list(sides))


def _split(step: Step, lhs: Value, rhs: Value) -> Value | None:
    sides = (lhs, rhs)
    contracted, batched = step.params["dimension_numbers"]
    for side in (0, 1):
        pieces = sides[side].pieces
        if pieces is None:
            continue
        for shared, rule in ((contracted, _over_contracted), (batched, _over_batch)):
            if pieces.axis in shared[side]:
                other_axis = shared[1 - side][list(shared[side]).index(pieces.axis)]
                result = rule(step, sides, side, other_axis)
                break
        else:
            result = _over_free(step, sides, side)
        if result is not None:
            return result
    return None


def _ordered(side: int, value: Value, other: Value) -> tuple[Value, Value]:
    return (value, other) if side == 0 else (other, value)


def _over_free(step: Step, sides: tuple[Value, Value], side: int) -> Value | None:
    """Pieces along an axis that stays: a product a kind, put back in order."""
    value, other = sides[side], sides[1 - side]
    assert value.pieces is not None
    axis = value.pieces.axis
    if not any(_gains(step, _ordered(side, piece, other)) for piece in value.pieces.values):
        return None
    new_axis = _free_axis(step, sides, side, axis)
    return each(
        step,
        [(piece,) for piece in value.pieces.values],
        (axis,),
        new_axis,
        lambda parts: _product(step, _ordered(side, parts[0], other)),
        by_kind=True,
    )


def _free_axis(step: Step, sides: tuple[Value, Value], side: int, axis: int) -> int:
    """Where an operand's free axis lies in the result: batch axes, free ones of the left, of the right."""
    free = [_free_axes(step, sides[s], s) for s in (0, 1)]
    num_batched = len(step.params["dimension_numbers"][1][0])
    return num_batched + (len(free[0]) if side else 0) + free[side].index(axis)


def _free_axes(step: Step, value: Value, side: int) -> list[int]:
    contracted, batched = step.params["dimension_numbers"]
    return [a for a in range(len(value.shape)) if a not in contracted[side] and a not in batched[side]]


def _over_batch(step: Step, sides: tuple[Value, Value], side: int, other_axis: int) -> Value | None:
    """Pieces along an axis that both operands have."""
    value = sides[side]
    assert value.pieces is not None
    axis = value.pieces.axis
    pairs = _side_by_side(step, sides, side, other_axis)
    if not any(_gains(step, _ordered(side, *pair)) for pair in pairs):
        return None
    new_axis = list(step.params["dimension_numbers"][1][side]).index(axis)
    return each(
        step,
        pairs,
        (axis, other_axis),
        new_axis,
        lambda parts: _product(step, _ordered(side, *parts)),
        by_kind=True,
    )


def _over_contracted(step: Step, sides: tuple[Value, Value], side: int, other_axis: int) -> Value | None:
    """Pieces along an axis that is summed over: a product a kind, added up."""
    value = sides[side]
    assert value.pieces is not None
    if np.dtype(step.result_dtype).kind == "V" or step.result_dtype == np.float16:
        return None  # in half precision the order of a sum shows
    pairs = _side_by_side(step, sides, side, other_axis)
    if not any(_gains(step, _ordered(side, *pair)) for pair in pairs):
        return None
    shares = []
    for numbers in grouped(pairs).values():
        parts = [
            joined(step, [pairs[n][i] for n in numbers], axis)
            for i, axis in enumerate((value.pieces.axis, other_axis))
        ]
        shares.append(_product(step, _ordered(side, *parts)))
    return added(step, shares, jax.lax.add)


def _side_by_side(
    step: Step, sides: tuple[Value, Value], side: int, other_axis: int
) -> list[tuple[Value, Value]]:
    """Both operands cut where either has the end of a piece."""
    value, other = sides[side], sides[1 - side]
    assert value.pieces is not None
    axes, begin, pairs = (value.pieces.axis, other_axis), 0, []
    for end in common_ends((value, other), axes):
        cuts = zip((value, other), axes, strict=True)
        one, two = (sliced(step, operand, axis, begin, end) for operand, axis in cuts)
        pairs.append((one, two))
        begin = end
    return pairs


def _gains(step: Step, sides: tuple[Value, Value]) -> bool:
    """Whether a product is cheaper by itself: once a request, or without its batch axis."""
    if any(side.pieces is not None for side in sides):
        one, other = sides if sides[0].pieces is not None else sides[::-1]
        assert one.pieces is not None
        if other.pieces is not None or other.is_once_a_request:
            return True
        return any(_gains(step, _replaced(sides, one, piece)) for piece in one.pieces.values)
    return join_kinds(sides) is not Kind.ROW or any(_is_alike_for_all(step, sides, s) for s in (0, 1))


def _replaced(sides: tuple[Value, Value], old: Value, new: Value) -> tuple[Value, Value]:
    return (new, sides[1]) if sides[0] is old else (sides[0], new)


def _is_alike_for_all(step: Step, sides: Sequence[Value], side: int) -> bool:
    """Whether an operand is the same for all rows of the other, with a batch axis only to pair with them."""
    value = sides[side]
    alike = value.kind is Kind.WEIGHT or (value.kind is Kind.CONTEXT and step.maker.bucket.requests == 1)
    if not alike or sides[1 - side].is_once_a_request:
        return False
    place = value.known_layout().place
    if not isinstance(place, RowAxis) or place.inner != 1:
        return False
    return (
        value.shape[place.axis] == step.maker.bucket.rows
        and place.axis in step.params["dimension_numbers"][1][side]
    )


def _alike_for_all(step: Step, lhs: Value, rhs: Value) -> Value | None:
    """A batched matmul with what is alike for all rows, without its batch axis: one matmul of B rows."""
    sides = (lhs, rhs)
    side = next((s for s in (0, 1) if _is_alike_for_all(step, sides, s)), None)
    if side is None:
        return None
    value, other = sides[side], sides[1 - side]
    place = value.known_layout().place
    assert isinstance(place, RowAxis)
    contracted, batched = step.params["dimension_numbers"]
    position = list(batched[side]).index(place.axis)
    other_axis = batched[1 - side][position]
    array = value.at_context()
    array = jax.lax.squeeze(jax.lax.slice_in_dim(array, 0, 1, axis=place.axis), (place.axis,))

    def lowered(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(a - (a > place.axis) for a in axes if a != place.axis)

    new_contracted, new_batched = list(contracted), list(batched)
    new_contracted[side], new_batched[side] = lowered(contracted[side]), lowered(batched[side])
    new_batched[1 - side] = tuple(a for a in batched[1 - side] if a != other_axis)
    operands = [array, array]
    operands[1 - side] = step.rows_of(other)
    numbers = (tuple(new_contracted), tuple(new_batched))
    (result,) = evaluate(step.pair.equation, operands, dimension_numbers=numbers)
    # The other's batch axis is a free axis now: put it back among the batch axes.
    num_batched = len(new_batched[0])
    num_before = num_batched if side == 1 else num_batched + len(_free_axes(step, value, side))
    at = num_before + sum(1 for a in _free_axes(step, other, 1 - side) if a < other_axis)
    order = [i for i in range(result.ndim) if i != at]
    order.insert(position, at)
    step.maker.log.num_unbatched += 1
    return step.maker.row(jax.lax.transpose(result, order))
