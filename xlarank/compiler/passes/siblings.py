"""Finds equations that do the same with other weights: `mergeable_classes`, `sharing_groups`."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.passes.sensitivity import sensitive_matmuls
from xlarank.compiler.program import Program, read, weight_side
from xlarank.compiler.tracing import evaluate, structural_text

__all__ = ["Class", "mergeable_classes", "sharing_groups", "without_repeats"]

Class = tuple[core.JaxprEqn, ...]
"""Sibling equations that run as one."""


def without_repeats(program: Program) -> Program:
    """The program with each equation once: experts that each join their inputs then share an operand."""
    jaxpr = program.closed.jaxpr
    seen: dict[str, core.JaxprEqn] = {}
    same_as: dict[Any, Any] = {}  # a repeated result: the first
    repeated: set[int] = set()
    names = {var: f"v{number}" for number, var in enumerate([*jaxpr.invars, *jaxpr.constvars])}
    for equation in jaxpr.eqns:
        operands = [
            _literal_text(a) if isinstance(a, core.Literal) else names[same_as.get(a, a)]
            for a in equation.invars
        ]
        text = "\n".join([equation.primitive.name, structural_text(equation.params), *operands])
        first = seen.setdefault(text, equation)
        if first is not equation and not equation.effects:
            repeated.add(id(equation))
            same_as |= dict(zip(equation.outvars, first.outvars, strict=True))
        names |= {var: f"v{len(names) + i}" for i, var in enumerate(equation.outvars)}
    if not repeated:
        return program

    def run(*inputs: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        values.update(zip(jaxpr.constvars, program.closed.consts, strict=True))
        for equation in jaxpr.eqns:
            if id(equation) not in repeated:
                results = evaluate(equation, read(values, equation.invars))
                values.update(zip(equation.outvars, results, strict=True))
            else:
                values.update({var: values[same_as[var]] for var in equation.outvars})
        return read(values, jaxpr.outvars)

    return program.rewritten(run)


def mergeable_classes(program: Program, weights: set[core.Var]) -> list[Class]:
    """Classes that can run as one, each after those that it reads.

    Siblings have the same *colour*: a digest of the operation, its parameters and the colours of what it
    reads, in which a weight counts by its shape alone. A matmul that a lower precision would leave alone is
    no sibling of one that it wouldn't.

    Args:
      program: without repeats.
      weights: `Program.weight_vars`.
    """
    sensitive = sensitive_matmuls(program)
    by_colour: dict[str, list[core.JaxprEqn]] = collections.defaultdict(list)
    colours: dict[Any, str] = {}
    jaxpr = program.closed.jaxpr
    for index, var in enumerate([*jaxpr.invars, *jaxpr.constvars]):
        colours[var] = _weight_colour(var) if var in weights else f"input {index}"
    for equation in jaxpr.eqns:
        if is_of_weights(equation, weights):
            colours |= {var: _weight_colour(var) for var in equation.outvars}
            continue
        colour = _colour(equation, colours, id(equation) in sensitive)
        colours |= {var: f"{colour} {i}" for i, var in enumerate(equation.outvars)}
        if len(equation.outvars) == 1:
            by_colour[colour].append(equation)
    merged: dict[core.Var, tuple[int, int]] = {}  # a member's result: number of its class, place in it
    classes: list[Class] = []
    for group in by_colour.values():  # in order of first members, so operands' classes come first
        if len(group) < 2 or not _fits(group, weights, merged):
            continue
        merged |= {e.outvars[0]: (len(classes), place) for place, e in enumerate(group)}  # type: ignore[misc]
        classes.append(tuple(group))
    return classes


def is_of_weights(equation: core.JaxprEqn, weights: set[core.Var]) -> bool:
    """Whether an equation reads weights alone."""
    return bool(equation.outvars) and equation.outvars[0] in weights


def _weight_colour(var: Any) -> str:
    return f"weight {var.aval.shape} {var.aval.dtype}"


def _colour(equation: core.JaxprEqn, colours: dict[Any, str], is_sensitive: bool) -> str:
    operands = [_literal_text(a) if isinstance(a, core.Literal) else colours[a] for a in equation.invars]
    kind = "sensitive" if is_sensitive else ""
    text = "\n".join([equation.primitive.name, kind, structural_text(equation.params), *operands])
    return hashlib.sha256(text.encode()).hexdigest()


def _literal_text(atom: core.Literal) -> str:
    if jnp.issubdtype(atom.aval.dtype, jax.dtypes.extended):  # type: ignore[attr-defined]
        return f"literal {id(atom)}"
    return f"literal {np.asarray(atom.val).tobytes()!r} {atom.aval}"


def _fits(
    group: Sequence[core.JaxprEqn], weights: set[core.Var], merged: dict[core.Var, tuple[int, int]]
) -> bool:
    """Whether siblings read, at each place, one operand, weights, or a whole merged class in order."""
    reads_merged = False
    for atoms in zip(*(equation.invars for equation in group), strict=True):
        if isinstance(atoms[0], core.Literal) or all(atom in weights for atom in atoms):
            continue
        if all(atom is atoms[0] for atom in atoms):
            continue
        places = [merged.get(atom) for atom in atoms]  # type: ignore[arg-type]
        if places[0] is None or places != [(places[0][0], i) for i in range(len(group))]:
            return False
        reads_merged = True
    return reads_merged or weight_side(group[0], weights) is not None


def sharing_groups(program: Program, weights: set[core.Var]) -> list[Class]:
    """Matmuls of one operand with several weights, at least two each, that one wide matmul can do."""
    sensitive = sensitive_matmuls(program)
    groups: dict[Any, list[core.JaxprEqn]] = collections.defaultdict(list)
    for equation in program.closed.jaxpr.eqns:
        side = weight_side(equation, weights)
        if side is None:
            continue
        contracted, batched = equation.params["dimension_numbers"]
        x, weight = equation.invars[1 - side], equation.invars[side]
        if batched[0] or len(weight.aval.shape) == len(contracted[side]):  # type: ignore[union-attr]
            continue
        params = {k: v for k, v in equation.params.items() if k != "dimension_numbers"}
        kind = (
            side,
            tuple(contracted[1 - side]),
            weight.aval.dtype,  # type: ignore[union-attr]
            structural_text(params),
            id(equation) in sensitive,
        )
        groups[(x, kind)].append(equation)
    return [tuple(group) for group in groups.values() if len(group) > 1]
