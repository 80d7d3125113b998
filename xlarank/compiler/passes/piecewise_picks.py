"""Rules for concatenations in pieces that are padded, or read and written at constant indices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xlarank.compiler.passes.pieces import concatenated, joined, mapped, of_pieces, sliced, taken
from xlarank.compiler.passes.piecewise_layout import with_axis, without_axes
from xlarank.compiler.passes.rows.layout import Layout, resized
from xlarank.compiler.passes.step import Step
from xlarank.compiler.passes.values import Pieces, Value

__all__ = ["PICKS", "UPDATES"]

_MAX_PIECES = 512
"""Pieces that reads at indices may leave, one for each change of kind: past this the array is read whole."""

_MAX_LINES = 8
"""Of a grid of indices, each a piece with pieces of its own."""


# Padding


def _pad(step: Step) -> list[Value] | None:
    value, filling = step.operands
    config = [(int(low), int(high), int(inside)) for low, high, inside in step.params["padding_config"]]
    padded = _padded(step, value, filling, config, *step.pair.result_shapes())
    return None if padded is None else [padded]


def _padded(
    step: Step,
    value: Value,
    filling: Value,
    config: Sequence[tuple[int, int, int]],
    shape: tuple[int, ...],
    context_shape: tuple[int, ...],
) -> Value | None:
    """A value padded to `shape`; along the axis of its pieces the padding is one more piece at either end."""
    if value.pieces is None:
        return mapped(step, [value, filling], lambda arrays, _: jax.lax.pad(arrays[0], arrays[1], config))
    axis = value.pieces.axis
    low, high, inside = config[axis]
    if inside:
        return None
    others = [*config[:axis], (0, 0, 0), *config[axis + 1 :]]

    def run(piece: Value) -> Value | None:
        new, context_new = (resized(s, axis, piece.shape[axis]) for s in (shape, context_shape))
        return _padded(step, piece, filling, others, new, context_new)

    middle = of_pieces(step, value.pieces, axis, run)
    if middle is None:
        return None
    if middle.shape[axis] < max(0, -low) + max(0, -high):
        return None  # more is cropped than there is: padding makes up for it
    middle = sliced(step, middle, axis, max(0, -low), middle.shape[axis] - max(0, -high))
    before, after = (
        _filled(step, filling, resized(shape, axis, size), resized(context_shape, axis, size))
        for size in (low, high)
    )
    return concatenated(step, [value for value in (before, middle, after) if value is not None], axis)


def _filled(
    step: Step, filling: Value, shape: tuple[int, ...], context_shape: tuple[int, ...]
) -> Value | None:
    """One number everywhere; None where that is nowhere."""
    if min(shape) <= 0:
        return None
    return mapped(
        step,
        [filling],
        lambda arrays, at_context: jax.lax.broadcast(arrays[0], context_shape if at_context else shape),
    )


# Reads


def _gather(step: Step) -> list[Value] | None:
    value, indices = step.operands
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    axes, at = tuple(numbers.start_index_map), _constant(indices)
    if at is None or numbers.operand_batching_dims or set(numbers.collapsed_slice_dims) != set(axes):
        return None
    if any(size != (1 if a in axes else value.shape[a]) for a, size in enumerate(sizes)):
        return None
    if not at.size or (at < 0).any() or (at >= [value.shape[a] for a in axes]).any():
        return None
    batch = [a for a in range(len(step.pair.result_shapes()[0])) if a not in numbers.offset_dims]
    place = batch[0] if batch else 0
    if len(batch) > 2 or batch != list(range(place, place + len(batch))):
        return None
    if len(batch) == 2:
        picked = _picked_in_grid(step, value, axes, at, place)
    else:
        picked = _picked(step, value, axes, at.reshape(-1, len(axes)), place)
        if picked is not None and not batch:
            picked = without_axes(step, picked, (place,))
    return None if picked is None else [picked]


def _picked_in_grid(
    step: Step, value: Value, axes: Sequence[int], at: np.ndarray, place: int
) -> Value | None:
    """Entries read at a grid of indices, [I, J, axes], as pieces along the shorter of its axes."""
    outer = 0 if at.shape[0] <= max(_MAX_LINES, at.shape[1]) else 1
    if at.shape[outer] > _MAX_LINES:
        return None
    lines = [_picked(step, value, axes, picks, place) for picks in np.moveaxis(at, outer, 0)]
    if any(line is None for line in lines):
        return None
    new_axis = place + outer
    return concatenated(
        step, [with_axis(step, line, new_axis) for line in lines if line is not None], new_axis
    )


def _picked(step: Step, value: Value, axes: Sequence[int], picks: np.ndarray, new_axis: int) -> Value | None:
    """Entries of a value along some axes, which one new axis stands for: one gather a kind, put in order.

    Args:
      step: the equation.
      value: what is read.
      axes: read at indices; the others are kept.
      picks: [K, axes] indices in range.
      new_axis: of size K, where it lies in the result.
    """
    if value.pieces is None:
        return _picked_array(step, value, axes, picks, new_axis)
    axis = value.pieces.axis
    if axis not in axes:
        kept = [a for a in range(len(value.shape)) if a not in axes].index(axis)
        return of_pieces(
            step,
            value.pieces,
            kept + (kept >= new_axis),
            lambda piece: _picked(step, piece, axes, picks, new_axis),
        )
    column = list(axes).index(axis)
    groups, group_of, local = _dealt(step, value.pieces, picks[:, column])
    runs = [list(run) for _, run in itertools.groupby(range(len(picks)), lambda pick: group_of[pick])]
    if len(runs) > _MAX_PIECES:
        return None
    found: dict[int, Value] = {}
    for number, group in groups.items():
        mine = np.flatnonzero(group_of == number)
        inside = picks[mine].copy()
        inside[:, column] = local[mine]
        picked = _picked(step, group, axes, inside, new_axis)
        if picked is None:
            return None
        found[number] = picked
    taken_of, parts = dict.fromkeys(found, 0), []
    for run in runs:
        number = int(group_of[run[0]])
        begin = taken_of[number]
        taken_of[number] = begin + len(run)
        parts.append(sliced(step, found[number], new_axis, begin, begin + len(run)))
    return concatenated(step, parts, new_axis)


def _dealt(step: Step, pieces: Pieces, picks: np.ndarray) -> tuple[dict[int, Value], np.ndarray, np.ndarray]:
    """Pieces that are read, joined by kind, by number; of each pick, the number of its group, and its place
    there."""
    owners = np.searchsorted(pieces.ends, picks, side="right")
    begins = [0, *pieces.ends[:-1]]
    group_of, local = np.empty_like(picks), np.empty_like(picks)
    members: dict[Any, list[int]] = {}
    for number in np.unique(owners).tolist():
        piece = pieces.values[number]
        key = ("nested", number) if piece.pieces is not None else piece.is_once_a_request
        members.setdefault(key, []).append(number)
    groups: dict[int, Value] = {}
    for group in members.values():
        begin = 0
        for number in group:
            mine = owners == number
            group_of[mine], local[mine] = group[0], picks[mine] - begins[number] + begin
            begin += pieces.values[number].shape[pieces.axis]
        groups[group[0]] = joined(step, [pieces.values[n] for n in group], pieces.axis)
    return groups, group_of, local


def _picked_array(step: Step, value: Value, axes: Sequence[int], picks: np.ndarray, new_axis: int) -> Value:
    if len(axes) == 1 and new_axis == axes[0]:
        return taken(step, value, new_axis, picks[:, 0])
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(a for a in range(len(value.shape) - len(axes) + 1) if a != new_axis),
        collapsed_slice_dims=tuple(sorted(axes)),
        start_index_map=tuple(axes),
    )

    def run(arrays: Sequence[Any], _: bool) -> Any:
        sizes = [1 if a in axes else size for a, size in enumerate(arrays[0].shape)]
        return jax.lax.gather(arrays[0], picks.astype(np.int32), numbers, sizes, mode="promise_in_bounds")

    return mapped(step, [value], run)


def _dynamic_slice(step: Step) -> list[Value] | None:
    value, *starts = step.operands
    for axis, (start, size) in enumerate(zip(starts, step.params["slice_sizes"], strict=True)):
        if size == value.shape[axis]:
            continue  # wherever it was asked to begin
        at = _constant(start)
        if at is None:
            return None
        begin = int(np.clip(at, 0, value.shape[axis] - size))
        value = sliced(step, value, axis, begin, begin + size)
    return [value]


# Writes


def _dynamic_update_slice(step: Step) -> list[Value] | None:
    value, update, *starts = step.operands
    axes = [a for a, size in enumerate(value.shape) if update.shape[a] != size]
    at = _constant(starts[axes[0]]) if len(axes) == 1 else None
    if at is None:
        return None
    return _replaced(step, value, update, axes[0], int(np.clip(at, 0, _room(value, update, axes[0]))))


def _room(value: Value, update: Value, axis: int) -> int:
    """The last place where an update fits in."""
    return value.shape[axis] - update.shape[axis]


def _replaced(step: Step, value: Value, update: Value, axis: int, begin: int) -> list[Value] | None:
    """A value with other entries from `begin` along an axis: a piece in place of another."""
    if not _has_share_once(value) and not _has_share_once(update):
        return None
    end, size = begin + update.shape[axis], value.shape[axis]
    before = [sliced(step, value, axis, 0, begin)] if begin else []
    after = [sliced(step, value, axis, end, size)] if end < size else []
    return [concatenated(step, [*before, update, *after], axis)]


def _has_share_once(value: Value) -> bool:
    return value.is_once_a_request or value.pieces is not None


def _scatter(step: Step) -> list[Value] | None:
    value, indices, update = step.operands
    numbers, at = step.params["dimension_numbers"], _constant(indices)
    if at is None or at.size != 1 or numbers.operand_batching_dims:
        return None
    (axis,), begin = numbers.scatter_dims_to_operand_dims, int(at.reshape(()))
    if tuple(numbers.inserted_window_dims) == (axis,):  # one entry, without its axis or with it
        if update.dtype != value.dtype or len(update.shape) not in (len(value.shape) - 1, len(value.shape)):
            return None
        scattered = [a for a in range(len(update.shape)) if a not in numbers.update_window_dims]
        if scattered not in ([], [axis]):
            return None
        update = update if scattered else with_axis(step, update, axis)
    elif numbers.inserted_window_dims or len(update.shape) != len(value.shape):
        return None
    expected = resized(value.shape, axis, update.shape[axis])
    if update.shape != expected or not 0 <= begin <= _room(value, update, axis):
        return None
    return _replaced(step, value, update, axis, begin)


def _constant(value: Value) -> np.ndarray | None:
    """A small array of whole numbers that depends on nothing, the same at both row counts."""
    return None if value.layout is None else _constant_at(value.layout)


def _constant_at(layout: Layout) -> np.ndarray | None:
    if layout.constant is not None:
        return layout.constant[0] if np.array_equal(*layout.constant) else None
    columns = [_constant_at(column) for column in layout.columns or ()]
    if not columns or any(column is None for column in columns):
        return None
    return np.concatenate([column for column in columns if column is not None], axis=-1)


PICKS: Mapping[str, Callable[[Step], list[Value] | None]] = {
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
}
"""By primitive, of a value in pieces: its results, or None where the plain operation is as good."""

UPDATES: Mapping[str, Callable[[Step], list[Value] | None]] = {
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
}
"""The same for writes, of values of different kinds, which need not be in pieces."""
