"""Lowers programs to StableHLO in jax.export's container."""

from __future__ import annotations

from typing import Any

import jax
from jax import export

from xlarank.compiler.prepare import Parted
from xlarank.compiler.program import run_equations
from xlarank.compiler.tracing import ClosedJaxpr
from xlarank.device import export_platform
from xlarank.spec import ModelSpec, Signature

__all__ = ["lower_prepare", "lower_row_program"]

_PLATFORMS = ("cpu", "cuda")


def lower_row_program(parted: Parted, spec: ModelSpec, signature: Signature) -> bytes:
    """Exports a row program, prepared arrays as arguments.

    Args:
      parted: of one bucket.
      spec: names the outputs.
      signature: layout of the leaves.

    Returns:
      jax.export's container of ``program(prepared, context, candidates, request_of_row) -> scores by task``,
      readable by jax versions of the next six months. It runs on CPU and CUDA where the model's operations
      exist on both, else on the platform it was made on.
    """
    avals = _shapes(parted.row)
    num_prepared, num_context = len(parted.keys), len(signature.context_leaves)

    def program(prepared, context, candidates, request_of_row):
        scores = run_equations(parted.row, [*prepared, *context, *candidates, request_of_row])
        return {task.name: score for task, score in zip(spec.tasks, scores, strict=True)}

    prepared, leaves = avals[:num_prepared], avals[num_prepared:-1]
    arguments = (tuple(prepared), tuple(leaves[:num_context]), tuple(leaves[num_context:]), avals[-1])
    return _export(program, arguments)


def lower_prepare(prepare: ClosedJaxpr) -> bytes:
    """Exports the program ``prepare(*params) -> prepared arrays``, in the same container."""
    return _export(lambda *params: tuple(run_equations(prepare, params)), tuple(_shapes(prepare)))


def _shapes(closed: ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
    """Of a program's inputs."""
    inputs: list[Any] = closed.in_avals
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in inputs]


def _export(function: Any, arguments: tuple[Any, ...]) -> bytes:
    jitted = jax.jit(function)
    try:
        exported = export.export(jitted, platforms=_PLATFORMS)(*arguments)
    except NotImplementedError:  # an operation without a rule for the other platform
        here = export_platform(jax.devices()[0])
        exported = export.export(jitted, platforms=[here])(*arguments)
    return bytes(exported.serialize())
