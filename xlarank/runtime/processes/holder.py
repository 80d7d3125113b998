"""The process that has the tables and forks the workers: `Holder`."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from xlarank.errors import XlarankError
from xlarank.host import TableMemory
from xlarank.runtime.compile_helper import CompileDiedError
from xlarank.runtime.process_ends import Backoff, how_it_ended
from xlarank.runtime.processes.messages import (
    Complete,
    Failed,
    Hello,
    Order,
    Retire,
    Stop,
    SuccessorEnded,
    Version,
    WorkerEnded,
    WorkerStarted,
    open_link,
)
from xlarank.runtime.tables import LoadedTables

__all__ = ["Holder"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Worker:
    """One of the k, whichever process it is now. Of the holder's one thread."""

    index: int
    backoff: Backoff = dataclasses.field(default_factory=Backoff)
    pid: int = 0
    """0 while there is none."""

    exited: int = -1
    """File that is readable once the process has ended."""

    readied: int = -1
    """Pipe that it writes to when it serves; -1 once it has."""

    ready_at: float | None = None
    has_been_ready: bool = False
    start_at: float | None = None
    """When it is to be forked; None for not by itself."""


class Holder:
    """Holds tables and looks after its workers until the supervisor says otherwise, or is gone.

    One thread, and neither JAX nor gRPC: what is forked is a process in which nothing runs. It starts the
    first worker alone: that one fills the compilation cache that the others read.

    A worker that ends before all have been ready is a start that failed; later it is forked anew, from the
    tables as they are by then.
    """

    def __init__(
        self,
        load: Callable[[Version, bool, Sequence[Mapping[str, TableMemory]]], LoadedTables],
        work: Callable[[Order, int, Mapping[Version, LoadedTables], bool, Callable[[], None]], int],
        *,
        is_current: Callable[[Version, LoadedTables], bool] = lambda _version, _tables: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          load: reads a version's tables, beside others that serve or not; told where the tables of the
            model's other versions are, those that this one follows among them.
          work: what a worker does: told the order, its index, the tables, whether it is started again, and
            whom to tell that it serves. Returns its exit status.
          is_current: whether tables that are held are of the bundle that lies there now.
          clock: seconds, monotonic.
        """
        self._load = load
        self._work = work
        self._is_current = is_current
        self._clock = clock
        self._tables: dict[
            Version, LoadedTables
        ] = {}  # nothing else may keep any, or it would never be freed
        self._workers: list[_Worker] = []
        self._successors: dict[int, tuple[int, int]] = {}  # by pid, a file readable at its end; generation
        self._is_complete = False  # moves one way
        self._is_ending = False  # moves one way

    def run(self, order: Order) -> int:
        """Loads, forks, looks after; returns the exit status once all workers have ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it ends after its workers, when it is told
        self._order = order
        hello = Hello(generation=order.generation, pid=os.getpid(), index=None)
        self._link: Connection = open_link(order.link, hello)
        if not self._load_all():
            return 1
        self._workers = [_Worker(index) for index in range(order.num_workers)]
        gc.collect()
        gc.freeze()  # else each worker's collector would write to every object, and have a copy of it
        self._start(self._workers[0])
        while not self._is_ending or any(worker.pid for worker in self._workers):
            self._step()
        return 0

    def _load_all(self) -> bool:
        # Where they are, and not the tables, which would never be freed.
        memory = {version: loaded.memory for version, loaded in self._tables.items()}
        for version in list(self._tables):
            if version not in self._order.versions or not self._is_current(version, self._tables[version]):
                del self._tables[version]
        for version in self._order.versions:
            if version in self._tables:
                continue
            try:
                others = [memory[other] for other in memory if other[0] == version[0]]
                self._tables[version] = self._load(version, self._order.is_beside, others)
                memory[version] = self._tables[version].memory
            except CompileDiedError as error:
                self._tell(Failed(reason=str(error), version=version, is_death=True))
                return False
            except XlarankError as error:
                self._tell(Failed(reason=str(error), version=version))
                return False
        return True

    def _step(self) -> None:
        """Waits for the next thing that happens, and sees to it."""
        starts = [w.start_at for w in self._workers if w.start_at is not None]
        timeout = max(0.0, min(starts) - self._clock()) if starts else None
        watched: list[Any] = [] if self._link.closed else [self._link]
        watched += [w.exited for w in self._workers if w.pid]
        watched += [exited for exited, _ in self._successors.values()]
        watched += [w.readied for w in self._workers if w.readied >= 0]
        happened = set(wait(watched, timeout))
        if self._link in happened:
            self._obey()
        # First all that has happened: files that are closed meanwhile give their numbers to new ones.
        readied = [worker for worker in self._workers if worker.readied in happened]
        ended = [worker for worker in self._workers if worker.pid and worker.exited in happened]
        successors = [pid for pid, (exited, _) in self._successors.items() if exited in happened]
        for worker in readied:
            self._see_ready(worker)
        for worker in ended:
            self._see_end(worker)
        self._see_complete()
        for pid in successors:
            exited, generation = self._successors.pop(pid)
            why = how_it_ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.close(exited)
            self._tell(SuccessorEnded(generation=generation, why=why))
        for worker in self._workers:
            if worker.start_at is not None and worker.start_at <= self._clock() and not self._is_ending:
                self._start(worker)

    def _obey(self) -> None:
        try:
            message = self._link.recv()
        except (EOFError, OSError):  # the supervisor is gone; the workers know that themselves
            message = Stop()
            self._link.close()
        if isinstance(message, Order):
            self._fork_successor(message)
        elif isinstance(message, (Stop, Retire)):
            self._is_ending = True
            for worker in self._workers:
                worker.start_at = None
                if worker.pid and worker.ready_at is None:  # it doesn't hear the supervisor before it serves
                    os.kill(worker.pid, signal.SIGTERM)

    def _see_ready(self, worker: _Worker) -> None:
        is_ready = bool(os.read(worker.readied, 1))
        os.close(worker.readied)
        worker.readied = -1
        if not is_ready:
            return  # it has ended
        worker.ready_at = self._clock()
        worker.has_been_ready = True
        if not self._is_ending:
            for other in self._workers:
                if not other.pid and not other.has_been_ready and other.start_at is None:
                    self._start(other)

    def _see_complete(self) -> None:
        """Only while all of them serve: one that has ended before is a start that failed."""
        is_whole = all(w.pid and w.ready_at is not None for w in self._workers)
        if is_whole and not self._is_complete and not self._is_ending:
            self._is_complete = True
            self._tell(Complete())

    def _see_end(self, worker: _Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        os.close(worker.exited)
        for loaded in self._tables.values():
            for rows in loaded.shared_rows.values():
                rows.repair()
        served = 0.0 if worker.ready_at is None else self._clock() - worker.ready_at
        pid, worker.pid, worker.ready_at = worker.pid, 0, None
        why = how_it_ended(os.waitstatus_to_exitcode(status))
        is_restarted = self._is_complete and not self._is_ending
        if is_restarted:
            seconds = worker.backoff.after(served)
            worker.start_at = self._clock() + seconds
            _log.error(
                "process %d (pid %d) ended: %s; it is started again in %g s", worker.index, pid, why, seconds
            )
        self._tell(WorkerEnded(index=worker.index, pid=pid, why=why, is_restarted=is_restarted))

    def _start(self, worker: _Worker) -> None:
        worker.start_at = None
        reader, writer = os.pipe()
        _flush()
        try:
            pid = os.fork()
        except OSError as error:  # of processes or memory there are too many, or too little, now
            os.close(reader)
            os.close(writer)
            seconds = worker.backoff.after(0.0)
            worker.start_at = self._clock() + seconds
            _log.error(
                "process %d can't be forked, %s; another try comes in %g s", worker.index, error, seconds
            )
            return
        if not pid:
            os.close(reader)
            self._be_worker(worker.index, writer)
        os.close(writer)
        worker.pid, worker.exited, worker.readied = pid, os.pidfd_open(pid), reader
        self._tell(WorkerStarted(index=worker.index, pid=pid))

    def _be_worker(self, index: int, writer: int) -> None:
        """The rest of a worker's life."""

        def say_ready() -> None:
            with contextlib.suppress(BrokenPipeError):  # the holder has ended; who serves goes on
                os.write(writer, b"r")
            os.close(writer)

        def work() -> int:
            return self._work(self._order, index, self._tables, self._is_complete, say_ready)

        self._leave()
        _end_with(work)

    def _fork_successor(self, order: Order) -> None:
        """A fork that inherits the tables; what it doesn't need of them it lets go of."""
        _flush()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(SuccessorEnded(generation=order.generation, why=str(error)))
            return
        if pid:
            self._successors[pid] = os.pidfd_open(pid), order.generation
            return
        self._leave()
        self._workers, self._successors = [], {}
        self._is_complete = self._is_ending = False
        gc.unfreeze()
        _end_with(lambda: self.run(order))

    def _leave(self) -> None:
        """In a fork: what is the holder's own is closed, and signals do what they do by default."""
        self._link.close()
        for worker in self._workers:
            for file in (worker.exited if worker.pid else -1, worker.readied):
                if file >= 0:
                    os.close(file)
        for exited, _ in self._successors.values():
            os.close(exited)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _tell(self, message: object) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone: the next look at the link finds it
            self._link.send(message)


def _end_with(work: Callable[[], int]) -> None:
    """Ends the process with what `work` returns, without returning into what it was forked from."""
    status = 1
    try:
        status = work()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        _log.exception("a forked process failed")
    finally:
        _flush()
        os._exit(status)


def _flush() -> None:
    """Writes what was said, lest a fork say it again; who reads it may be gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
