"""Work that is done one piece at a time, in a thread that can be left behind: `Changes`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

__all__ = ["Changes"]

Result = TypeVar("Result")


class Changes:
    """Does what is asked of it in one thread, in order. Any thread may ask.

    Work that reads files may take for ever, where their file system is gone: nobody waits for it longer than
    until `close` returns.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
          name: of the thread.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._working = threading.Lock()  # held by what is being done
        self._is_closing = False  # moves one way
        self._end: Future[None] = Future()

    def do(self, work: Callable[[], Result]) -> Result:
        """Does it and waits.

        Raises:
          CancelledError: if `close` came before its end.
        """
        try:
            done = self._thread.submit(self._do, work)
        except RuntimeError:
            raise CancelledError from None
        ends: list[Future[Any]] = [done, self._end]
        wait(ends, return_when=FIRST_COMPLETED)
        if not done.done():
            raise CancelledError
        return done.result()

    def close(self, timeout: float) -> bool:
        """Begins nothing more; whether what is being done has ended within so many seconds. Once."""
        self._is_closing = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        has_ended = self._working.acquire(timeout=timeout)
        if has_ended:
            self._working.release()
        self._end.set_result(None)
        return has_ended

    def _do(self, work: Callable[[], Result]) -> Result:
        with self._working:
            if self._is_closing:
                raise CancelledError
            return work()
