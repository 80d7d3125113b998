"""The reference score of a request: the model applied in float32, op by op, without the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlarank.compiler.program import Traces, run_equations
from xlarank.compiler.split import scores_of
from xlarank.compiler.tracing import authors_code
from xlarank.device import compiler_options
from xlarank.errors import ModelError
from xlarank.host import model_inputs
from xlarank.models import EmbeddingCollection
from xlarank.spec import (
    Column,
    FeatureSpec,
    ModelSpec,
    RankRequest,
    Scope,
    TaskKind,
    Tolerance,
    join_columns,
    take,
)

__all__ = ["check_row_counts", "reference_scores"]

_FEW_ROWS, _MANY_ROWS = (1, 3), 32
"""Row counts whose scores are compared; the larger is traced anyway."""

_MAX_ROWS = 1024
"""Of a call: few large ones, for each operation is dispatched by itself."""


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
        for first, group in _groups(requests):
            columns = [
                join_columns([_repeated(feature, request, position) for request in group])
                for position, feature in enumerate(spec.features)
            ]
            # The last row is repeated up to a power of two: each operation is compiled once a size, and
            # groups of all sizes would take most of the time. That rows are independent is proven.
            ends = np.cumsum([request.num_candidates for request in group])
            num_rows = 1 << int(ends[-1] - 1).bit_length()
            rows = np.minimum(np.arange(num_rows), ends[-1] - 1)
            inputs = model_inputs(spec, [take(column, rows) for column in columns])
            with authors_code(f"model {spec.name!r}, golden requests {first} to {first + len(group) - 1}"):
                logits = model(collection({name: jnp.asarray(value) for name, value in inputs.items()}))
            for task, values in scores_of(spec, logits, num_rows).items():
                parts = np.split(np.array(values)[: ends[-1]], ends[:-1])
                _check_finite(spec, task, first, parts)
                scores[task] += parts
    return scores


def check_row_counts(
    traces: Traces, tables: Mapping[str, np.ndarray], request: RankRequest, tolerance: Tolerance
) -> None:
    """Scores the first candidates of a request at several row counts.

    A program of B rows serves requests of 1 to B candidates. A model that looks at the number of rows would
    give them other scores than its author's call does, and no two rows of one batch would show it.

    Args:
      traces: of the model.
      tables: float32 [R, D] by name.
      request: a golden one.
      tolerance: largest difference to let pass.

    Raises:
      ModelError: names the task, the number of rows and the difference.
    """
    spec = traces.spec
    among_many = _scores_at(traces, tables, request, _MANY_ROWS)
    for num_rows in _FEW_ROWS:
        alone = _scores_at(traces, tables, request, num_rows)
        for task, found, many in zip(spec.tasks, alone, among_many, strict=True):
            wanted = many[:num_rows]
            scale = 1.0 if task.kind is TaskKind.BINARY else np.maximum(1.0, np.abs(wanted))
            worst = float((np.abs(found - wanted) / scale).max())
            if not worst <= tolerance.of(task.kind):
                raise ModelError(
                    f"model {spec.name!r}, task {task.name!r}: a row's score depends on the number of rows: "
                    f"called with {num_rows}, the model differs by {worst:.3g} from what it gives the same "
                    f"rows among {_MANY_ROWS}, expected {tolerance.of(task.kind):.3g} or less; use no "
                    f"shape[0], no arange over the rows, and no reduction over them"
                )


def _scores_at(
    traces: Traces, tables: Mapping[str, np.ndarray], request: RankRequest, num_rows: int
) -> list[np.ndarray]:
    """Scores [num_rows] by task of a request's first candidates, the last repeated, compiled at that size."""
    spec, traced = traces.spec, traces.at(num_rows)
    rows = np.minimum(np.arange(num_rows), request.num_candidates - 1)
    columns = [
        take(column, np.zeros_like(rows) if feature.scope is Scope.CONTEXT else rows)
        for feature, column in zip(spec.features, request.columns, strict=True)
    ]
    inputs = {name: jnp.asarray(value) for name, value in model_inputs(spec, columns).items()}
    activations = EmbeddingCollection(spec, tables=tables)(inputs)
    arrays = [*traces.model.params, *(activations[name] for name in traced.activations)]
    run = functools.partial(run_equations, traced.closed)
    compiled = jax.jit(run, compiler_options=compiler_options(jax.default_backend()))
    return [np.asarray(scores) for scores in compiled(arrays)]


def _groups(requests: Sequence[RankRequest]) -> Iterator[tuple[int, list[RankRequest]]]:
    """Neighbours of at most `_MAX_ROWS` candidates together, with the number of the first."""
    first, num_rows = 0, 0
    for number, request in enumerate(requests):
        if number > first and num_rows + request.num_candidates > _MAX_ROWS:
            yield first, list(requests[first:number])
            first, num_rows = number, 0
        num_rows += request.num_candidates
    yield first, list(requests[first:])


def _repeated(feature: FeatureSpec, request: RankRequest, position: int) -> Column:
    """A feature's column with a row a candidate."""
    column = request.columns[position]
    if feature.scope is Scope.CONTEXT:
        return take(column, np.zeros(request.num_candidates, np.int64))
    return column


def _check_finite(spec: ModelSpec, task: str, first: int, parts: Sequence[np.ndarray]) -> None:
    for number, array in enumerate(parts, start=first):
        if not np.isfinite(array).all():
            raise ModelError(
                f"model {spec.name!r}, task {task!r}: the reference score of golden request {number} "
                f"is {array[~np.isfinite(array)][0]}; expected finite scores"
            )
