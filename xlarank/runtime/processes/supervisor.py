"""The process that looks after the others: `Supervisor`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from xlarank.errors import ConfigError, ModelError
from xlarank.runtime.process_ends import MOST_DEATHS, Backoff
from xlarank.runtime.processes.links import adopt_orphans, kill, listening_at, receive
from xlarank.runtime.processes.messages import (
    Complete,
    Failed,
    Hello,
    LastMetrics,
    MetricsText,
    Order,
    Policies,
    Ready,
    Retire,
    Stop,
    SuccessorEnded,
    Version,
    VersionsElsewhere,
    WorkerEnded,
    WorkerStarted,
)
from xlarank.runtime.processes.scrapes import Scrapes, Worker
from xlarank.runtime.processes.version_plan import VersionPlan
from xlarank.spec.versions import ModelPolicy, VersionState, VersionStatus

__all__ = ["StopSignal", "Supervisor"]

_log = logging.getLogger(__name__)

_KILL_SECONDS = 10.0
"""After the grace period of a stop, what is left is killed."""

_BEAT_SECONDS = 5.0
"""How often workers are asked whether they are there."""

_HUNG_SECONDS = 30.0
"""A worker that hasn't answered for so long is killed, and started again."""

_SLOW_SECONDS = 60.0
"""A start that takes longer is in the log, and again after as long: tables may be large, or it may hang."""

_MESSAGE_SECONDS = 10.0
"""How long the rest of a message may take once it has begun, and the first of a new process."""


class StopSignal(Protocol):
    """Whether to stop, and a file that becomes readable then."""

    def fileno(self) -> int:
        """The file."""
        ...

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


@dataclasses.dataclass
class _Generation:
    """A holder and its workers."""

    number: int
    versions: tuple[Version, ...]
    policies: tuple[ModelPolicy, ...]
    """Of its workers, one a model."""

    started_at: float
    slow_at: float
    """When the log says next that it is still starting."""

    holder: Connection | None = None
    holder_pid: int = 0
    workers: dict[int, Worker] = dataclasses.field(default_factory=dict)
    """By pid."""

    is_complete: bool = False
    is_ending: bool = False
    failure: Failed | None = None
    has_had_holder: bool = False


