"""Which threads run which RPCs: `ServerThreads`."""

from __future__ import annotations

import concurrent.futures
from typing import Any

__all__ = ["ServerThreads", "on_threads"]

_NUM_CONTROL = 4
_NUM_REFLECTION = 2


class ServerThreads:
    """The thread pools of a server.

    Probes and metadata have threads of their own, so that they are answered while every ranking thread
    waits for a device. So has reflection: it holds a thread for as long as its stream is open.
    """

    def __init__(self, num_rank_threads: int) -> None:
        self.rank = concurrent.futures.ThreadPoolExecutor(num_rank_threads, "grpc-rank")
        self.control = concurrent.futures.ThreadPoolExecutor(_NUM_CONTROL, "grpc-control")
        self.reflection = concurrent.futures.ThreadPoolExecutor(_NUM_REFLECTION, "grpc-reflection")

    def close(self) -> None:
        """Ends the threads once they have nothing left to do."""
        for pool in (self.rank, self.control, self.reflection):
            pool.shutdown()


def on_threads(function: Any, pool: concurrent.futures.ThreadPoolExecutor) -> Any:
    """Has gRPC run a method's function on a pool other than the server's; returns the function.

    An attribute that gRPC calls experimental; without it the method runs on the server's pool.
    """
    function.experimental_thread_pool = pool
    return function
