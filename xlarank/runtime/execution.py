"""Runs batches of one model on its devices: `Execution`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xlarank import device
from xlarank.errors import ExecutionError
from xlarank.host import Gatherer, Segment
from xlarank.runtime.batcher import Batch
from xlarank.runtime.pending import Pending
from xlarank.spec import Bucket, BucketLadder

__all__ = ["Executed", "Execution", "Executor", "RunBatch"]

RunBatch = Callable[[Bucket, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""`Executor.run`."""

# A buffer is read while its batch runs and written again after: one a device.
_BUFFERS_A_DEVICE = 1

_FLOAT32 = np.dtype(np.float32)


class Executor(Protocol):
    """Runs the programs of a model on one device: `xlarank.device.Replica`, or what tests make fail."""

    def run(self, bucket: Bucket, leaves: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """[B] float32 scores by task, padding included, of filled buffers."""
        ...


@dataclasses.dataclass(frozen=True)
class Executed:
    """What came of a batch."""

    scores: Mapping[str, np.ndarray]
    """[B] float32 by task, padding included."""

    started_at: float
    gather_seconds: float
    execute_seconds: float


class Execution:
    """Gathers batches and executes them. One thread a device at a time."""

    def __init__(
        self,
        gatherer: Gatherer,
        ladder: BucketLadder,
        executors: Sequence[Executor],
        *,
        check: Callable[[RunBatch, device.BatchBuffers], object],
    ) -> None:
        """
        Args:
          gatherer: of the model.
          ladder: the compiled buckets.
          executors: by device.
          check: replays golden requests by what runs a batch, in buffers that it may write; raises when the
            scores are wrong.
        """
        self._check = check
        self._gatherer = gatherer
        self._executors = executors
        self._rings = [device.BufferRing(gatherer.signature, ladder, _BUFFERS_A_DEVICE) for _ in executors]
        self._compiles = device.CompileCounter()

    @property
    def num_compiles(self) -> int:
        """Compiles while executing; anything but 0 is a defect."""
        return self._compiles.count

    def run(self, batch: Batch[Pending], device_index: int) -> Executed:
        """Gathers and executes.

        Raises:
          ExecutionError: if what the device gives isn't the scores of the model's tasks.
          Exception: what the gather or the device raises.
        """
        ring = self._rings[device_index]
        buffers = ring.acquire()
        try:
            with self._compiles.request_path():
                start = time.monotonic()
                leaves = buffers.leaves(batch.bucket)
                segments = [Segment(part.item.bound, part.begin, part.end) for part in batch.parts]
                self._gatherer.gather(segments, batch.bucket, leaves)
                gathered = time.monotonic()
                scores = self._run_on(device_index, batch.bucket, leaves)
                executed = time.monotonic()
        finally:
            ring.release(buffers)
        return Executed(scores, start, gathered - start, executed - gathered)

    def probe(self, device_index: int) -> None:
        """Replays golden requests on a device; raises when their scores are wrong, or what it raises."""
        ring = self._rings[device_index]
        buffers = ring.acquire()
        try:
            self._check(functools.partial(self._run_on, device_index), buffers)
        finally:
            ring.release(buffers)

    def _run_on(
        self, device_index: int, bucket: Bucket, leaves: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Runs a device's executor and holds it to what `Executor.run` says."""
        scores = self._executors[device_index].run(bucket, leaves)
        spec = self._gatherer.spec
        expected = {task.name: ((bucket.rows,), _FLOAT32) for task in spec.tasks}
        got = _form(scores)
        if got != expected:
            raise ExecutionError(
                f"model {spec.name!r}, bucket {bucket}: expected {_words(expected)}, got {_words(got)}"
            )
        return scores


def _form(values: object) -> Any:
    """Shape and dtype of an array, those of a mapping's arrays by task, and of anything else its type."""
    if isinstance(values, Mapping):
        return {task: _form(own) for task, own in values.items()}
    return (values.shape, values.dtype) if isinstance(values, np.ndarray) else type(values)


def _words(form: Any) -> str:
    if isinstance(form, Mapping):
        return str({task: _words(own) for task, own in form.items()})
    if isinstance(form, type):
        return form.__name__
    shape, dtype = form
    return f"{dtype}{list(shape)}"
