"""Counts compiles on the request path. The count of a healthy server is 0."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax.monitoring

__all__ = ["CompileCounter"]

# JAX's own event; it fires on hits of the compilation cache too, which also stall a request.
_EVENT = "/jax/core/compile/backend_compile_duration"

_thread = threading.local()


class CompileCounter:
    """Compiles that happened while threads were answering requests of one model. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0  # guarded by _lock

    @property
    def count(self) -> int:
        """Compiles inside `request_path` so far."""
        return self._count

    @contextlib.contextmanager
    def request_path(self) -> Iterator[None]:
        """Marks the calling thread as answering requests: a compile in here is a defect and is counted."""
        _thread.counter = self
        try:
            yield
        finally:
            _thread.counter = None

    def add(self) -> None:
        """Counts one compile."""
        with self._lock:
            self._count += 1


def _on_event(event: str, duration_secs: float, **_: object) -> None:
    counter: CompileCounter | None = getattr(_thread, "counter", None)
    if event == _EVENT and counter is not None:
        counter.add()


jax.monitoring.register_event_duration_secs_listener(_on_event)
