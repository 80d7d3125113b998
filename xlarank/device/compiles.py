"""Counts compiles: on the request path, where a healthy server has none, and of the process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import jax.monitoring

__all__ = ["CompileCounter", "num_compiled"]

# JAX's own events. The first fires on hits of the compilation cache too, which also stall a request.
_EVENT = "/jax/core/compile/backend_compile_duration"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"

_thread = threading.local()
_lock = threading.Lock()
_num_programs = 0  # guarded by _lock: compiled or found in the cache
_num_hits = 0  # guarded by _lock: found in the cache


def num_compiled() -> int:
    """Programs that LLVM, or what else XLA has for the device, compiled in this process so far.

    Those found in the compilation cache don't count.
    """
    with _lock:
        return _num_programs - _num_hits


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
    global _num_programs
    if event != _EVENT:
        return
    with _lock:
        _num_programs += 1
    counter: CompileCounter | None = getattr(_thread, "counter", None)
    if counter is not None:
        counter.add()


def _on_hit(event: str, **_: object) -> None:
    global _num_hits
    if event == _HIT_EVENT:
        with _lock:
            _num_hits += 1


jax.monitoring.register_event_listener(_on_hit)
jax.monitoring.register_event_duration_secs_listener(_on_event)
