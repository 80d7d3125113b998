"""Follows the rows through equations: `follow`, `follow_program`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.passes.rows import indexing, programs, shapes
from xlarank.compiler.passes.rows.layout import SAME, Counts, Layout, Place, constant_place
from xlarank.compiler.passes.rows.pair import Pair, jaxprs_of, opened
from xlarank.compiler.tracing import ClosedJaxpr, inner_jaxpr

__all__ = ["first_difference", "follow", "follow_program", "layout_of_constant"]

_MAX_CONSTANT = 1 << 16
"""Entries of an array that is kept as a constant."""


def follow(pair: Pair, operands: Sequence[Layout]) -> list[Layout]:
    """Where the rows lie in an equation's results.

    Args:
      pair: the equation at both row counts.
      operands: what it reads.

    Returns:
      One layout a result; `place` is None where nothing is sure.
    """
    constants = _folded(pair, operands)
    places = _places(pair, operands)
    layouts = []
    for index in range(pair.num_results):
        shape, context_shape = pair.result_shapes(index)
        if constants is not None:
            layouts.append(layout_of_constant(*constants, pair.counts))
            continue
        place = places[index] if places is not None else None
        place = place if pair.result_fits(place, index) else None
        layouts.append(Layout(shape, context_shape, place, columns=_columns(pair, operands)))
    return layouts


def _places(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    called = _called(pair)
    if called is not None:
        results = follow_program(*called, operands, pair.counts) if pair.is_alike(is_call=True) else None
        return None if results is None else [layout.place for layout in results]
    if all(operand.place is SAME for operand in operands) and pair.is_same():
        return [SAME] * pair.num_results
    if not pair.is_alike():
        return None
    if pair.name in programs.RULES:
        return programs.RULES[pair.name](
            pair, operands, lambda a, b, inputs: follow_program(a, b, inputs, pair.counts)
        )
    if pair.name in indexing.RULES:
        return indexing.RULES[pair.name](pair, operands)
    rule = shapes.RULES.get(pair.name)
    if rule is None or any(operand.place is None for operand in operands):
        return None
    if all(operand.place is SAME for operand in operands) and pair.name not in shapes.GROWING:
        return None
    return rule(pair, operands)


def _called(pair: Pair) -> tuple[ClosedJaxpr, ClosedJaxpr] | None:
    ours, theirs = inner_jaxpr(pair.equation), inner_jaxpr(pair.context_equation)
    return None if ours is None or theirs is None else (ours, theirs)


def follow_program(
    program: Any, context_program: Any, inputs: Sequence[Layout], counts: Counts
) -> list[Layout] | None:
    """Where the rows lie in a program's results.

    Args:
      program: at B rows; a jaxpr, closed or without constants.
      context_program: at the context's row count.
      inputs: what it is given.
      counts: the row counts.

    Returns:
      One layout a result; None where the two don't do the same in the same order.
    """
    (ours, our_consts), (theirs, their_consts) = opened(program), opened(context_program)
    if not _same_length(ours, theirs) or len(inputs) != len(ours.invars):
        return None
    if not len(ours.constvars) == len(our_consts) == len(their_consts):
        return None
    known: dict[Any, Layout] = dict(zip(ours.invars, inputs, strict=True))
    numbers: dict[Any, Any] = dict(zip(ours.invars, theirs.invars, strict=True))
    numbers |= dict(zip(ours.constvars, theirs.constvars, strict=True))
    for var, a, b in zip(ours.constvars, our_consts, their_consts, strict=True):
        known[var] = layout_of_constant(a, b, counts)

    def read(atom: Any, other: Any) -> Layout | None:
        if isinstance(atom, core.Literal) != isinstance(other, core.Literal):
            return None
        if isinstance(atom, core.Literal):
            return layout_of_constant(atom.val, other.val, counts)
        return known[atom] if numbers[atom] is other else None

    for equation, context_equation in zip(ours.eqns, theirs.eqns, strict=True):
        if not same_form(equation, context_equation):
            return None
        operands = [read(a, b) for a, b in zip(equation.invars, context_equation.invars, strict=True)]
        if any(operand is None for operand in operands):
            return None
        results = follow(Pair(equation, context_equation, counts), operands)  # type: ignore[arg-type]
        known.update(zip(equation.outvars, results, strict=True))
        numbers.update(zip(equation.outvars, context_equation.outvars, strict=True))
    results = [read(a, b) for a, b in zip(ours.outvars, theirs.outvars, strict=True)]
    return None if any(result is None for result in results) else results  # type: ignore[return-value]


def same_form(a: core.JaxprEqn, b: core.JaxprEqn) -> bool:
    """Whether two equations do the same to arrays of as many axes."""
    return (
        a.primitive is b.primitive
        and len(a.invars) == len(b.invars)
        and all(_same_ndim(x, y) for x, y in zip(a.invars, b.invars, strict=True))
        and len(a.outvars) == len(b.outvars)
        and all(_same_ndim(x, y) for x, y in zip(a.outvars, b.outvars, strict=True))
    )


def first_difference(
    ours: core.Jaxpr, theirs: core.Jaxpr
) -> tuple[core.JaxprEqn | None, core.JaxprEqn | None] | None:
    """Where two traces of a model part: the first equations that do something else, or read something else.

    Returns:
      The two, None for the end of a trace; None when they do the same all the way, programs inside included.
    """
    numbers: dict[Any, Any] = dict(zip(ours.invars, theirs.invars, strict=False))
    numbers |= dict(zip(ours.constvars, theirs.constvars, strict=False))

    def reads_the_same(a: Any, b: Any) -> bool:
        return isinstance(b, core.Literal) if isinstance(a, core.Literal) else numbers.get(a) is b

    for a, b in itertools.zip_longest(ours.eqns, theirs.eqns):
        if a is None or b is None or not same_form(a, b):
            return a, b
        if not all(map(reads_the_same, a.invars, b.invars)):
            return a, b
        inner = zip(jaxprs_of(a), jaxprs_of(b), strict=False)
        if len(jaxprs_of(a)) != len(jaxprs_of(b)) or any(first_difference(x, y) for x, y in inner):
            return a, b
        numbers.update(zip(a.outvars, b.outvars, strict=True))
    return None


def _same_ndim(a: Any, b: Any) -> bool:
    return getattr(a.aval, "ndim", 0) == getattr(b.aval, "ndim", 0)


def _same_length(ours: core.Jaxpr, theirs: core.Jaxpr) -> bool:
    return all(
        len(getattr(ours, n)) == len(getattr(theirs, n)) for n in ("eqns", "invars", "outvars", "constvars")
    )


def layout_of_constant(at_rows: Any, at_context: Any, counts: Counts) -> Layout:
    """Of a literal or a constant of the model, which may count its rows."""
    shape, context_shape = np.shape(at_rows), np.shape(at_context)
    dtype = at_rows.dtype if hasattr(at_rows, "dtype") else np.asarray(at_rows).dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # the key of a random number generator
        return Layout(shape, context_shape, SAME if at_rows is at_context else None)
    arrays = np.asarray(at_rows), np.asarray(at_context)
    place = constant_place(*arrays, counts)
    kept = arrays if dtype.kind in "iub" and max(a.size for a in arrays) <= _MAX_CONSTANT else None
    return Layout(shape, context_shape, place, kept)


def _columns(pair: Pair, operands: Sequence[Layout]) -> tuple[Layout, ...] | None:
    if pair.name != "concatenate" or pair.params["dimension"] != len(operands[0].shape) - 1:
        return None
    return tuple(operands) if _kind(pair.equation.outvars[0]) in "iu" else None


def _kind(var: Any) -> str:
    """numpy's letter for a dtype; a key of a random number generator has none."""
    return getattr(var.aval.dtype, "kind", "") or "?"


