"""What `hoist_context` knows of a value while it walks a model: `Value`, `Kind`, `Pieces`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from xlarank.compiler.passes.rows import Layout

__all__ = ["Cut", "Joint", "Kind", "Pieces", "Value", "join_kinds"]


class Kind(enum.IntEnum):
    """What a value depends on; a result has the highest kind of its operands."""

    WEIGHT = 0
    """Weights and constants alone, maybe repeated along the batch axis."""

    CONTEXT = 1
    """Contexts too: Q different ones."""

    ROW = 2
    """Candidates too: B different ones."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A concatenation that is not made yet."""

    axis: int
    """Along which the pieces lie."""

    values: tuple[Value, ...]
    """In order: once a request and of the rows in turn, or in pieces along another axis."""

    @property
    def ends(self) -> list[int]:
        """Where each piece ends along the axis."""
        ends: list[int] = []
        for value in self.values:
            ends.append((ends[-1] if ends else 0) + value.shape[self.axis])
        return ends


@dataclasses.dataclass(frozen=True)
class Cut:
    """A value that is a share of another: neighbours are put together again without a copy."""

    base: Value
    axis: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Joint:
    """A value that was put together of others."""

    values: tuple[Value, ...]
    axis: int


class Value:
    """One array of the model at B rows and, unless it is a ROW, at the context's row count.

    Attributes:
      kind: what it depends on.
      shape: at B rows.
      dtype: of its elements.
      layout: where the rows lie; None for a ROW.
      pieces: the concatenation that it is, for a ROW that has parts once a request.
      origin: how it was made of other values, where that is known.
    """

    __slots__ = (
        "_at_context",
        "_at_rows",
        "_make_rows",
        "dtype",
        "kind",
        "layout",
        "origin",
        "pieces",
        "shape",
    )

    def __init__(
        self,
        kind: Kind,
        shape: Sequence[int],
        dtype: Any,
        make_rows: Callable[[], Any],
        *,
        at_context: Any = None,
        layout: Layout | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """
        Args:
          kind: what it depends on.
          shape: at B rows.
          dtype: of its elements.
          make_rows: makes the array at B rows; called once, when somebody needs it.
          at_context: the array at the context's row count; None for a ROW.
          layout: where the rows lie; None for a ROW.
          pieces: see the class.
        """
        self.kind = kind
        self.shape = tuple(shape)
        self.dtype = dtype
        self.layout = layout
        self.pieces = pieces
        self.origin: Cut | Joint | None = None
        self._at_context = at_context
        self._make_rows = make_rows
        self._at_rows: Any = None

    @property
    def is_once_a_request(self) -> bool:
        """Whether the candidates have no part in it."""
        return self.kind is not Kind.ROW

    @property
    def is_expanded(self) -> bool:
        """Whether the array at B rows was made already."""
        return self._at_rows is not None

    def at_rows(self) -> Any:
        """The array at B rows."""
        if self._at_rows is None:
            self._at_rows = self._make_rows()
        return self._at_rows

    def at_context(self) -> Any:
        """The array at the context's row count; not of a ROW."""
        assert self.is_once_a_request
        return self._at_context

    def known_layout(self) -> Layout:
        """Where the rows lie; not of a ROW."""
        assert self.layout is not None
        return self.layout


def join_kinds(values: Sequence[Value]) -> Kind:
    """The kind of what is made of these."""
    return max((value.kind for value in values), default=Kind.WEIGHT)
