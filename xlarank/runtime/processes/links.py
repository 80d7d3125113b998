"""The supervisor's end of its links, and processes as the system knows them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["adopt_orphans", "kill", "listening_at", "receive"]

_log = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36


def listening_at(path: Path) -> socket.socket:
    """A socket that processes of this user alone can find."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening


def receive(link: Connection) -> Any:
    """The message that has begun to come.

    Raises:
      EOFError, OSError: if there is none. A process that stands still in the middle of one is killed, as this
        one must go on.
    """
    try:
        return link.recv()
    except BlockingIOError:
        with socket.socket(fileno=os.dup(link.fileno())) as own:
            pid, _, _ = struct.unpack("3i", own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        _log.error("a process (pid %d) stands still in the middle of a message and is killed", pid)
        kill(pid)
        raise


def kill(pid: int) -> None:
    """Of a process whose link is open: it is there, and the number is nobody else's."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def adopt_orphans() -> None:
    """A holder that outlives the one it was forked from is a child of this process then, not of the machine's
    first one. Where the system won't, it is that one's."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        _log.info("holders may become children of init: %s", os.strerror(ctypes.get_errno()))
