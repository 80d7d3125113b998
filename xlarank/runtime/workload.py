"""What one model does on the devices of a pool: `ModelWorkload`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from xlarank.errors import DeadlineError, ExecutionError
from xlarank.runtime.batcher import Batch
from xlarank.runtime.captures import Captures
from xlarank.runtime.complaints import Complaints
from xlarank.runtime.execution import Executed, Execution
from xlarank.runtime.isolation import Culprit
from xlarank.runtime.metrics import ModelMetrics
from xlarank.runtime.part_queue import Part
from xlarank.runtime.pending import Pending
from xlarank.spec import BucketLadder

__all__ = ["ModelWorkload"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What came of a batch."""

    batch: Batch[Pending]
    """What of it was still waited for."""

    executed: Executed
    is_whole: bool
    """Whether that was all of it."""


class ModelWorkload:
    """Runs batches of one model version and answers its requests: the pool's `Workload`."""

    def __init__(
        self,
        name: str,
        version: int,
        ladder: BucketLadder,
        execution: Execution,
        metrics: ModelMetrics,
        captures: Captures,
        *,
        drop: Callable[[Pending, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          name: of the model.
          version: of the model.
          ladder: the compiled buckets.
          execution: gathers and executes.
          metrics: counts.
          captures: keeps requests that were slow or at fault.
          drop: forgets what is still queued of a request; told whether it was found late as it was to run.
          clock: seconds; how often the log hears of the same thing.
        """
        self._name, self._version = name, version
        self._ladder = ladder
        self._execution = execution
        self._metrics = metrics
        self._captures = captures
        self._drop = drop
        self._complaints = Complaints(_log, clock=clock)

    def run(self, batch: Batch[Pending], device_index: int) -> Ran | None:
        """Gathers and executes what is still waited for; None when that is nothing.

        Raises:
          ExecutionError: if the scores aren't finite.
          Exception: what the gather or the device raises.
        """
        now = time.monotonic()
        # Since the batch was formed, long ago if this is a retry, callers may have gone or deadlines passed.
        kept: list[Part[Pending]] = []
        for part in batch.parts:
            if part.item.is_over:
                self._drop(part.item, False)
            elif part.ticket.deadline <= now:
                self._drop(part.item, part.item.fail(self._late(part.item)))
            else:
                kept.append(part)
        if not kept:
            return None
        is_whole = len(kept) == len(batch.parts)
        left = batch if is_whole else self._batch_of(kept)
        return Ran(left, self._execute(left, device_index), is_whole)

    def _batch_of(self, parts: Sequence[Part[Pending]]) -> Batch[Pending]:
        bucket = self._ladder.bucket_for(sum(part.num_rows for part in parts), len(parts))
        return Batch(bucket, tuple(parts))

    def _execute(self, batch: Batch[Pending], device_index: int) -> Executed:
        executed = self._execution.run(batch, device_index)
        for task, values in executed.scores.items():
            is_finite = np.isfinite(values[: batch.num_rows])
            if not is_finite.all():
                raise ExecutionError(
                    f"model {self._name!r}, task {task!r}, bucket {batch.bucket}: expected finite scores, "
                    f"got {np.count_nonzero(~is_finite)} of {batch.num_rows} that are not"
                )
        return executed

    def answer(self, result: Ran | None) -> None:
        """Answers the requests of a batch that has run."""
        if result is None:
            return
        batch, executed = result.batch, result.executed
        self._metrics.record_batch(
            batch.bucket, batch.num_rows, len(batch.parts), executed.gather_seconds, executed.execute_seconds
        )
        self._metrics.set_compiles(self._execution.num_compiles)
        row = 0
        for part in batch.parts:
            end = row + part.num_rows
            is_whole = part.item.add(
                part.begin,
                {task: values[row:end] for task, values in executed.scores.items()},
                started_at=executed.started_at,
                gather_seconds=executed.gather_seconds,
                execute_seconds=executed.execute_seconds,
            )
            row = end
            if is_whole:
                self.respond(part.item)

    def respond(self, pending: Pending) -> None:
        """Answers a request all of whose scores have come."""
        num_candidates, before = pending.bound.num_candidates, pending.before_seconds
        answer = pending.answer(
            time.monotonic(),
            lambda answer: self._metrics.record_success(num_candidates, answer.timings, before),
        )
        if answer is None:
            return
        if self._captures.is_slow(before + answer.timings.total):
            self._captures.keep_slow(
                self._name, self._version, pending.bound.request, answer.timings, answer.scores, before
            )

    def accuse(self, culprit: Culprit) -> None:
        """Answers a request that fails by itself on devices that work, and keeps it."""
        pending = culprit.part.item
        rows = f"row {culprit.begin}"
        if culprit.end - culprit.begin > 1:
            rows = f"rows {culprit.begin} to {culprit.end - 1}"
        detail = f"model {self._name!r}: the request fails on every device, by {rows}: {culprit.error}"
        self._complaints.add("%s", detail, about=type(culprit.error))
        self.fail([pending], ExecutionError(detail))

    def fail(self, items: Sequence[Pending], error: Exception) -> None:
        """Answers requests that will not be run, or not to their end; keeps those that may be at fault."""
        for pending in items:
            self._drop(pending, False)
            if isinstance(error, ExecutionError) and not pending.has_answer:
                self._captures.keep_fault(self._name, self._version, pending.bound.request, str(error))
            pending.fail(error)

    def fail_late(self, item: Pending) -> None:
        """Answers a request whose deadline passed while it was queued."""
        self.fail([item], self._late(item))

    def _late(self, pending: Pending) -> DeadlineError:
        return DeadlineError(
            f"model {self._name!r}: the request was queued past its deadline, or would have been: "
            f"{pending.num_rows_done} of its {pending.bound.num_candidates} candidates were scored"
        )

    def probe(self, device_index: int) -> None:
        """Replays golden requests on a device; raises when that fails."""
        self._execution.probe(device_index)

    def close(self) -> None:
        """Nothing of it runs any more."""
        self._complaints.close()
