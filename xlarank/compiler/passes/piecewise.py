"""Rules of `hoist_context` for where candidates and contexts meet: concatenations in pieces, and matmuls.

A concatenation of several kinds stays a list of pieces through elementwise operations, layout changes,
slices, padding, and reads and writes at constant indices. A matmul or a reduction over the concatenated axis
then splits into a share of the context, computed once a request, and a share of the candidate; a matmul that
leaves the axis gives pieces again. `apply` answers None where no rule fits: then the equation runs at B rows
as the plain program would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xlarank.compiler.passes.pieces import added, bound, common_ends, each, joined, of_pieces, sliced
from xlarank.compiler.passes.piecewise_dot import dot
from xlarank.compiler.passes.piecewise_layout import LAYOUTS
from xlarank.compiler.passes.piecewise_picks import PICKS, UPDATES
from xlarank.compiler.passes.rows import ELEMENTWISE
from xlarank.compiler.passes.step import Step
from xlarank.compiler.passes.values import Value

__all__ = ["apply"]

_REDUCTIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": jax.lax.add,
    "reduce_prod": jax.lax.mul,
    "reduce_max": jax.lax.max,
    "reduce_min": jax.lax.min,
    "reduce_and": jax.lax.bitwise_and,
    "reduce_or": jax.lax.bitwise_or,
    "reduce_xor": jax.lax.bitwise_xor,
}

_ROUNDING = frozenset({"reduce_sum", "reduce_prod"})


def apply(step: Step) -> list[Value] | None:
    """The results of an equation that reads candidates, by the rules for pieces; None where none fits."""
    if step.name == "dot_general":
        value = dot(step, *step.operands)
        return None if value is None else [value]
    if step.name in ("concatenate", "stack"):
        return LAYOUTS[step.name](step)
    if step.name in UPDATES:
        return UPDATES[step.name](step)
    if not any(value.pieces for value in step.operands):
        return None
    if step.name in ELEMENTWISE:
        return [_elementwise(step, step.operands)]
    if step.name in _REDUCTIONS:
        value = _reduce(step, step.operands[0], tuple(step.params["axes"]))
        return None if value is None else [value]
    rule = LAYOUTS.get(step.name) or PICKS.get(step.name)
    return None if rule is None else rule(step)


def _elementwise(step: Step, operands: Sequence[Value]) -> Value:
    """An elementwise operation, piece by piece while a piece is left that reads no candidate."""
    leading = next((value for value in operands if value.pieces is not None), None)
    if leading is None or any(not v.is_once_a_request and v.pieces is None for v in operands):
        return bound(step, operands)
    assert leading.pieces is not None
    axis, begin, members = leading.pieces.axis, 0, []
    axes = [None if _is_repeated(value, axis) else axis for value in operands]
    for end in common_ends(operands, [axis] * len(operands)):
        cuts = zip(operands, axes, strict=True)
        members.append(tuple(v if a is None else sliced(step, v, a, begin, end) for v, a in cuts))
        begin = end
    return each(step, members, axes, axis, lambda parts: _elementwise(step, parts))


def _is_repeated(value: Value, axis: int) -> bool:
    """Whether an operand has one entry for all along an axis."""
    return not value.shape or value.shape[axis] == 1


def _reduce(step: Step, value: Value, axes: tuple[int, ...]) -> Value | None:
    pieces = value.pieces
    if pieces is None:
        return bound(step, [value])
    if pieces.axis not in axes:
        new_axis = pieces.axis - sum(1 for a in axes if a < pieces.axis)
        return of_pieces(step, pieces, new_axis, lambda piece: _reduce(step, piece, axes))
    if step.name in _ROUNDING and not (step.maker.split_reductions and _adds_up(step.result_dtype)):
        return None
    whole = [piece for piece in pieces.values if piece.pieces is None]
    groups = [[p for p in whole if p.is_once_a_request], [p for p in whole if not p.is_once_a_request]]
    parts = [joined(step, group, pieces.axis) for group in groups if group]
    parts += [piece for piece in pieces.values if piece.pieces is not None]
    shares = [_reduce(step, part, axes) for part in parts]
    if any(share is None for share in shares):
        return None
    return added(step, shares, _REDUCTIONS[step.name])  # type: ignore[arg-type]


def _adds_up(dtype: Any) -> bool:
    """Whether the order of a sum is lost in rounding: not in half precision."""
    return np.dtype(dtype).kind in "iub" or np.dtype(dtype) in (np.float32, np.float64, np.complex64)
