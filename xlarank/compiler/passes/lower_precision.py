"""lower_precision: matmuls with weights in bfloat16, float16 or int8, accumulated wider.

bfloat16, float16: weights and activations are rounded, products add up in float32.
int8: a scale an output channel of the weights (largest |w| / 127), found once; a scale a row of the
activations (largest |x| / 127), found for each batch; products add up in int32, scaled back in float32.
Symmetric quantisation as in Jacob et al., CVPR 2018, arXiv 1712.05877, dynamic for activations.

Converted weights are made by equations that read weights alone: they end up in prepare. Matmuls whose error
the scores feel most stay in float32: the last one before a score, those that feed a softmax's exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.passes.sensitivity import sensitive_matmuls
from xlarank.compiler.program import Program, read, weight_side
from xlarank.compiler.tracing import evaluate
from xlarank.spec import Precision

__all__ = ["lower_precision"]

_Numbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""Contracted axes of the left and the right operand, batch axes of both."""

_INT8_MAX = 127.0

# The smallest divisor of 127 that gives a finite float32; a row of smaller numbers is as good as zeros.
_SMALLEST = _INT8_MAX / float(np.finfo(np.float32).max) * (1 + 1e-6)

_FLOATS = {Precision.BFLOAT16: jnp.bfloat16, Precision.FLOAT16: jnp.float16}


def lower_precision(program: Program, precision: Precision, *, keep_sensitive: bool = True) -> Program | None:
    """Lowers matmuls with weights.

    Args:
      program: of one bucket, in float32.
      precision: bfloat16, float16 or int8.
      keep_sensitive: whether `sensitive_matmuls` stay in float32.

    Returns:
      The program; None where no matmul is lowered.
    """
    weights = program.weight_vars()
    kept = sensitive_matmuls(program) if keep_sensitive else set()
    jaxpr = program.closed.jaxpr
    lowered = {id(e) for e in jaxpr.eqns if _is_wide(e, weights) and id(e) not in kept}
    if not lowered or precision is Precision.FLOAT32:
        return None

    def run(*inputs: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        values.update(zip(jaxpr.constvars, program.closed.consts, strict=True))
        for equation in jaxpr.eqns:
            operands = read(values, equation.invars)
            if id(equation) in lowered:
                results = [_lowered(equation, operands, precision)]
            else:
                results = evaluate(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
        return read(values, jaxpr.outvars)

    return program.rewritten(run)


def _is_wide(equation: core.JaxprEqn, weights: set[core.Var]) -> bool:
    """Whether an equation multiplies weights in float32."""
    if weight_side(equation, weights) is None:
        return False
    return all(atom.aval.dtype == np.float32 for atom in (*equation.invars, *equation.outvars))  # type: ignore[union-attr]


def _lowered(equation: core.JaxprEqn, operands: Sequence[Any], precision: Precision) -> Any:
    operands, numbers = _in_order(operands, equation.params["dimension_numbers"])
    if precision is Precision.INT8:
        return _int8(equation, operands, numbers)
    dtype = _FLOATS[precision]
    (result,) = evaluate(
        equation,
        [operand.astype(dtype) for operand in operands],
        dimension_numbers=numbers,
        precision=None,
        preferred_element_type=np.dtype(np.float32),
    )
    return result


def _in_order(operands: Sequence[Any], numbers: _Numbers) -> tuple[Sequence[Any], _Numbers]:
    """A matmul's operands as [batch, free, contracted] and [batch, contracted, free].

    XLA's CPU backend takes some other orders of bfloat16 at compile time and refuses them when it runs.
    """
    contracted, batched = numbers
    free = _free_axes(operands, numbers)
    orders = (*batched[0], *free[0], *contracted[0]), (*batched[1], *contracted[1], *free[1])
    num_batched, num_contracted = len(batched[0]), len(contracted[0])
    begins = num_batched + len(free[0]), num_batched
    axes = [tuple(range(begin, begin + num_contracted)) for begin in begins]
    moved = [
        x if order == tuple(range(x.ndim)) else jax.lax.transpose(x, order)
        for x, order in zip(operands, orders, strict=True)
    ]
    both = tuple(range(num_batched))
    return moved, ((axes[0], axes[1]), (both, both))


def _free_axes(operands: Sequence[Any], numbers: _Numbers) -> list[list[int]]:
    contracted, batched = numbers
    return [
        [a for a in range(operand.ndim) if a not in contracted[s] and a not in batched[s]]
        for s, operand in enumerate(operands)
    ]


def _int8(equation: core.JaxprEqn, operands: Sequence[Any], numbers: _Numbers) -> Any:
    """sum_k x_k w_k = sx sw sum_k round(x_k / sx) round(w_k / sw), each scale constant over k."""
    contracted, _ = numbers
    rounded, scales = [], []
    for operand, axes in zip(operands, contracted, strict=True):
        largest = jnp.max(jnp.abs(operand), axis=tuple(axes), keepdims=True)
        # A row with NaN or infinity has that for a scale, and so for its scores; no other row has.
        largest = jnp.maximum(largest, _SMALLEST)
        rounded.append(jnp.round(operand * (_INT8_MAX / largest)).astype(jnp.int8))
        scales.append(largest * (1 / _INT8_MAX))
    (product,) = evaluate(
        equation,
        rounded,
        dimension_numbers=numbers,
        precision=None,
        preferred_element_type=np.dtype(np.int32),
    )
    result = product.astype(jnp.float32)
    for side, scale in enumerate(scales):
        result = result * _in_result(scale, side, operands, numbers, result.shape)
    return result


def _in_result(
    scale: Any, side: int, operands: Sequence[Any], numbers: _Numbers, shape: tuple[int, ...]
) -> Any:
    """An operand's scale in the result's order of axes: batch, free of the left, free of the right."""
    contracted, batched = numbers
    free = _free_axes(operands, numbers)
    order = [*batched[side], *free[side]]
    moved = jax.lax.transpose(scale, [*order, *contracted[side]]).reshape([scale.shape[a] for a in order])
    begin = len(batched[0]) + (len(free[0]) if side else 0)
    places = [*range(len(batched[0])), *range(begin, begin + len(free[side]))]
    return jax.lax.broadcast_in_dim(moved, shape, places)
