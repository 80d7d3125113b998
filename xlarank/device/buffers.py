"""Aligned host buffers that the gather writes and the device reads."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping

import numpy as np

from xlarank.device.layout import BatchLayout
from xlarank.host import aligned_empty
from xlarank.spec import Bucket, BucketLadder, Signature

__all__ = ["BatchBuffers", "BatchLeaves", "BufferRing"]


class BatchLeaves(Mapping[str, np.ndarray]):
    """The leaves of a bucket by name, in the order of the signature, as parts of one piece of memory.

    The arrays are written by whoever holds the buffers; which they are doesn't change.

    Attributes:
      names: of the leaves.
      layout: where they lie.
      words: [W] uint32, the memory.
    """

    __slots__ = ("_arrays", "layout", "names", "words")

    def __init__(self, signature: Signature, bucket: Bucket, memory: np.ndarray) -> None:
        """
        Args:
          signature: names the leaves.
          bucket: their size.
          memory: uint32, 64-byte aligned, whose front they take.
        """
        self.names = tuple(leaf.name for leaf in signature.leaves)
        self.layout = BatchLayout.of(signature, bucket)
        self.words = memory[: self.layout.num_words]
        self._arrays = dict(zip(self.names, self.layout.views(self.words), strict=True))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class BatchBuffers:
    """The input leaves of one batch in one piece of memory, each 64-byte aligned, sized for the largest
    bucket.

    A smaller bucket uses the front of the same memory, where its leaves lie closer together: what is written
    for one bucket means nothing to another. JAX reads aligned arrays on the CPU without a copy, and those of
    a transfer after the call that starts it, so they may be written again only after the batch's results are
    ready.
    """

    def __init__(self, signature: Signature, ladder: BucketLadder) -> None:
        most = max(BatchLayout.of(signature, bucket).num_words for bucket in ladder.buckets)
        self._memory = aligned_empty((most,), np.uint32)
        self._leaves = {bucket: BatchLeaves(signature, bucket, self._memory) for bucket in ladder.buckets}

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return self._memory.nbytes

    def leaves(self, bucket: Bucket) -> BatchLeaves:
        """Arrays of ``leaf.shape(bucket)`` by leaf name, in the order of the signature."""
        return self._leaves[bucket]


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
