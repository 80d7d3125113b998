"""Rules for concatenations in pieces that are put together, reshaped, moved or cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax

from xlarank.compiler.passes.pieces import concatenated, mapped, of_pieces, sliced
from xlarank.compiler.passes.rows.layout import resized
from xlarank.compiler.passes.step import Step
from xlarank.compiler.passes.values import Value

__all__ = ["LAYOUTS", "with_axis", "without_axes"]


def _concatenate(step: Step) -> list[Value] | None:
    operands = [value for value in step.operands if value.shape[step.params["dimension"]]]
    if not _are_several_kinds(operands):
        return None
    return [concatenated(step, operands, step.params["dimension"])]


def _are_several_kinds(operands: Sequence[Value]) -> bool:
    return any(value.is_once_a_request or value.pieces is not None for value in operands)


def _stack(step: Step) -> list[Value] | None:
    if not _are_several_kinds(step.operands):
        return None
    axis = step.params["axis"]
    return [concatenated(step, [with_axis(step, value, axis) for value in step.operands], axis)]


def with_axis(step: Step, value: Value, axis: int) -> Value:
    """One more axis, of size 1."""
    if value.pieces is not None:
        new_axis = value.pieces.axis + (axis <= value.pieces.axis)
        return of_pieces(step, value.pieces, new_axis, lambda piece: with_axis(step, piece, axis))
    return mapped(step, [value], lambda arrays, _: jax.lax.expand_dims(arrays[0], (axis,)))


def _unstack(step: Step) -> list[Value] | None:
    (value,), axis = step.operands, step.params["axis"]
    cuts = [sliced(step, value, axis, i, i + 1) for i in range(value.shape[axis])]
    return [without_axes(step, cut, (axis,)) for cut in cuts]


def _squeeze(step: Step) -> list[Value] | None:
    return [without_axes(step, step.operands[0], tuple(step.params["dimensions"]))]


def without_axes(step: Step, value: Value, axes: tuple[int, ...]) -> Value:
    """Without some axes of size 1."""
    if value.pieces is not None:
        new_axis = value.pieces.axis - sum(1 for a in axes if a < value.pieces.axis)
        return of_pieces(step, value.pieces, new_axis, lambda piece: without_axes(step, piece, axes))
    return mapped(step, [value], lambda arrays, _: jax.lax.squeeze(arrays[0], axes))


def _reshape(step: Step) -> list[Value] | None:
    if step.params.get("dimensions") is not None:
        return None
    context_new = step.pair.context_params["new_sizes"]
    value = _reshaped(step, step.operands[0], tuple(step.params["new_sizes"]), tuple(context_new))
    return None if value is None else [value]


def _reshaped(step: Step, value: Value, new: tuple[int, ...], context_new: tuple[int, ...]) -> Value | None:
    """A value with `new` sizes: pieces stay pieces where they fill whole entries of a new axis."""
    if value.pieces is None:
        return mapped(
            step,
            [value],
            lambda arrays, at_context: jax.lax.reshape(arrays[0], context_new if at_context else new),
        )
    axis = value.pieces.axis
    before = math.prod(value.shape[:axis])
    after = math.prod(value.shape[axis + 1 :])
    candidates = [i for i in range(len(new)) if math.prod(new[:i]) == before and new[i] > 1]
    if not candidates:
        return None
    new_axis = candidates[0]
    new_after = math.prod(new[new_axis + 1 :])
    if any(piece.shape[axis] * after % new_after for piece in value.pieces.values):
        return None

    def run(piece: Value) -> Value | None:
        size = piece.shape[axis] * after // new_after
        return _reshaped(step, piece, resized(new, new_axis, size), resized(context_new, new_axis, size))

    return of_pieces(step, value.pieces, new_axis, run)


def _transpose(step: Step) -> list[Value] | None:
    return [_transposed(step, step.operands[0], tuple(step.params["permutation"]))]


def _transposed(step: Step, value: Value, permutation: tuple[int, ...]) -> Value:
    if value.pieces is not None:
        new_axis = permutation.index(value.pieces.axis)
        return of_pieces(step, value.pieces, new_axis, lambda piece: _transposed(step, piece, permutation))
    return mapped(step, [value], lambda arrays, _: jax.lax.transpose(arrays[0], permutation))


def _broadcast(step: Step) -> list[Value] | None:
    if len(step.operands) != 1:
        return None
    shape, context_shape = step.params["shape"], step.pair.context_params["shape"]
    dims = tuple(step.params["broadcast_dimensions"])
    return [_broadcasted(step, step.operands[0], tuple(shape), tuple(context_shape), dims)]


def _broadcasted(
    step: Step, value: Value, shape: tuple[int, ...], context_shape: tuple[int, ...], dims: tuple[int, ...]
) -> Value:
    if value.pieces is None:
        return mapped(
            step,
            [value],
            lambda arrays, at_context: jax.lax.broadcast_in_dim(
                arrays[0], context_shape if at_context else shape, dims
            ),
        )
    axis = value.pieces.axis

    def run(piece: Value) -> Value:
        shapes = [resized(s, dims[axis], piece.shape[axis]) for s in (shape, context_shape)]
        return _broadcasted(step, piece, shapes[0], shapes[1], dims)

    return of_pieces(step, value.pieces, dims[axis], run)


def _slice(step: Step) -> list[Value] | None:
    (value,), params = step.operands, step.params
    strides = params["strides"] or (1,) * len(value.shape)
    for axis, cut in enumerate(zip(params["start_indices"], params["limit_indices"], strides, strict=True)):
        value = sliced(step, value, axis, *cut)
    return [value]


def _split(step: Step) -> list[Value] | None:
    (value,), axis, begin, parts = step.operands, step.params["axis"], 0, []
    for size in step.params["sizes"]:
        parts.append(sliced(step, value, axis, begin, begin + size))
        begin += size
    return parts


def _tile(step: Step) -> list[Value] | None:
    (value,), reps, context_reps = step.operands, step.params["reps"], step.pair.context_params["reps"]
    if tuple(reps) != tuple(context_reps):
        return None
    for axis, count in enumerate(reps):
        value = concatenated(step, [value] * count, axis) if count > 1 else value
    return [value]


LAYOUTS: Mapping[str, Callable[[Step], list[Value] | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
"""By primitive: its results in pieces, or None where the plain operation is as good."""
