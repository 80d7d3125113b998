"""Lines of progress of what has no terminal, such as a server's log: `say`."""

from __future__ import annotations

import contextlib
import sys

__all__ = ["say"]


def say(line: str) -> None:
    """Writes a line to standard error at once. That nobody reads it any more, or its disk is full, is no
    reason for what is told to fail."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
