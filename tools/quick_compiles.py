"""What is computed once is compiled as fast as XLA can: `quickly_compiled`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

__all__ = ["quickly_compiled"]


@contextlib.contextmanager
def quickly_compiled() -> Iterator[None]:
    """For operations one by one, such as random weights and reference scores: XLA optimizes little, and keys
    that are made here are of the random generator that takes least time to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_prng_impl("rbg"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
