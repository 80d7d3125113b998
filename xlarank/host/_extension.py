"""Finds the native kernel, `xlarank.host._native`, if it is built."""

from __future__ import annotations

import logging
from types import ModuleType

__all__ = ["native", "native_available"]

native: ModuleType | None
"""The extension module, or None where it isn't built; a warning is logged once in that case."""

try:
    import xlarank.host._native as native
except ImportError as error:
    native = None
    # Logged, not warned: a program that turns warnings into errors must still be able to import.
    logging.getLogger("xlarank").warning(
        "the native kernel of xlarank is not available (%s); host work runs in NumPy, many times slower; "
        "`pip install .` builds it",
        error,
    )


def native_available() -> bool:
    """Whether the native kernel is built and loaded."""
    return native is not None
