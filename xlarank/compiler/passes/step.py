"""One equation at both row counts, what it reads, and how values are made of it: `Step`, `Maker`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from xlarank.compiler.passes.rows import Counts, Layout, Pair, RowAxis
from xlarank.compiler.passes.rows.layout import resized
from xlarank.compiler.passes.values import Cut, Kind, Pieces, Value
from xlarank.compiler.program import expand
from xlarank.compiler.tracing import source_of
from xlarank.spec import Bucket

__all__ = ["Expansion", "Log", "Maker", "Step", "picked_along"]


@dataclasses.dataclass(frozen=True)
class Expansion:
    """A context value that had to be repeated for its candidates."""

    operation: str
    """The equation that needed it at B rows."""

    source: str
    """The author's line of that equation."""

    shape: tuple[int, ...]
    """At B rows."""

    num_bytes: int
    """At B rows."""

    reason: str
    """In words."""


class Log:
    """What a walk has to tell."""

    def __init__(self) -> None:
        self.expansions: list[Expansion] = []
        self.hoisted: list[tuple[str, str, tuple[int, ...]]] = []
        """Operation, author's line and shape of what was computed once a request."""
        self.num_unbatched = 0
        """Batched matmuls that became one matmul of B rows."""

    def clear(self) -> None:
        """Begins anew."""
        self.expansions.clear()
        self.hoisted.clear()
        self.num_unbatched = 0


class Maker:
    """Makes values of one bucket, and repeats those that are computed once a request."""

    def __init__(
        self, bucket: Bucket, counts: Counts, request_of_row: Any, *, split_reductions: bool, log: Log
    ) -> None:
        """
        Args:
          bucket: B and Q.
          counts: B and the context's row count.
          request_of_row: [B] int32.
          split_reductions: see `hoist_context`.
          log: is told what happens.
        """
        self.bucket = bucket
        self.counts = counts
        self.split_reductions = split_reductions
        self.log = log
        self._request_of_row = request_of_row
        self._memo: dict[Any, Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], Value]) -> Value:
        """A value made once for all steps that ask for the same: siblings share what they read."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def row(self, array: Any) -> Value:
        """A ROW that is there."""
        return Value(Kind.ROW, array.shape, array.dtype, lambda: array)

    def made(self, kind: Kind, array: Any, layout: Layout) -> Value:
        """What was computed once a request; where its rows lie is known, so they can be repeated."""
        return Value(
            kind,
            layout.shape,
            array.dtype,
            lambda: self._repeated(kind, array, layout),
            at_context=array,
            layout=layout,
        )

    def _repeated(self, kind: Kind, array: Any, layout: Layout) -> Any:
        """Each row's share, from its request's."""
        place = layout.place
        if not isinstance(place, RowAxis):
            return array
        axis, inner = place.axis, place.inner
        if inner is None:
            return self._widened(jax.lax.slice_in_dim(array, 0, 1, axis=axis), axis, layout.shape[axis])
        outer = layout.shape[axis] // (self.bucket.rows * inner)
        is_merged = (outer, inner) != (1, 1)
        if is_merged:
            parts = (outer, self.counts.contexts, inner)
            array = jax.lax.reshape(array, (*array.shape[:axis], *parts, *array.shape[axis + 1 :]))
            axis += 1
        if kind is Kind.WEIGHT:  # alike for every row
            array = self._widened(jax.lax.slice_in_dim(array, 0, 1, axis=axis), axis, self.bucket.rows)
        else:
            if array.shape[axis] > self.bucket.requests:
                array = jax.lax.slice_in_dim(array, 0, self.bucket.requests, axis=axis)
            array = expand(array, self._request_of_row, self.bucket, axis)
        return jax.lax.reshape(array, layout.shape) if is_merged else array

    def _widened(self, array: Any, axis: int, size: int) -> Any:
        shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
        return jax.lax.broadcast_in_dim(array, shape, tuple(range(array.ndim)))


class Step:
    """One equation at both row counts, with its operands."""

    def __init__(self, maker: Maker, pair: Pair, operands: Sequence[Value]) -> None:
        """
        Args:
          maker: of its bucket.
          pair: the equation.
          operands: what it reads.
        """
        self.maker = maker
        self.pair = pair
        self.operands = list(operands)

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.pair.name

    @property
    def params(self) -> dict[str, Any]:
        """At B rows."""
        return self.pair.params

    @property
    def result_dtype(self) -> Any:
        """Of the first result."""
        return self.pair.equation.outvars[0].aval.dtype  # type: ignore[attr-defined]

    def rows_of(self, value: Value, reason: str = "") -> Any:
        """An operand at B rows; a context's expansion is written down."""
        if value.is_expanded:
            return value.at_rows()
        if value.pieces is not None:
            why = reason or f"the concatenation is read as a whole by {self.name}"
            for piece in _sources(value.pieces):
                self.rows_of(piece, why)
        elif value.kind is Kind.CONTEXT and isinstance(value.known_layout().place, RowAxis):
            self._note_expansion(value, reason or f"{self.name} reads the context and the candidate together")
        return value.at_rows()

    def in_pieces(self, axis: int, values: Sequence[Value]) -> Value:
        """A concatenation that isn't made unless somebody reads it whole."""
        size, pieces = sum(value.shape[axis] for value in values), Pieces(axis, tuple(values))
        return Value(
            Kind.ROW,
            (*values[0].shape[:axis], size, *values[0].shape[axis + 1 :]),
            values[0].dtype,
            lambda: _whole(pieces),
            pieces=pieces,
        )

    def note_hoisted(self, shape: tuple[int, ...]) -> None:
        """Counts work that now runs once a request; layout alone is no work."""
        if self.name not in _LAYOUT:
            self.maker.log.hoisted.append((self.name, source_of(self.pair.equation), shape))

    def _note_expansion(self, value: Value, reason: str) -> None:
        num_bytes = math.prod(value.shape) * value.dtype.itemsize
        source = source_of(self.pair.equation)
        self.maker.log.expansions.append(Expansion(self.name, source, value.shape, num_bytes, reason))