def _broadcast(params: Mapping[str, Any], array: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(array.reshape(shape), params["shape"])


def _iota(params: Mapping[str, Any]) -> np.ndarray:
    shape = [1] * len(params["shape"])
    shape[params["dimension"]] = -1
    count = np.arange(params["shape"][params["dimension"]], dtype=params["dtype"])
    return np.broadcast_to(count.reshape(shape), params["shape"])


def _operation(run: Callable[..., Any]) -> Callable[..., np.ndarray]:
    return lambda params, *arrays: np.asarray(run(*arrays))


# Arithmetic of indices: enough to tell a row's number when an author counts rows.
_FOLDED: Mapping[str, Callable[..., np.ndarray]] = {
    "add": _operation(np.add),
    "and": _operation(np.bitwise_and),
    "broadcast_in_dim": _broadcast,
    "convert_element_type": lambda params, array: array.astype(params["new_dtype"]),
    "eq": _operation(np.equal),
    "ge": _operation(np.greater_equal),
    "gt": _operation(np.greater),
    "iota": _iota,
    "le": _operation(np.less_equal),
    "lt": _operation(np.less),
    "max": _operation(np.maximum),
    "min": _operation(np.minimum),
    "mul": _operation(np.multiply),
    "ne": _operation(np.not_equal),
    "or": _operation(np.bitwise_or),
    "neg": _operation(np.negative),
    "rem": _operation(np.fmod),
    "reshape": lambda params, array: array.reshape(params["new_sizes"]),
    "select_n": _operation(lambda which, *cases: np.choose(which.astype(np.int64), cases)),
    "sign": _operation(np.sign),
    "squeeze": lambda params, array: np.squeeze(array, tuple(params["dimensions"])),
    "sub": _operation(np.subtract),
}


def _folded(pair: Pair, operands: Sequence[Layout]) -> tuple[np.ndarray, np.ndarray] | None:
    """An equation's result at both row counts, if it is made of small constants."""
    run, constants = _FOLDED.get(pair.name), [operand.constant for operand in operands]
    if run is None or any(constant is None for constant in constants):
        return None
    if max(np.prod(shape, dtype=np.int64) for shape in pair.result_shapes()) > _MAX_CONSTANT:
        return None
    (result,) = pair.equation.outvars
    if _kind(result) not in "iub":
        return None
    sides: list[Any] = list(zip(*constants, strict=True)) if constants else [(), ()]  # type: ignore[arg-type]
    if pair.name == "rem" and any((side[1] == 0).any() for side in sides):
        return None
    with np.errstate(all="ignore"):
        at_rows, at_context = (
            run(params, *side).astype(result.aval.dtype)  # type: ignore[attr-defined]
            for params, side in zip((pair.params, pair.context_params), sides, strict=True)
        )
    return at_rows, at_context
