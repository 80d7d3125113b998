"""Lowers a row program for one bucket to StableHLO."""

from __future__ import annotations

import jax
from jax import export

from xlarank.compiler.split import DenseModel, RowProgram, program_avals
from xlarank.compiler.tracing import trace
from xlarank.spec import Bucket, ModelSpec, Signature

__all__ = ["lower_program"]

_PLATFORMS = ("cpu", "cuda")


def lower_program(
    program: RowProgram, model: DenseModel, spec: ModelSpec, signature: Signature, bucket: Bucket
) -> bytes:
    """Exports a program, weights as arguments, float32 matmuls in true float32 on every device.

    Args:
      program: of this bucket.
      model: shapes of the weights.
      spec: named in errors.
      signature: layout of the leaves.
      bucket: B and Q.

    Returns:
      jax.export's container, readable by jax versions of the next six months; it runs on CPU and CUDA
      where the model's operations exist on both, else on the platform it was made on.

    Raises:
      ModelError: if the model can't be traced at this bucket, with the line of its source.
    """
    avals = program_avals(model, signature, bucket)
    trace(spec.name, program, avals)
    jitted = jax.jit(program)
    with jax.default_matmul_precision("highest"):
        here = jax.default_backend()
        try:
            exported = export.export(jitted, platforms=_PLATFORMS)(*avals)
        except NotImplementedError:  # an operation without a rule for the other platform
            exported = export.export(jitted, platforms=[_export_name(here)])(*avals)
    return bytes(exported.serialize())


def _export_name(backend: str) -> str:
    return "cuda" if backend == "gpu" else backend
