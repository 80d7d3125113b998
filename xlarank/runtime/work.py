"""What a pool of devices asks of a model: `Workload`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from xlarank.runtime.batcher import Batch
from xlarank.runtime.isolation import Culprit

__all__ = ["Workload"]


class Workload(Protocol):
    """A model's part. The pool calls it without holding its lock."""

    def run(self, batch: Batch, device_index: int) -> Any:
        """Runs what is still waited for of a batch; raises when it fails or gives scores that aren't finite.

        What `answer` takes; its `is_whole` tells whether that was all. None if it was nothing.
        """
        ...

    def answer(self, result: Any) -> None:
        """Answers the requests of a batch that has run."""
        ...

    def accuse(self, culprit: Culprit) -> None:
        """Answers a request that fails by itself on devices that work."""
        ...

    def fail(self, items: Sequence[Any], error: Exception) -> None:
        """Answers requests that will not be run, or not to their end."""
        ...

    def fail_late(self, item: Any) -> None:
        """Answers a request whose deadline passed, or would have, before it was run to its end."""
        ...

    def probe(self, device_index: int) -> None:
        """Raises when a golden replay on the device fails."""
        ...
