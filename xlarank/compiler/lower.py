"""Lowers a row program for one bucket to StableHLO."""

from __future__ import annotations

import jax
from jax import export

from xlarank.compiler.split import DenseModel, RowProgram, program_avals
from xlarank.errors import ModelError
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
      ModelError: if the model can't be traced, with JAX's reason.
    """
    avals = program_avals(model, signature, bucket)
    jitted = jax.jit(program)
    with jax.default_matmul_precision("highest"):
        try:
            jax.eval_shape(jitted, *avals)
        except (TypeError, IndexError, jax.errors.JAXTypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"model {spec.name!r} can't be traced at {bucket.rows} rows: {reason}"
            ) from error
        here = jax.default_backend()
        try:
            exported = export.export(jitted, platforms=_PLATFORMS)(*avals)
        except NotImplementedError:  # an operation without a rule for the other platform
            exported = export.export(jitted, platforms=[_export_name(here)])(*avals)
    return bytes(exported.serialize())


def _export_name(backend: str) -> str:
    return "cuda" if backend == "gpu" else backend
