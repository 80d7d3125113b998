"""Proves a compiled bucket: scores equal the reference's, and rows don't touch each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xlarank.compiler.independence import find_crossing
from xlarank.compiler.split import RowProgram
from xlarank.device import BatchBuffers, GoldenReplay, Replica, check_errors, score_errors
from xlarank.errors import ModelError
from xlarank.spec import Bucket, ModelSpec, Scope, Signature, Tolerance

__all__ = ["verify_bucket"]

_MAX_FULL_BATCHES = 8


def verify_bucket(
    spec: ModelSpec,
    signature: Signature,
    bucket: Bucket,
    replica: Replica,
    program: RowProgram,
    golden: GoldenReplay,
    buffers: BatchBuffers,
    tolerance: Tolerance,
) -> dict[str, float]:
    """Replays golden requests at fills 1, 2, half, full - 1 and full, and poisons rows with NaN.

    Args:
      spec: the model.
      signature: layout of the leaves.
      bucket: the one to prove.
      replica: holds its executable, as it will serve.
      program: what the executable was compiled from, to explain a refusal.
      golden: requests and reference scores.
      buffers: written and read here.
      tolerance: largest allowed error.

    Returns:
      Largest error by task.

    Raises:
      VerifyError: names task, bucket and error when scores leave the tolerance.
      ModelError: names the operation that crosses rows.
    """
    leaves = buffers.leaves(bucket)
    golden.fill(leaves, bucket, bucket.rows)
    _check_rows_independent(spec, signature, bucket, replica, program, leaves)
    worst = dict.fromkeys((task.name for task in spec.tasks), 0.0)
    fills = sorted({1, 2, bucket.rows // 2, bucket.rows - 1, bucket.rows} & set(range(1, bucket.rows + 1)))
    batches = [(num_rows, start) for start, num_rows in enumerate(fills)]
    covering = range(len(fills), golden.num_requests, bucket.requests)
    batches += [(bucket.rows, start) for start in list(covering)[:_MAX_FULL_BATCHES]]
    for num_rows, start in batches:
        expected = golden.fill(leaves, bucket, num_rows, start)
        errors = score_errors(spec, replica.run(bucket, leaves), expected)
        check_errors(spec, bucket, errors, tolerance, f"{num_rows} valid rows")
        worst = {task: max(worst[task], errors[task]) for task in worst}
    return worst


def _check_rows_independent(
    spec: ModelSpec,
    signature: Signature,
    bucket: Bucket,
    replica: Replica,
    program: RowProgram,
    leaves: Mapping[str, np.ndarray],
) -> None:
    clean = {task: scores.copy() for task, scores in replica.run(bucket, leaves).items()}
    for scope, owners in (
        (Scope.CANDIDATE, np.arange(bucket.rows)),
        (Scope.CONTEXT, leaves["request_of_row"].copy()),
    ):
        victim = (bucket.rows if scope is Scope.CANDIDATE else bucket.requests) // 2
        others = owners != victim
        names = [leaf.name for leaf in signature.leaves if leaf.scope is scope and leaf.dtype == "float32"]
        valid = {name: leaves[name][victim].copy() for name in names}
        for name in names:
            leaves[name][victim] = np.nan
        poisoned = replica.run(bucket, leaves)
        for name in names:
            leaves[name][victim] = valid[name]
        for task, scores in poisoned.items():
            if not np.array_equal(clean[task][others], scores[others], equal_nan=True):
                prepared = replica.executables[bucket].prepared
                crossing = find_crossing(program, prepared, signature, bucket, leaves, scope)
                raise ModelError(
                    f"model {spec.name!r}, task {task!r}: a row's score depends on other rows of the batch "
                    f"(a NaN in {scope.value} {victim} changed them in bucket {bucket}); a row may depend on "
                    f"its own candidate and context alone. What crosses rows: {crossing}"
                )
