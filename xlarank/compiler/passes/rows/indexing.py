"""Where the rows lie after reads and writes at indices.

`x[jnp.arange(B), i]` has each row's own number in its indices: they aren't alike for every row, but what is
read there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from xlarank.compiler.passes.rows.layout import SAME, Layout, Place, RowAxis, is_position
from xlarank.compiler.passes.rows.pair import Pair

__all__ = ["RULES"]


@dataclasses.dataclass(frozen=True)
class _Access:
    """An array and the indices at which it is read or written."""

    array: Layout
    indices: Layout
    index_map: tuple[int, ...]
    """Axis of the array that each column of the indices counts along."""

    array_batch: tuple[int, ...]
    index_batch: tuple[int, ...]
    """Axes that go together: entry i of one with entry i of the other."""

    def row_axis(self, num_rows: int) -> RowAxis | None:
        """The axis of the indices that holds the rows, if each row's indices lead to what is its own."""
        at, place = self.indices.place, self.array.place
        if isinstance(at, RowAxis):
            if at.axis == len(self.indices.shape) - 1:
                return None
            if place is SAME:
                return at
            if not isinstance(place, RowAxis) or place.axis not in self.array_batch:
                return None
            pairs = self.index_batch[self.array_batch.index(place.axis)] == at.axis
            return at if pairs and place.inner == at.inner else None
        return self._by_number(num_rows) if at is None else None

    def _by_number(self, num_rows: int) -> RowAxis | None:
        """The same when a column of the indices is the row's number."""
        place, last = self.array.place, len(self.indices.shape) - 1
        columns = self.indices.columns or (self.indices,)
        if not isinstance(place, RowAxis) or place.axis not in self.index_map:
            return None
        if place.inner != 1 or self.array.shape[place.axis] != num_rows:
            return None
        ends = [sum(c.shape[last] for c in columns[: i + 1]) for i in range(len(columns))]
        wanted = self.index_map.index(place.axis) + 1
        if wanted not in ends or columns[ends.index(wanted)].shape[last] != 1:
            return None
        number = columns[ends.index(wanted)]
        for axis in range(last):
            if number.shape[axis] == num_rows and is_position(number, axis):
                found = RowAxis(axis)
                alike = all(c.place == found for c in columns if c is not number)
                return found if alike else None
        return None


def _gather(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    array, indices = operands
    numbers, place = pair.params["dimension_numbers"], array.place
    sizes, context_sizes = pair.params["slice_sizes"], pair.context_params["slice_sizes"]
    rows = place.axis if isinstance(place, RowAxis) else None
    if any(a != b for i, (a, b) in enumerate(zip(sizes, context_sizes, strict=True)) if i != rows):
        return None
    if indices.place is SAME and isinstance(place, RowAxis):
        removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        if place.axis in removed or place.axis in numbers.start_index_map:
            return None
        whole = (array.shape[place.axis], array.context_shape[place.axis])
        if (sizes[place.axis], context_sizes[place.axis]) != whole:
            return None
        kept = [a for a in range(len(array.shape)) if a not in removed]
        return [RowAxis(numbers.offset_dims[kept.index(place.axis)], place.inner)]
    if rows is not None and (sizes[rows], context_sizes[rows]) != (1, 1):
        return None
    found = _Access(
        array,
        indices,
        tuple(numbers.start_index_map),
        tuple(numbers.operand_batching_dims),
        tuple(numbers.start_indices_batching_dims),
    ).row_axis(pair.counts.rows)
    if found is None:
        return None
    batch_axes = [a for a in range(len(pair.result_shapes()[0])) if a not in numbers.offset_dims]
    return [RowAxis(batch_axes[found.axis], found.inner)]


def _scatter(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    array, indices, updates = operands
    numbers, place = pair.params["dimension_numbers"], array.place
    if not isinstance(place, RowAxis):
        return None  # all rows would write to one array
    removed = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    if indices.place is SAME:
        if place.axis in removed or place.axis in numbers.scatter_dims_to_operand_dims:
            return None
        kept = [a for a in range(len(array.shape)) if a not in removed]
        axis = numbers.update_window_dims[kept.index(place.axis)]
        if updates.shape[axis] != array.shape[place.axis]:
            return None
        return [place] if _holds(updates, RowAxis(axis, place.inner)) else None
    found = _Access(
        array,
        indices,
        tuple(numbers.scatter_dims_to_operand_dims),
        tuple(numbers.operand_batching_dims),
        tuple(numbers.scatter_indices_batching_dims),
    ).row_axis(pair.counts.rows)
    if found is None or place.axis not in removed:
        return None
    scattered = [a for a in range(len(updates.shape)) if a not in numbers.update_window_dims]
    return [place] if _holds(updates, RowAxis(scattered[found.axis], found.inner)) else None


def _holds(layout: Layout, place: RowAxis) -> bool:
    return layout.place in (place, RowAxis(place.axis, None))


def _dynamic_slice(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    array, starts = operands[0], operands[1:]
    place = array.place
    sizes, context_sizes = pair.params["slice_sizes"], pair.context_params["slice_sizes"]
    if not isinstance(place, RowAxis):
        return None
    # A slice of all rows begins at row 0, whatever it was asked for.
    whole = (array.shape[place.axis], array.context_shape[place.axis])
    if (sizes[place.axis], context_sizes[place.axis]) != whole:
        return None
    others = [a for a in range(len(array.shape)) if a != place.axis]
    if any(starts[a].place is not SAME or sizes[a] != context_sizes[a] for a in others):
        return None
    return [place]


def _dynamic_update_slice(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    array, update, *starts = operands
    place = array.place
    if not isinstance(place, RowAxis) or update.shape[place.axis] != array.shape[place.axis]:
        return None
    others = [a for a in range(len(array.shape)) if a != place.axis]
    return [place] if _holds(update, place) and all(starts[a].place is SAME for a in others) else None


RULES: Mapping[str, Callable[[Pair, Sequence[Layout]], Sequence[Place] | None]] = {
    **dict.fromkeys([f"scatter{n}" for n in ("", "-add", "-sub", "-mul", "-min", "-max")], _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
}
"""By primitive. These are asked even when where the rows lie in an operand isn't known."""
