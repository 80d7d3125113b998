"""Finds the operation by which a row's score depends on its place, or on its neighbours: `explain_rows`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.program import ModelTrace, Traces, read
from xlarank.compiler.reference import arguments_of
from xlarank.compiler.tracing import evaluate, source_of
from xlarank.spec import RankRequest

__all__ = ["RowFault", "explain_rows"]

_NUM_ROWS = (29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)
"""Of which one is taken that divides no size of the model's own: so rows are told from everything else."""

_REMEDY = "a score may depend on the row's own candidate and context alone"


@dataclasses.dataclass(frozen=True)
class RowFault:
    """Why equal rows have unequal scores."""

    task: str
    what: str
    """With the operation, the author's line and a remedy."""

    def __str__(self) -> str:
        return f"task {self.task!r}: {self.what}"


def explain_rows(
    traces: Traces, tables: Mapping[str, np.ndarray], requests: Sequence[RankRequest]
) -> RowFault | None:
    """Runs the model's trace op by op: on rows that are all alike, then on one row among two sets of others.

    On alike rows only a row's place can make two of them differ. That is followed back from a score to the
    first operation of which it is true; an arange that merely picks each row's own value is passed over.

    Args:
      traces: of the model.
      tables: float32 [R, D] by name.
      requests: golden ones.

    Returns:
      The first fault; None where the scores show none.
    """
    num_rows = _free_row_count(traces)
    traced, request = traces.at(num_rows), max(requests, key=lambda r: r.num_candidates)

    def values(rows: np.ndarray) -> list[Any]:
        return _values(traced, arguments_of(traces, tables, request, rows))

    alike = values(np.zeros(num_rows, np.int64))
    if found := _first(traces, traced, [_is_uneven(value, num_rows) for value in alike]):
        task, where = found
        return RowFault(
            task,
            f"a row's score depends on the row's place in the batch: {where} gives rows that are alike "
            f"other values; {_REMEDY}: use no arange over the rows, no random numbers and no weights by row",
        )
    others = np.arange(num_rows) % request.num_candidates
    among = zip(values(others), values(np.where(others == others[0], others, others[-1])), strict=True)
    if found := _first(traces, traced, [_is_moved(a, b, num_rows) for a, b in among]):
        task, where = found
        return RowFault(
            task,
            f"a row's score depends on other rows of the batch: {where} is the first that mixes them; "
            f"{_REMEDY}",
        )
    return None


def _free_row_count(traces: Traces) -> int:
    jaxpr = traces.at(2).closed.jaxpr
    atoms = [*jaxpr.invars, *jaxpr.constvars, *(var for e in jaxpr.eqns for var in e.outvars)]
    sizes = {size for atom in atoms for size in getattr(atom.aval, "shape", ()) if size}
    return next((n for n in _NUM_ROWS if all(size % n for size in sizes)), _NUM_ROWS[0])


def _variables(traced: ModelTrace) -> list[core.Var]:
    """In the order in which they get values."""
    jaxpr = traced.closed.jaxpr
    return [*jaxpr.invars, *jaxpr.constvars, *(var for e in jaxpr.eqns for var in e.outvars)]


def _values(traced: ModelTrace, inputs: Sequence[Any]) -> list[Any]:
    """Of `_variables`, as NumPy sees them."""
    closed = traced.closed
    values: dict[Any, Any] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    values |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    for equation in closed.jaxpr.eqns:
        values.update(zip(equation.outvars, evaluate(equation, read(values, equation.invars)), strict=True))
    return [_as_numbers(values[var]) for var in _variables(traced)]


def _as_numbers(value: Any) -> np.ndarray:
    if jnp.issubdtype(jax.dtypes.result_type(value), jax.dtypes.extended):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _first(traces: Traces, traced: ModelTrace, is_faulty: Sequence[bool]) -> tuple[str, str] | None:
    """The task whose score is faulty, and the first operation that it is faulty by, with its line."""
    jaxpr = traced.closed.jaxpr
    faulty = {var for var, fault in zip(_variables(traced), is_faulty, strict=True) if fault}
    made_by = {var: number for number, equation in enumerate(jaxpr.eqns) for var in equation.outvars}
    for task, score in zip(traces.spec.tasks, jaxpr.outvars, strict=True):
        if score in faulty:
            numbers = list(_back(jaxpr.eqns, made_by, faulty, score))
            if numbers:
                equation = jaxpr.eqns[min(numbers)]
                where = source_of(equation) or traces.model.source
                return task.name, f"{equation.primitive.name} at {where}"
    return None


def _back(
    equations: Sequence[core.JaxprEqn], made_by: Mapping[Any, int], faulty: set[Any], score: Any
) -> Iterator[int]:
    """Numbers of the equations that lead to a score through faulty values alone."""
    seen, todo = set(), [score]
    while todo:
        number = made_by.get(todo.pop())
        if number is not None and number not in seen:
            seen.add(number)
            yield number
            todo += [a for a in equations[number].invars if isinstance(a, core.Var) and a in faulty]


def _by_row(value: np.ndarray, num_rows: int) -> Iterator[list[np.ndarray]]:
    """For each axis that rows may lie along, the value with rows first: rows outside or inside of the
    axis."""
    for axis, size in enumerate(value.shape):
        if size and size % num_rows == 0:
            moved = np.moveaxis(value, axis, 0)
            inside = moved.reshape(size // num_rows, num_rows, -1).swapaxes(0, 1)
            yield [moved.reshape(num_rows, -1), inside.reshape(num_rows, -1)]


def _is_uneven(value: np.ndarray, num_rows: int) -> bool:
    """Whether rows differ, along any axis of theirs."""
    return any(
        all(_differ(rows, np.broadcast_to(rows[:1], rows.shape)) for rows in layouts)
        for layouts in _by_row(value, num_rows)
    )


def _is_moved(one: np.ndarray, other: np.ndarray, num_rows: int) -> bool:
    """Whether the first row differs between two values; where there are no rows, anything."""
    pairs = list(zip(_by_row(one, num_rows), _by_row(other, num_rows), strict=True))
    if not pairs:
        return _differ(one, other)
    return all(_differ(a[0], b[0]) for pair in pairs for a, b in zip(*pair, strict=True))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    """By more than the order of additions explains."""
    if not np.issubdtype(a.dtype, np.inexact):
        return not np.array_equal(a, b)
    return not np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
