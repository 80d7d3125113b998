"""States a ModelSpec to the native kernel: `native_plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xlarank.host._extension import native
from xlarank.spec import ModelSpec, Signature

__all__ = ["native_plan"]


def native_plan(
    spec: ModelSpec, signature: Signature, tables: Mapping[str, np.ndarray], num_threads: int
) -> Any:
    """The kernel for a model."""
    assert native is not None
    raise NotImplementedError
