"""One operation of a model at two row counts: `Pair`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from xlarank.compiler.passes.rows.layout import Counts, Place, fits
from xlarank.compiler.tracing import ClosedJaxpr, structural_text

__all__ = ["Pair", "is_equal", "jaxprs_of", "opened"]

# Parameters that follow the row count; the rules of these operations look at them.
_SIZES = {
    "broadcast_in_dim": {"shape"},
    "dynamic_slice": {"slice_sizes"},
    "gather": {"slice_sizes"},
    "iota": {"shape"},
    "reshape": {"new_sizes"},
    "slice": {"start_indices", "limit_indices"},
    "split": {"sizes"},
    "tile": {"reps"},
}
# Programs are followed equation by equation, so that what they say is looked at there.
_PROGRAMS = {"branches", "jaxpr", "call_jaxpr", "fun_jaxpr", "cond_jaxpr", "body_jaxpr", "length"}
_CALLERS = {"scan", "while", "cond"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same equation of two traces."""

    equation: core.JaxprEqn
    """At B rows."""

    context_equation: core.JaxprEqn
    """At the context's row count."""

    counts: Counts

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """At B rows."""
        return self.equation.params

    @property
    def context_params(self) -> dict[str, Any]:
        """At the context's row count."""
        return self.context_equation.params

    @property
    def num_results(self) -> int:
        return len(self.equation.outvars)

    def result_shapes(self, index: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a result, at both row counts."""
        equations = (self.equation, self.context_equation)
        a, b = (tuple(e.outvars[index].aval.shape) for e in equations)  # type: ignore[attr-defined]
        return a, b

    def result_fits(self, place: Place, index: int = 0) -> bool:
        """Whether a result can hold rows as `place` says."""
        return fits(place, *self.result_shapes(index), self.counts)

    def is_alike(self, *, is_call: bool = False) -> bool:
        """Whether both say the same, but for sizes that a rule looks at."""
        if self.equation.primitive is not self.context_equation.primitive:
            return False
        ignored = _SIZES.get(self.name, set())
        if is_call or self.name in _CALLERS:
            ignored = ignored | _PROGRAMS
        return self._params_equal(ignored)

    def is_same(self) -> bool:
        """Whether both say the very same."""
        return self.equation.primitive is self.context_equation.primitive and self._params_equal(set())

    def _params_equal(self, ignored: set[str]) -> bool:
        a, b = self.params, self.context_params
        return a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a.keys() - ignored)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two parameters say the same: programs by their equations and constants."""
    return a is b or structural_text(a) == structural_text(b)


def opened(program: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A program that an equation holds and its constants: an open one has none of its own."""
    if isinstance(program, ClosedJaxpr):
        return program.jaxpr, program.consts
    return program, ()


def jaxprs_of(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """Programs that an equation runs, in the order of its parameters' names."""
    return [opened(p)[0] for _, value in sorted(equation.params.items()) for p in _programs_in(value)]


def _programs_in(value: Any) -> list[Any]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, (ClosedJaxpr, core.Jaxpr))]
