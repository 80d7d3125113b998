"""Which matmuls the scores feel most: `sensitive_matmuls`."""

from __future__ import annotations

from typing import Any

from jax.extend import core

from xlarank.compiler.program import Program, weight_side

__all__ = ["sensitive_matmuls"]

_MIXING = frozenset({"dot_general", "conv_general_dilated"})


def sensitive_matmuls(program: Program) -> set[int]:
    """`id`s of the matmuls with weights whose error reaches a score, or a softmax's exponential, as it is.

    That is: without another matmul in between. What isn't a matmul is taken to pass an error on, programs
    inside (scan, cond) included.
    """
    weights = program.weight_vars()
    jaxpr = program.closed.jaxpr
    exposed: set[Any] = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    found = set()
    for equation in reversed(jaxpr.eqns):
        is_exposed = any(var in exposed for var in equation.outvars)
        if equation.primitive.name in _MIXING:
            if is_exposed and weight_side(equation, weights) is not None:
                found.add(id(equation))
        elif is_exposed or equation.primitive.name == "exp":
            exposed |= {atom for atom in equation.invars if not isinstance(atom, core.Literal)}
    return found
