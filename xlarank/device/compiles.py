"""Counts compiles on the request path. The count of a healthy server is 0."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax.monitoring

__all__ = ["num_request_path_compiles", "request_path"]

# JAX's own event; it fires on hits of the compilation cache too, which also stall a request.
_EVENT = "/jax/core/compile/backend_compile_duration"

_thread = threading.local()
_lock = threading.Lock()
_count = 0  # guarded by _lock


@contextlib.contextmanager
def request_path() -> Iterator[None]:
    """Marks the calling thread as answering requests: a compile in here is a defect and is counted."""
    _thread.is_request_path = True
    try:
        yield
    finally:
        _thread.is_request_path = False


def num_request_path_compiles() -> int:
    """Compiles inside `request_path` since the process started."""
    return _count


def _on_event(event: str, duration_secs: float, **_: object) -> None:
    global _count
    if event == _EVENT and getattr(_thread, "is_request_path", False):
        with _lock:
            _count += 1


jax.monitoring.register_event_duration_secs_listener(_on_event)