class Supervisor:
    """Has k processes serve what the repository's policies want, until it is told to stop.

    A new version is loaded and proven by k new workers beside the old ones, and when all of them serve, the
    old ones let their clients go and end. Where one of the new can't, all of them end, and the old ones go
    on.

    `run` is for one thread; any thread may ask for `metrics_text`.
    """

    def __init__(
        self,
        plan: VersionPlan,
        spawn: Callable[[Order], int],
        *,
        num_workers: int,
        folder: Path,
        watch_seconds: float | None,
        grace_seconds: float,
        on_ready: Callable[[tuple[Version, ...]], None],
        changed_policies: Callable[[], tuple[ModelPolicy, ...] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          plan: what is to be served.
          spawn: starts a holder that has nothing to inherit; returns its pid.
          num_workers: k.
          folder: of its own, that others may not enter, for the socket.
          watch_seconds: between two looks at the repository; None: it isn't looked at again.
          grace_seconds: how long a stop waits for accepted requests.
          on_ready: told once, what is served, when the first k serve.
          changed_policies: all policies if they have changed since the last call, else None; asked every
            `watch_seconds`.
          clock: seconds, monotonic.
        """
        self._plan = plan
        self._spawn = spawn
        self._num_workers = num_workers
        self._watch_seconds = watch_seconds
        self._grace_seconds = grace_seconds
        self._on_ready = on_ready
        self._changed_policies = changed_policies
        self._clock = clock
        self._path = folder / "link"
        self._listening = listening_at(self._path)
        self._beat_at = clock() + _BEAT_SECONDS
        self._num_deaths = 0  # starts in a row that ended so
        self._numbers = itertools.count(1)
        self._generations: dict[int, _Generation] = {}
        self._serving: _Generation | None = None
        self._starting: _Generation | None = None
        self._links: dict[Connection, Callable[[object], None]] = {}
        self._pids: dict[int, int] = {}  # of holders that are children of this process; their generations
        self._has_children = False  # as of the last look
        self._backoff = Backoff()
        self._failed_at = float("-inf")  # for no version's fault
        self._required: set[str] = set()  # models that have been served, or were there at the start
        self._last_wanted: tuple[Version, ...] = ()  # at the last look
        self._look_at = clock()
        self._policies_at = float("inf") if watch_seconds is None else clock()
        self._is_watched = watch_seconds is not None
        self._scrapes = Scrapes(num_workers, self._is_up, plan.statuses, clock=clock)

    def metrics_text(self) -> bytes:
        """What /metrics answers; asks every worker. Any thread."""
        return self._scrapes.text()

    def run(self, stop: StopSignal) -> None:
        """Serves until told to stop, then until all processes have ended.

        Raises:
          ModelError: if what is to be served at first can't be, and the repository isn't watched; says why.
        """
        adopt_orphans()
        try:
            while not stop.is_set():
                self._follow_policies()
                self._begin_next()
                self._step(self._next_time(), stop)
        finally:
            self._end()

    def close(self) -> None:
        """Frees files."""
        self._listening.close()
        self._scrapes.close()

    # What is to be served

    def _follow_policies(self) -> None:
        """Labels move, whatever is starting, and what nobody wants any more is started no further."""
        if self._watch_seconds is None or self._clock() < self._policies_at:
            return
        self._policies_at = self._clock() + self._watch_seconds
        policies = self._changed_policies()
        if policies is not None:
            self._plan.set_policies(policies)
            for generation in self._generations.values():
                is_new = generation is self._starting  # before its policies are those that are in force
                before = self._policies if is_new else generation.policies
                generation.policies = self._plan.policies(generation.versions, before, is_all=is_new)
        if self._starting is not None:
            self._reconsider(self._starting, have_policies_changed=policies is not None)

    def _reconsider(self, starting: _Generation, *, have_policies_changed: bool) -> None:
        """Not for a newer version: who publishes often would never see one served."""
        if (wanted := self._wanted()) is None:
            return
        unwanted = {*starting.versions} - {*self._served, *wanted}
        if not have_policies_changed:
            unwanted = self._plan.gone(unwanted)
        if unwanted:
            _log.warning("versions %s aren't wanted any more, and started no further", sorted(unwanted))
            self._end_start(starting)
            self._look_at = self._clock()

    @property
    def _served(self) -> tuple[Version, ...]:
        return () if self._serving is None else self._serving.versions

    @property
    def _policies(self) -> tuple[ModelPolicy, ...]:
        return () if self._serving is None else self._serving.policies

    def _wanted(self) -> tuple[Version, ...] | None:
        wanted = self._plan.wanted(self._served, self._policies, is_lost=self._is_lost)
        if wanted is not None:
            self._last_wanted = wanted
        return wanted

    @property
    def _is_lost(self) -> bool:
        """Whether what serves has lost the process that holds its tables."""
        return self._serving is not None and self._serving.holder is None

    def _begin_next(self) -> None:
        if self._starting is not None or self._clock() < self._look_at:
            return
        self._look_at = (
            self._clock() + self._watch_seconds if self._watch_seconds is not None else float("inf")
        )
        serving, served = self._serving, self._served
        is_looked_at = serving is None or self._is_watched
        wanted = self._wanted() if is_looked_at else self._plan.left(served) if self._is_lost else served
        if wanted is None and serving is None and not self._is_watched:
            raise ConfigError("the repository can't be looked at, and nothing is served yet")
        if wanted is None:
            return
        self._last_wanted = wanted
        if serving is None:
            self._required |= self._plan.models_on_disk
        if serving is not None and wanted == served and not self._is_lost:
            serving.policies = self._plan.policies(served, self._policies, is_all=True)
            return
        number = next(self._numbers)
        self._starting = self._generations[number] = _Generation(
            number,
            wanted,
            self._plan.policies(wanted, self._policies, is_all=True),
            self._clock(),
            self._clock() + _SLOW_SECONDS,
        )
        order = Order(
            generation=number,
            versions=wanted,
            num_workers=self._num_workers,
            is_beside=serving is not None,
            served=served,
            link=self._path,
        )
        if serving is not None and serving.holder is not None:
            with contextlib.suppress(OSError):  # it has just ended, which its link says next
                serving.holder.send(order)
        else:
            try:
                self._pids[self._spawn(order)] = number
            except OSError as error:
                failed = Failed(reason=f"no process can be started: {error}", version=None)
                self._see_failure(self._starting, failed, is_death=True)

    def _see_complete(self, generation: _Generation) -> None:
        if generation.failure is not None or generation.is_ending:
            return  # the word of its failure was on its way first
        self._num_deaths = 0
        generation.is_complete = True
        before, self._serving, self._starting = self._serving, generation, None
        self._required |= {model for model, _ in generation.versions}
        if before is None:
            self._on_ready(generation.versions)
        else:
            _log.info("versions %s are served, before %s", generation.versions, before.versions)
            for model in {m for m, _ in {*generation.versions} - {*before.versions}}:
                self._scrapes.versions.record_swap(model, self._clock() - generation.started_at)
            self._tell_all(before, Retire())

    def _see_failure(self, generation: _Generation, failed: Failed, *, is_death: bool = False) -> None:
        """One of the processes of a generation that isn't complete can't start.

        A version is blamed that was being loaded when it said so, or that is new where processes have died
        in several starts in a row. What is no version's fault ends the first start, and is tried again later.
        """
        if generation.failure is not None or generation.is_complete or generation.is_ending:
            return
        generation.failure = failed
        self._end_start(generation)
        serving = self._serving
        self._num_deaths = self._num_deaths + 1 if is_death else 0
        is_hopeless = not is_death or self._num_deaths >= MOST_DEATHS
        new = set(generation.versions) - set(() if serving is None else serving.versions)
        at_fault = new & {failed.version} if is_hopeless else set[Version]()
        if serving is None and is_hopeless and not (at_fault and self._is_watched):
            raise ModelError(failed.reason)
        if is_death and is_hopeless:
            at_fault, self._num_deaths = at_fault or new, 0
        self._plan.block(sorted(at_fault), failed.reason)
        for model in {model for model, _ in at_fault}:
            self._scrapes.versions.record_failure(model)
        if at_fault:
            self._look_at = self._clock()
        else:
            seconds = self._pause(generation.started_at)
            _log.error(
                "the processes can't be started anew, another try comes in %g s: %s%s",
                seconds,
                _whose(failed),
                failed.reason,
            )
            self._look_at = self._clock() + seconds

    def _pause(self, begun_at: float) -> float:
        """Seconds before the next try, behind one that began then: what it took was no time of peace."""
        before, self._failed_at = self._failed_at, self._clock()
        return self._backoff.after(begun_at - before)

    def _end_start(self, generation: _Generation) -> None:
        # Clients have come to those that serve already: these let them go first.
        self._tell_all(generation, Stop() if self._serving is None else Retire())
        self._starting = None

    # What happens

    def _step(self, until: float, stop: StopSignal | None = None) -> None:
        self._tell_policies()
        self._tell_versions_elsewhere()
        watched: list[Any] = [self._listening, self._scrapes.file, *self._links]
        if stop is not None:
            watched.append(stop)
        timeout = None if until == float("inf") else max(0.0, until - self._clock())
        for ready in wait(watched, timeout):
            if ready is self._listening:
                self._accept()
            elif isinstance(ready, Connection) and ready in self._links:
                self._hear(ready)
        self._scrapes.see_to(self._workers())
        self._reap()
        if self._clock() >= self._beat_at:
            self._beat()

    def _tell_policies(self) -> None:
        for generation in self._generations.values():
            for worker in generation.workers.values():
                if worker.is_listening:
                    self._tell_policies_to(worker, generation)

    def _tell_policies_to(self, worker: Worker, generation: _Generation) -> None:
        if worker.link is not None and worker.told_policies != generation.policies:
            worker.told_policies = generation.policies
            self._tell(worker.link, Policies(generation.policies))

    def _tell_versions_elsewhere(self) -> None:
        """A worker loads what its holder has, and would know of no other version."""
        failed, others = self._plan.statuses(), self._plan.statuses(with_idle=True)
        awaited = [s for s in others if s in failed or s.state is VersionState.LOADING]
        idle = tuple(status for status in others if status not in awaited)
        served = set() if self._serving is None else {*self._serving.versions}
        if self._starting is not None and self._serving is not None:
            new = {*self._starting.versions} - served
            awaited += [VersionStatus(*version, VersionState.LOADING) for version in sorted(new)]
            later = {*self._last_wanted} - served - new
            awaited += [VersionStatus(*v, VersionState.LOADING, "waits to be loaded") for v in sorted(later)]
        unserved = (self._required & self._plan.models_on_disk) - {model for model, _ in served}
        for generation in self._generations.values():
            # Those that others replace have clients for a while yet, whose versions may be the others'.
            newer = sorted(served - {*generation.versions}) if generation.is_complete else []
            why = "newer processes serve it: connect again"
            there = [VersionStatus(*version, VersionState.LOADING, why) for version in newer]
            elsewhere = VersionsElsewhere((*awaited, *there), idle, tuple(sorted(unserved)))
            for worker in generation.workers.values():
                if worker.is_listening and worker.told_elsewhere != elsewhere:
                    worker.told_elsewhere = elsewhere
                    self._tell(worker.link, elsewhere)

    def _beat(self) -> None:
        """Looks after workers that hang, and after the socket: folders for temporary files are cleaned up."""
        self._beat_at = self._clock() + _BEAT_SECONDS
        if not self._path.exists():
            self._listening.close()
            self._listening = listening_at(self._path)
        if (starting := self._starting) is not None and self._clock() >= starting.slow_at:
            starting.slow_at = self._clock() + _SLOW_SECONDS
            _log.warning(
                "processes for versions %s have been starting for %.0f s; %d of %d are ready, and what "
                "else is new comes after them",
                starting.versions,
                self._clock() - starting.started_at,
                sum(worker.is_ready for worker in starting.workers.values()),
                self._num_workers,
            )
        for worker in self._workers():
            worker.ask(self._clock())
            if worker.silent_seconds(self._clock()) >= _HUNG_SECONDS:
                _log.error("process %d (pid %d) doesn't answer and is killed", worker.index, worker.pid)
                kill(worker.pid)

    def _next_time(self) -> float:
        """When something is to be done though nothing happens."""
        look_at = float("inf") if self._starting is not None else self._look_at
        return min(look_at, self._policies_at, self._scrapes.ends_at, self._beat_at)

    def _accept(self) -> None:
        accepted, _ = self._listening.accept()
        timeout = struct.pack("ll", int(_MESSAGE_SECONDS), round(_MESSAGE_SECONDS % 1 * 1e6))
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        link = Connection(accepted.detach())
        try:
            hello: Hello = receive(link)
        except (EOFError, OSError):
            link.close()
            return
        generation = self._generations.get(hello.generation)
        if generation is None:
            link.close()
        elif hello.index is None:
            generation.holder, generation.holder_pid, generation.has_had_holder = link, hello.pid, True
            self._links[link] = lambda message: self._hear_holder(generation, message)
        else:
            worker = generation.workers.setdefault(hello.pid, Worker(hello.index, hello.pid))
            worker.link = link
            self._tell_policies_to(worker, generation)
            self._links[link] = lambda message: self._hear_worker(generation, worker, message)
        if generation is not None and generation.is_ending:
            self._tell_all(generation, Stop())

    def _hear(self, link: Connection) -> None:
        hear = self._links[link]
        try:
            message = receive(link)
        except (EOFError, OSError):
            del self._links[link]
            link.close()
            message = None
        hear(message)

    def _hear_holder(self, generation: _Generation, message: object) -> None:
        if isinstance(message, WorkerStarted):
            generation.workers.setdefault(message.pid, Worker(message.index, message.pid))
        elif isinstance(message, WorkerEnded):
            self._see_worker_end(generation, message)
        elif isinstance(message, Failed):
            self._see_failure(generation, message, is_death=message.is_death)
        elif isinstance(message, Complete):
            self._see_complete(generation)
        elif isinstance(message, SuccessorEnded):
            why = f"the process that was to hold the tables ended while it started: {message.why}"
            self._see_mute_end(message.generation, why)
        elif message is None:
            self._see_holder_end(generation)

    def _hear_worker(self, generation: _Generation, worker: Worker, message: object) -> None:
        if isinstance(message, Ready):
            worker.is_ready = True
            _log.info("process %d (pid %d) serves", worker.index, worker.pid)
        elif isinstance(message, Failed):
            if generation.is_complete and not generation.is_ending:  # it was started again
                _log.error(
                    "process %d (pid %d) can't start: %s%s",
                    worker.index,
                    worker.pid,
                    _whose(message),
                    message.reason,
                )
            self._see_failure(generation, message)
        elif isinstance(message, (MetricsText, LastMetrics)):
            worker.text = message.text
            worker.is_ready &= isinstance(message, MetricsText)
            self._scrapes.see_answer(worker)
        elif message is None:
            worker.link, worker.is_ready = None, False
            self._scrapes.see_answer(worker)
            self._scrapes.merged.keep(worker.index, worker.text)
            worker.text = b""
            self._forget(generation)

    def _see_worker_end(self, generation: _Generation, ended: WorkerEnded) -> None:
        while wait([self._listening], 0):
            self._accept()
        worker = generation.workers.get(ended.pid)
        # Its last words, such as why it can't start, may still be on their way from it: all are there by now.
        while worker is not None and worker.link in self._links:
            self._hear(worker.link)
        if worker is not None and worker.link is None:
            del generation.workers[ended.pid]
        if ended.is_restarted:
            self._scrapes.restarts[ended.index] += 1
        self._see_failure(
            generation,
            Failed(reason=f"process {ended.index} ended while it started: {ended.why}", version=None),
            is_death=True,
        )

    def _see_mute_end(self, number: int, why: str) -> None:
        """A holder that ended before it said a word has no link to tell of its end."""
        while wait([self._listening], 0):  # it may have said one that nobody has read
            self._accept()
        generation = self._generations.get(number)
        if generation is not None and not generation.has_had_holder:
            self._see_failure(generation, Failed(reason=why, version=None), is_death=True)
            del self._generations[number]

    def _see_holder_end(self, generation: _Generation) -> None:
        generation.holder = None
        if not generation.is_complete:
            reason = "the process that holds the tables ended while it started"
            self._see_failure(generation, Failed(reason=reason, version=None), is_death=True)
        elif generation is self._serving and not generation.is_ending:
            if self._starting is not None and not self._starting.has_had_holder:
                reason = "the process that was to start it has ended"
                self._see_failure(self._starting, Failed(reason=reason, version=None), is_death=True)
            _log.error(
                "the process that holds the tables has ended; its workers go on, and others are started with "
                "tables read anew: what was updated since they were loaded is lost then"
            )
            self._look_at = min(self._look_at, self._clock() + self._pause(self._clock()))
        self._forget(generation)

    def _forget(self, generation: _Generation) -> None:
        if generation.holder is not None or any(worker.link for worker in generation.workers.values()):
            return
        if generation.has_had_holder and (generation.is_ending or generation.failure is not None):
            self._generations.pop(generation.number, None)

    def _tell_all(self, generation: _Generation, message: object) -> None:
        generation.is_ending = True
        if generation.holder is not None and not generation.workers:
            kill(generation.holder_pid)  # it reads tables, perhaps for long, for nobody
        for link in (generation.holder, *(worker.link for worker in generation.workers.values())):
            self._tell(link, message)

    @staticmethod
    def _tell(link: Connection | None, message: object) -> None:
        if link is not None:
            with contextlib.suppress(OSError):  # it has ended; its link says so next
                link.send(message)

    def _reap(self) -> None:
        """Takes note of children that have ended, and of orphans if this is a container's first process."""
        self._has_children = True
        try:
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if pid in self._pids:
                    why = "the process that holds the tables ended while it started"
                    self._see_mute_end(self._pids.pop(pid), why)
        except ChildProcessError:
            self._has_children = False

    def _workers(self) -> Iterator[Worker]:
        """By generation."""
        for _, generation in sorted(self._generations.items()):
            yield from generation.workers.values()

    def _is_up(self, index: int) -> bool:
        serving = self._serving
        if serving is None:
            return False
        mine = [worker for worker in serving.workers.values() if worker.index == index]
        return any(w.is_ready and w.silent_seconds(self._clock()) < _BEAT_SECONDS for w in mine)

    # The end

    def _end(self) -> None:
        """All processes drain, and what doesn't is killed."""
        for generation in self._generations.values():
            self._tell_all(generation, Stop())
        self._starting = None
        deadline = self._clock() + self._grace_seconds + _KILL_SECONDS
        while (self._links or self._has_children) and self._clock() < deadline:
            self._step(min(deadline, self._clock() + 0.5))
        for worker in self._workers():
            if worker.link is not None:
                _log.error("process %d (pid %d) didn't end in time and is killed", worker.index, worker.pid)
                kill(worker.pid)
        for generation in self._generations.values():
            if generation.holder is not None:
                _log.error("the process that holds the tables (pid %d) is killed", generation.holder_pid)
                kill(generation.holder_pid)


def _whose(failed: Failed) -> str:
    """The version that was being loaded, as the beginning of a line of the log."""
    return "{}/{}: ".format(*failed.version) if failed.version else ""