def _sources(pieces: Pieces) -> list[Value]:
    """What a concatenation is made of: its pieces or, of many that are cuts, the arrays they are cut of."""
    cuts = [value.origin for value in pieces.values]
    if all(isinstance(cut, Cut) and cut.axis == pieces.axis for cut in cuts):
        bases = list(dict.fromkeys(cut.base for cut in cuts))  # type: ignore[union-attr]
        if 2 * len(bases) < len(cuts):
            return bases
    return list(pieces.values)


def _whole(pieces: Pieces) -> Any:
    """A concatenation, made."""
    sources = _sources(pieces)
    array = jax.lax.concatenate([value.at_rows() for value in sources], pieces.axis)
    if len(sources) == len(pieces.values):
        return array
    ends = list(itertools.accumulate(source.shape[pieces.axis] for source in sources))
    begins = dict(zip(sources, [0, *ends[:-1]], strict=True))
    cuts = [value.origin for value in pieces.values]
    indices = [begins[cut.base] + np.arange(cut.begin, cut.end) for cut in cuts]  # type: ignore[union-attr]
    return picked_along(array, pieces.axis, np.concatenate(indices))


def picked_along(array: Any, axis: int, indices: np.ndarray) -> Any:
    """Entries of an array along an axis, in the order of their indices."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(a for a in range(array.ndim) if a != axis),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    return jax.lax.gather(
        array,
        indices.astype(np.int32)[:, None],
        numbers,
        slice_sizes=resized(array.shape, axis, 1),
        mode="promise_in_bounds",
    )


_LAYOUT = frozenset(
    {
        "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "reshape", "slice", "split",
        "squeeze", "stack", "tile", "transpose", "unstack",
    }
)  # fmt: skip
