"""The reference score of a request: the model applied in float32, op by op, without the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlarank.compiler.split import scores_of
from xlarank.compiler.tracing import authors_code
from xlarank.errors import ModelError
from xlarank.host import model_inputs
from xlarank.models import EmbeddingCollection
from xlarank.spec import ModelSpec, RankRequest, Scope, take

__all__ = ["reference_scores"]


def reference_scores(
    model: Callable[[dict[str, jax.Array]], Any],
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    requests: Sequence[RankRequest],
) -> dict[str, list[np.ndarray]]:
    """Scores requests as DESIGN §3 defines the reference.

    The context is repeated N times, tables are looked up by `EmbeddingCollection` in plain JAX and the
    model runs under `jax.disable_jit()`, so that a fault of the compiler can't agree with itself.

    Args:
      model: an nnx.Module in evaluation mode, or any function from activations to logits.
      spec: the model.
      tables: float32 [R, D] by name.
      requests: each with at least one candidate.

    Returns:
      By task, one [N] float32 array a request.

    Raises:
      ModelError: if the model's answer has the wrong form, or a score isn't finite.
    """
    scores: dict[str, list[np.ndarray]] = {task.name: [] for task in spec.tasks}
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.disable_jit(), jax.default_matmul_precision("highest"), jax.default_device(cpu):
        collection = EmbeddingCollection(spec, tables=tables)
        for number, request in enumerate(requests):
            # The last candidate is repeated up to a power of two: each operation is compiled once a size,
            # and goldens of all sizes would take most of the time. That rows are independent is proven.
            num_rows = 1 << (request.num_candidates - 1).bit_length()
            rows = np.minimum(np.arange(num_rows), request.num_candidates - 1)
            columns = [
                take(column, np.zeros_like(rows) if feature.scope is Scope.CONTEXT else rows)
                for feature, column in zip(spec.features, request.columns, strict=True)
            ]
            inputs = {name: jnp.asarray(value) for name, value in model_inputs(spec, columns).items()}
            with authors_code(f"model {spec.name!r}, golden request {number}"):
                logits = model(collection(inputs))
            for task, values in scores_of(spec, logits, num_rows).items():
                array = np.array(values)[: request.num_candidates]
                if not np.isfinite(array).all():
                    raise ModelError(
                        f"model {spec.name!r}, task {task!r}: the reference score of golden request {number} "
                        f"is {array[~np.isfinite(array)][0]}; expected finite scores"
                    )
                scores[task].append(array)
    return scores
