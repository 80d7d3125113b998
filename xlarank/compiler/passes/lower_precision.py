"""lower_precision: matmuls with weights in bfloat16, float16 or int8, accumulated wider.

bfloat16, float16: weights and activations are rounded, products add up in float32.
int8: a scale an output channel of the weights (largest |w| / 127), found once; a scale a row of the activations
(largest |x| / 127), found for each batch; products add up in int32 and are scaled back in float32. Symmetric
quantisation as in Jacob et al., CVPR 2018, arXiv 1712.05877, dynamic for activations.

Converted weights are made by equations that read weights alone: they end up in prepare. Matmuls whose error the
scores feel most stay in float32: the last one before a score, and those that feed a softmax's exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.passes.rows import ELEMENTWISE
from xlarank.compiler.program import Program, read, weight_side
from xlarank.compiler.tracing import evaluate
from xlarank.spec import Precision

__all__ = ["lower_precision", "sensitive_matmuls"]

_INT8_MAX = 127.0

_FLOATS = {Precision.BFLOAT16: jnp.bfloat16, Precision.FLOAT16: jnp.float16}

# What a matmul's result passes through on its way to a score or a softmax without being mixed anew.
_TRANSPARENT = ELEMENTWISE | {
    "broadcast_in_dim", "concatenate", "gather", "reduce_max", "reduce_sum", "reshape", "slice", "split", "squeeze",
    "transpose",
}  # fmt: skip


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
    lowered = [
        id(equation)
        for equation in program.closed.jaxpr.eqns
        if weight_side(equation, weights) is not None
        and id(equation) not in kept
        and all(atom.aval.dtype == np.float32 for atom in equation.invars)  # type: ignore[union-attr]
    ]
    if not lowered or precision is Precision.FLOAT32:
        return None

    def run(*inputs: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(program.closed.jaxpr.invars, inputs, strict=True))
        values.update(zip(program.closed.jaxpr.constvars, program.closed.consts, strict=True))
        for equation in program.closed.jaxpr.eqns:
            operands = read(values, equation.invars)
            if id(equation) in lowered:
                side = weight_side(equation, weights)
                assert side is not None
                results = [_lowered(equation, operands, side, precision)]
            else:
                results = evaluate(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
        return read(values, program.closed.jaxpr.outvars)

    return program.rewritten(run)


def sensitive_matmuls(program: Program) -> set[int]:
    """`id`s of the equations whose result reaches a score, or the exponential of a softmax, without another
    matmul in between."""
    weights = program.weight_vars()
    jaxpr = program.closed.jaxpr
    exposed: set[Any] = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    found = set()
    for equation in reversed(jaxpr.eqns):
        is_exposed = any(var in exposed for var in equation.outvars)
        if equation.primitive.name == "dot_general":
            if is_exposed and weight_side(equation, weights) is not None:
                found.add(id(equation))
            continue
        if equation.primitive.name == "exp" or (is_exposed and equation.primitive.name in _TRANSPARENT):
            exposed |= {atom for atom in equation.invars if not isinstance(atom, core.Literal)}
    return found


def _lowered(equation: core.JaxprEqn, operands: Sequence[Any], side: int, precision: Precision) -> Any:
    if precision is Precision.INT8:
        return _int8(equation, operands, side)
    dtype = _FLOATS[precision]
    (result,) = evaluate(
        equation,
        [operand.astype(dtype) for operand in operands],
        precision=None,
        preferred_element_type=np.dtype(np.float32),
    )
    return result


def _int8(equation: core.JaxprEqn, operands: Sequence[Any], side: int) -> Any:
    """sum_k x_k w_k = sx sw sum_k round(x_k / sx) round(w_k / sw), each scale constant over k."""
    contracted, batched = equation.params["dimension_numbers"]
    scaled, scales = [], []
    for operand, axes in zip(operands, contracted, strict=True):
        largest = jnp.max(jnp.abs(operand), axis=tuple(axes), keepdims=True)
        # A row of zeros stays zeros; a row with NaN or infinity has a scale of NaN or infinity, and so its scores.
        scale = jnp.where(largest == 0, 1.0, largest / _INT8_MAX)
        scaled.append(jnp.round(operand / scale).astype(jnp.int8))
        scales.append(scale)
    (product,) = evaluate(
        equation, scaled, precision=None, preferred_element_type=np.dtype(np.int32)
    )
    # Each operand's scale in the result's order of axes: batch, free of the left, free of the right.
    free = [
        [a for a in range(operand.ndim) if a not in contracted[s] and a not in batched[s]]
        for s, operand in enumerate(operands)
    ]
    num_batched = len(batched[0])
    result = product.astype(jnp.float32)
    for s, scale in enumerate(scales):
        order = [*batched[s], *free[s]]
        moved = jax.lax.transpose(scale, [*order, *contracted[s]]).reshape([scale.shape[a] for a in order])
        places = list(range(num_batched))
        begin = num_batched + (len(free[0]) if s else 0)
        places += range(begin, begin + len(free[s]))
        result = result * jax.lax.broadcast_in_dim(moved, product.shape, places)
    return result
