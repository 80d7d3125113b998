"""Proves a compiled bucket: scores equal the reference's, and rows don't touch each other."""

from __future__ import annotations

from xlarank.compiler.independence import check_rows_independent
from xlarank.compiler.split import RowProgram
from xlarank.device import BatchBuffers, GoldenReplay, Replica, check_errors, score_errors
from xlarank.spec import REQUEST_OF_ROW, Bucket, ModelSpec, Signature, Tolerance

__all__ = ["verify_bucket"]


def verify_bucket(
    spec: ModelSpec,
    signature: Signature,
    bucket: Bucket,
    replica: Replica,
    program: RowProgram,
    golden: GoldenReplay,
    probes: GoldenReplay,
    buffers: BatchBuffers,
    tolerance: Tolerance,
) -> dict[str, float]:
    """Poisons rows, then replays every golden request, at fills 1, 2, half, full - 1 and full.

    Args:
      spec: the model.
      signature: layout of the leaves.
      bucket: the one to prove.
      replica: holds its executable, as it will serve.
      program: what the executable was compiled from, to explain a refusal.
      golden: requests and reference scores.
      probes: requests that differ from each other whatever the golden ones do; their scores aren't looked at.
      buffers: written and read here.
      tolerance: largest allowed error.

    Returns:
      Largest error by task.

    Raises:
      VerifyError: names task, bucket and error when scores leave the tolerance.
      ModelError: names the operation that crosses rows.
    """
    leaves = buffers.leaves(bucket)
    for batches in (probes, golden):
        batches.fill(leaves, bucket, bucket.rows)
        check_rows_independent(spec, signature, bucket, replica, program, leaves)
    # All rows alike: one that differs decides every `any`, `all` and comparison over the batch.
    for leaf in signature.leaves:
        if leaf.name != REQUEST_OF_ROW:
            leaves[leaf.name][:] = leaf.dtype == "bool"
    check_rows_independent(spec, signature, bucket, replica, program, leaves)
    worst = dict.fromkeys((task.name for task in spec.tasks), 0.0)
    fills = sorted({1, 2, bucket.rows // 2, bucket.rows - 1, bucket.rows} & set(range(1, bucket.rows + 1)))
    batches = [(num_rows, start) for start, num_rows in enumerate(fills)]
    batches += [(bucket.rows, start) for start in range(0, golden.num_requests, bucket.requests)]
    for num_rows, start in batches:
        expected = golden.fill(leaves, bucket, num_rows, start)
        errors = score_errors(spec, replica.run(bucket, leaves), expected)
        check_errors(spec, bucket, errors, tolerance, f"{num_rows} valid rows")
        worst = {task: max(worst[task], errors[task]) for task in worst}
    return worst
