"""Proves a compiled bucket: scores equal the reference's, and rows don't touch each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xlarank.compiler.golden_set import GoldenSet, Judgement
from xlarank.compiler.independence import check_rows_independent
from xlarank.compiler.program import Program
from xlarank.device import BatchBuffers, GoldenReplay, Replica, check_errors, score_errors
from xlarank.spec import REQUEST_OF_ROW, Bucket, Precision, Signature
from xlarank.spec.wording import counted

__all__ = ["verify_bucket"]


def verify_bucket(
    signature: Signature,
    bucket: Bucket,
    replica: Replica,
    plain: Callable[[], Program],
    weights: Sequence[np.ndarray],
    golden: GoldenSet,
    probes: Sequence[GoldenReplay],
    buffers: BatchBuffers,
    *,
    form: str,
    precision: Precision,
) -> Judgement:
    """Poisons rows, replays golden requests at fills 1, 2, half, full - 1 and full, then scores every golden
    row.

    Args:
      signature: layout of the leaves.
      bucket: the one to prove.
      replica: holds its executable, as it will serve.
      plain: makes the plain program of the bucket, to explain a refusal.
      weights: of the model, for the same.
      golden: requests, reference scores and limits.
      probes: other requests to poison, that differ from each other whatever the golden ones do; their scores
        aren't looked at.
      buffers: written and read here.
      form: in words, for messages.
      precision: of the form.

    Returns:
      Errors over all golden rows.

    Raises:
      VerifyError: names task, bucket, form and error when scores leave tolerance or budget.
      ModelError: names the operation that crosses rows.
    """
    spec, leaves = golden.spec, buffers.leaves(bucket)
    for batches in (*probes, golden.replay):
        batches.fill(leaves, bucket, bucket.rows)
        check_rows_independent(spec, signature, bucket, replica, plain, weights, leaves)
    # All rows alike: one that differs decides every `any`, `all` and comparison over the batch.
    divisors = {lookup.divisor for lookup in signature.lookups.values()}
    for leaf in signature.leaves:
        if leaf.name != REQUEST_OF_ROW:
            leaves[leaf.name][:] = leaf.dtype == "bool" or leaf.name in divisors
    check_rows_independent(spec, signature, bucket, replica, plain, weights, leaves)
    what = f"bucket {bucket} (rows x requests), form {form!r}"
    judgement = golden.judge(replica, bucket, leaves)
    golden.check(judgement, precision, what)
    # Padding: a batch that is not full must give what the same rows give in a full one.
    limits = _fill_limits(golden, judgement, precision)
    for start, num_rows in enumerate(sorted({1, 2, bucket.rows // 2, bucket.rows - 1, bucket.rows})):
        if not 1 <= num_rows <= bucket.rows:
            continue
        expected = golden.replay.fill(leaves, bucket, num_rows, start)
        errors = score_errors(spec, replica.run(bucket, leaves), expected)
        largest = {task: error.max for task, error in errors.items()}
        check_errors(spec, what, largest, limits, counted(num_rows, "valid row"))
    return judgement


def _fill_limits(golden: GoldenSet, judgement: Judgement, precision: Precision) -> dict[str, float]:
    """Largest error at any fill: the tolerance, or in a lower precision what full batches showed and a
    little."""
    if precision is Precision.FLOAT32:
        return {task.name: golden.policy.tolerance.of(task.kind) for task in golden.spec.tasks}
    return {task: 1.5 * error.max + 1e-5 for task, error in judgement.errors.items()}
