"""Aligned host buffers that the gather writes and the device reads."""

from __future__ import annotations

import math
import queue

import numpy as np

from xlarank.host import aligned_empty
from xlarank.spec import Bucket, BucketLadder, Signature

__all__ = ["BatchBuffers", "BufferRing"]


class BatchBuffers:
    """The input leaves of one batch, 64-byte aligned, sized for the largest bucket.

    A smaller bucket uses the front of the same memory. JAX reads aligned arrays on the CPU without a
    copy, so they may be written again only after the batch's results are ready.
    """

    def __init__(self, signature: Signature, ladder: BucketLadder) -> None:
        self._flat = {}
        for leaf in signature.leaves:
            most = max(leaf.leading(bucket) for bucket in ladder.buckets)
            self._flat[leaf.name] = aligned_empty((most * math.prod(leaf.tail),), np.dtype(leaf.dtype))
        self._views: dict[Bucket, dict[str, np.ndarray]] = {}
        for bucket in ladder.buckets:
            shapes = {leaf.name: leaf.shape(bucket) for leaf in signature.leaves}
            self._views[bucket] = {
                name: self._flat[name][: math.prod(shape)].reshape(shape) for name, shape in shapes.items()
            }

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return sum(array.nbytes for array in self._flat.values())

    def leaves(self, bucket: Bucket) -> dict[str, np.ndarray]:
        """Arrays of ``leaf.shape(bucket)`` by leaf name, in the order of the signature."""
        return self._views[bucket]


class BufferRing:
    """A fixed set of `BatchBuffers`; one is never handed out while XLA may read it."""

    def __init__(self, signature: Signature, ladder: BucketLadder, size: int) -> None:
        self._free: queue.SimpleQueue[BatchBuffers] = queue.SimpleQueue()
        for _ in range(size):
            self._free.put(BatchBuffers(signature, ladder))

    def acquire(self) -> BatchBuffers:
        """Takes a buffer that nobody reads or writes; waits for one."""
        return self._free.get()

    def release(self, buffers: BatchBuffers) -> None:
        """Gives a buffer back, once the results of its batch are ready."""
        self._free.put(buffers)
