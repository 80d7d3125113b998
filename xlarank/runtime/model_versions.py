"""Versions of one model as they come, serve and go: `ModelVersions`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from xlarank.errors import ConfigError, ModelError, ModelNotFoundError, UnavailableError, XlarankError
from xlarank.runtime.compile_helper import CompileDiedError
from xlarank.runtime.engine import Engine
from xlarank.runtime.policy_words import policy_warnings, removed_warning, why_held_back, why_not_served
from xlarank.runtime.process_ends import MOST_DEATHS
from xlarank.runtime.routes import Routes, ServedVersion
from xlarank.runtime.version_metrics import VersionMetrics
from xlarank.runtime.watching import Told, folder_stamp
from xlarank.spec.versions import ModelPolicy, Policy, VersionState, VersionStatus

__all__ = ["ModelVersions"]

_log = logging.getLogger(__name__)

_EVERYTHING = ModelPolicy(policy=Policy.ALL)

_PASSING = (CompileDiedError, MemoryError, OSError)
"""What ends a load perhaps for no fault of the version: it is tried again, `MOST_DEATHS` times in all."""

_RETRY_SECONDS = 10.0
"""Until the second try; twice as long until the third."""


@dataclasses.dataclass(frozen=True)
class _Blocked:
    """A version that isn't tried again before its folder changes, or its time has come."""

    stamp: str | None
    reason: str
    retry_at: float = math.inf


class ModelVersions:
    """Loads what the policy wants, swaps to it, and drains what it no longer wants.

    `follow`, `set_policy`, `load`, `unload` and `roll_back` are for one thread at a time; any thread may call
    the others.

    A version ends only when another of the model can answer: what fails leaves the model as it was. A version
    whose folder vanishes goes on serving until another takes its place: a folder that isn't there may be a
    file system that isn't, and whoever wants a version gone says so (`unload`, `roll_back`). Under policy
    `all` it ends, if other versions are still there.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        policy: ModelPolicy,
        load: Callable[[int, Sequence[Engine]], Engine],
        *,
        metrics: VersionMetrics,
        on_end: Callable[[int], None],
        drain_seconds: float = 60.0,
        is_held: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          model: its name.
          folder: of its versions.
          policy: which of them to serve.
          load: loads a version beside the given ones of this model.
          metrics: where loads, failures and swaps are counted.
          on_end: called with a version once nothing of it is in use.
          drain_seconds: how long a load waits for what is draining, whose memory it may need.
          is_held: whether another process has chosen the versions: all of them are served then, and the
            policy only says who gets which.
          clock: seconds, monotonic.
        """
        self.model = model
        self._folder = folder
        self._load = load
        self._metrics = metrics
        self._on_end = on_end
        self._drain_seconds = drain_seconds
        self._is_held = is_held
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock; all but _policy and _draining are written by the one thread that changes versions.
        self._policy = policy
        self._on_disk: tuple[int, ...] = ()
        self._loaded: dict[int, ServedVersion] = {}
        self._stamps: dict[int, str | None] = {}  # of the loaded ones
        self._failed: dict[int, _Blocked] = {}
        self._rolled_back: dict[int, _Blocked] = {}
        self._num_deaths: dict[int, int] = {}  # loads in a row that may have failed for no fault of a version
        self._draining: dict[int, threading.Thread] = {}
        self._loading: int | None = None
        self._is_unloaded = False  # by hand
        self._told_of_folder, self._told_of_policy = Told(_log), Told(_log)
        # Replaced whole, under _lock; read without it.
        self.routes = Routes(model, policy, {}, self._others)

    @property
    def is_ready(self) -> bool:
        """Whether a version answers."""
        return any(served.engine.fault is None for served in self.routes.versions.values())

    @property
    def is_unloaded(self) -> bool:
        """Whether it was unloaded by hand."""
        return self._is_unloaded

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it, on disk or here."""
        with self._lock:
            return not (self._on_disk or self._loaded or self._draining)

    def statuses(self, *, with_idle: bool = True) -> list[VersionStatus]:
        """What every version does, ascending.

        Args:
          with_idle: with those on disk that nobody asked for.
        """
        with self._lock:
            known = set(self._loaded) | set(self._draining) | set(self._failed) | set(self._rolled_back)
            known |= {self._loading} if self._loading is not None else set()
            awaited = set() if self._is_unloaded else set(self._wanted()) & set(self._on_disk)
            known |= awaited | self._held_back()
            if with_idle:
                known |= set(self._on_disk) | self._policy.named
            return [self._status(version, version in awaited) for version in sorted(known)]

    def follow(self, on_disk: Sequence[int], *, strict: bool = False) -> None:
        """Loads, swaps and drains by what there is now.

        Args:
          on_disk: versions in the folder, ascending.
          strict: raise what a version fails with, instead of going on without it.
        """
        self._look(on_disk)
        if self._is_unloaded:
            return
        while (version := self._next_missing()) is not None:
            self._load_one(version, strict)
        self._swap(None)
        if not self._is_held:  # the process that has chosen them tells of it
            routes = self.routes
            self._told_of_policy.tell(
                policy_warnings(self.model, self._policy, routes.policy, routes.versions)
            )

    def set_policy(self, policy: ModelPolicy) -> None:
        """From the next `follow` on, another policy says what is served."""
        with self._lock:
            self._policy = policy

    def move_labels(self, policy: ModelPolicy) -> None:
        """Puts another policy in force now if it has to wait for no version, see `ModelPolicy.moves_at_once`;
        else leaves it to `set_policy`. What it wants is loaded, and what it doesn't ends, at the next
        `follow`."""
        with self._lock:
            if self._is_held or policy.moves_at_once(self.routes.policy, self.routes.versions):
                self._policy = policy
                self.routes = dataclasses.replace(self.routes, policy=policy)

    def load(self, on_disk: Sequence[int]) -> None:
        """Loads what the policy wants, whatever was unloaded, has failed or was rolled back from before.

        Raises:
          ModelError: if a wanted version fails; says why. Those that served go on.
          ModelNotFoundError: if there is none. What was unloaded stays so.
          UnavailableError: if it is given up for what was asked later. It forgets nothing then.
        """
        with self._lock:
            before = self._failed, self._rolled_back, self._is_unloaded
            self._num_deaths.clear()
            self._failed, self._rolled_back, self._is_unloaded = {}, {}, False
        try:
            self.follow(on_disk)
            if not self._loaded and not self._failed:
                raise self._none_available()
        except (ModelNotFoundError, UnavailableError):
            with self._lock:
                self._failed, self._rolled_back, was_unloaded = before
                self._is_unloaded = was_unloaded and not self._loaded
            raise
        if self._failed:
            why = "; ".join(f"version {v}: {blocked.reason}" for v, blocked in sorted(self._failed.items()))
            raise ModelError(f"failed to load '{self.model}': {why}")
        if not self.is_ready:
            raise self._none_available()

    def unload(self) -> list[threading.Thread]:
        """Ends every version; the model stays so until `load`, or a rollback that was waiting for its turn.

        Returns:
          What drains them.
        """
        with self._lock:
            self._is_unloaded = True
            self.routes = dataclasses.replace(self.routes, versions={})
        return self._retire(list(self._loaded))

    def roll_back(
        self, on_disk: Sequence[int], version: int | None = None, *, below: int | None = None
    ) -> int:
        """Serves an older version; newer ones that are there now are left alone until their folder changes.

        This holds for as long as the process runs: to make it last, remove the newer folders or set the
        policy. A model that was unloaded while this waited for its turn serves again: this was asked last.

        Args:
          on_disk: versions in the folder, ascending.
          version: to go back to; the next older one than `below` by default.
          below: the version to leave; the newest that answers by default.

        Returns:
          The version.

        Raises:
          ConfigError: under policy specific, which says itself what is served.
          ModelNotFoundError: if there is no such older version.
          ModelError: if it fails; says why. Nothing has changed then.
          UnavailableError: if its load is given up for what was asked later. Nothing has changed then.
        """
        if self._followed({*on_disk, *self._loaded}).policy is Policy.SPECIFIC:
            raise ConfigError(
                f"model {self.model!r}: rollback is for policies latest and all; policy specific names its "
                f"versions: name another one"
            )
        self._look(on_disk)
        newest = max(self.routes.versions, default=None) if below is None else below
        if newest is None:
            raise self._none_available()
        there = set(on_disk) | set(self._loaded)
        older = [
            v for v in there if v < newest and (v == version or (version is None and v not in self._failed))
        ]
        if not older:
            what = "an older version" if version is None else f"version {version} below {newest}"
            raise ModelNotFoundError(
                f"model {self.model!r}: rollback: expected {what}, there are {sorted(there)}"
            )
        target = max(older)
        self.wait_until_drained(self._drain_seconds)
        with self._lock:
            is_draining = target in self._draining
        if is_draining:
            raise ModelError(
                f"model {self.model!r}: rollback to version {target} failed: it still finishes what it "
                f"accepted"
            )
        before = self._failed, self._rolled_back
        reason = f"rolled back from, to version {target}"
        marks = {v: _Blocked(folder_stamp(self._folder / str(v)), reason) for v in there if v > target}
        with self._lock:
            self._failed = {v: blocked for v, blocked in self._failed.items() if v != target}
            self._rolled_back = {v: b for v, b in self._rolled_back.items() if v != target} | marks
        try:
            if target not in self._loaded and not self._load_one(target, strict=False, is_asked_once=True):
                why = self._failed[target].reason
                raise ModelError(f"model {self.model!r}: rollback to version {target} failed: {why}")
        except XlarankError:
            with self._lock:
                self._failed, self._rolled_back = before
            raise
        with self._lock:
            self._is_unloaded = False
        self._swap(None)
        # It is done; what else is wanted and was interrupted comes at the next look.
        with contextlib.suppress(UnavailableError):
            self.follow(on_disk)
        return target

    def wait_until_drained(self, timeout: float | None = None) -> bool:
        """Waits for versions that are ending; whether all of them have."""
        end = None if timeout is None else self._clock() + timeout
        with self._lock:
            threads = list(self._draining.values())
        for thread in threads:
            thread.join(None if end is None else max(0.0, end - self._clock()))
        return not any(thread.is_alive() for thread in threads)

    def _look(self, on_disk: Sequence[int]) -> None:
        """Takes note of the folder; what has changed there since it failed may be tried again."""
        stamps = {
            version: folder_stamp(self._folder / str(version))
            for version in {*self._loaded, *self._failed, *self._rolled_back}
        }
        with self._lock:
            self._on_disk = tuple(on_disk)
            for version, served in self._loaded.items():
                if served.engine.damage is not None and version not in self._failed:
                    self._failed[version] = _Blocked(stamps[version], served.engine.damage)
            for blocked in (self._failed, self._rolled_back):
                changed = {v for v, b in blocked.items() if stamps.get(v) != b.stamp} - {*self._loaded}
                for version in changed:
                    del blocked[version]
                    self._num_deaths.pop(version, None)
                for version in [v for v, b in blocked.items() if self._clock() >= b.retry_at]:
                    del blocked[version]
        self._told_of_folder.tell(self._folder_warnings(stamps))

    def _folder_warnings(self, stamps: Mapping[int, str | None]) -> Iterator[str]:
        for version in self._loaded:
            where = self._folder / str(version)
            if version in self._on_disk and stamps[version] != self._stamps[version]:
                yield (
                    f"{where}: was changed; what was loaded goes on serving: publish changes as a new version"
                )
            # Under policy all it ends, and the log says that.
            if version not in self._on_disk and not (self._policy.policy is Policy.ALL and self._on_disk):
                yield removed_warning(where, self.model, version, "another version takes its place")

    def _wanted(self) -> list[int]:
        """What is to be loaded and serve, newest first."""
        there = {*self._on_disk, *self._loaded}
        return self._wanted_by(_EVERYTHING if self._is_held else self._followed(there), self._on_disk)

    def _wanted_by(self, policy: ModelPolicy, on_disk: Collection[int]) -> list[int]:
        blocked = self._blocked()
        if policy is not self._policy and not self._is_held:
            blocked |= self._policy.held_back(policy, self.routes.versions)
        return policy.wanted(on_disk, self._loaded, blocked)

    def _blocked(self) -> set[int]:
        return {*self._failed, *self._rolled_back}

    def _followed(self, there: Collection[int]) -> ModelPolicy:
        """The policy that is in force while no other versions are there: the one before may be."""
        if self._is_held:
            return self._policy
        routes = self.routes
        return self._policy.or_before(
            routes.policy, there, self._on_disk, self._loaded, self._blocked(), routes.versions
        )

    def _in_force(self) -> ModelPolicy:
        """The policy that says who gets what of the versions that are loaded."""
        followed = self._followed({*self._on_disk, *self._loaded})
        return followed if followed is not self._policy else self._followed(self._loaded)

    def _held_back(self) -> set[int]:
        """Versions that the policy wants and that wait for those that its labels lead to."""
        if self._is_unloaded or self._in_force() is self._policy:
            return set()
        return {*self._wanted_by(self._policy, self._on_disk)} - {*self.routes.versions}

    def _next_missing(self) -> int | None:
        missing = [version for version in self._wanted() if version not in self._loaded]
        is_drained = not missing or self.wait_until_drained(self._drain_seconds)
        with self._lock:  # one that is draining comes back at a later look
            version = next((version for version in missing if version not in self._draining), None)
        if version is not None and not is_drained:
            _log.error(
                "model %s: a version still isn't drained; version %d is loaded beside it", self.model, version
            )
        return version

    def _load_one(self, version: int, strict: bool, *, is_asked_once: bool = False) -> bool:
        start = self._clock()
        stamp = folder_stamp(self._folder / str(version))
        with self._lock:
            self._loading = version
        try:
            engine = self._load(version, [served.engine for served in self._loaded.values()])
            if not self._is_held and folder_stamp(self._folder / str(version)) is None:
                engine.close()
                self._on_end(version)
                raise ModelError(f"{self._folder / str(version)}: was removed while it was loaded")
        except UnavailableError:  # the repository is closing, or something else goes first: no failure
            raise
        except Exception as error:
            if strict:
                raise
            reason = str(error) if isinstance(error, XlarankError) else f"{type(error).__name__}: {error}"
            retry_at = math.inf
            if isinstance(error, _PASSING) and not is_asked_once:
                num_deaths = self._num_deaths[version] = self._num_deaths.get(version, 0) + 1
                if num_deaths < MOST_DEATHS:
                    retry_at = self._clock() + num_deaths * _RETRY_SECONDS
                    reason += f"; a look after {num_deaths * _RETRY_SECONDS:g} s tries it again"
            with self._lock:  # one step: who reads the log may ask for the reason at once
                self._failed[version] = _Blocked(stamp, reason, retry_at)
                self._loading = None
            self._metrics.record_failure(self.model)
            is_ours = not isinstance(error, XlarankError)  # a defect: where it is matters
            _log.error("model %s version %d isn't served: %s", self.model, version, reason, exc_info=is_ours)
            return False
        finally:
            with self._lock:
                self._loading = None
        with self._lock:
            self._num_deaths.pop(version, None)
            self._loaded[version] = ServedVersion(engine)
            self._stamps[version] = stamp
        self._metrics.record_load(self.model, version, self._clock() - start)
        self._swap(start)
        return True

    def _swap(self, found_at: float | None) -> None:
        """Lets the wanted versions answer, and ends the others if any of those can.

        Args:
          found_at: when the version that was loaded just now was found, for the metrics.
        """
        with self._lock:  # one step: a policy that comes meanwhile finds what answers
            before = self.routes.versions
            wanted = picked = self._wanted()
            policy = self._in_force()
            if policy is not self._policy:
                picked = self._wanted_by(policy, [v for v in self._on_disk if v in self._loaded])
            served = {v: self._loaded[v] for v in picked if v in self._loaded}
            served = served or before  # what was loaded and is no longer wanted doesn't answer
            if not any(s.engine.damage is None for s in served.values()):
                served = dict(self._loaded)
            # The swap: one reference, read once by each request.
            self.routes = dataclasses.replace(self.routes, policy=policy, versions=served)
        if served.keys() != before.keys():
            _log.info("model %s: versions %s answer, before %s", self.model, sorted(served), sorted(before))
        ended = [version for version in self._loaded if version not in served and version not in wanted]
        self._retire(ended)
        if found_at is not None and ended and served.keys() - before.keys():
            self._metrics.record_swap(self.model, self._clock() - found_at)

    def _retire(self, versions: Collection[int]) -> list[threading.Thread]:
        """Drains versions that no route leads to any more."""
        threads: list[threading.Thread] = []
        for version in versions:
            name = f"xlarank-drain-{self.model}-{version}"
            with self._lock:
                served = self._loaded.pop(version)
                del self._stamps[version]
                thread = threading.Thread(target=self._drain, args=(version, served), name=name, daemon=True)
                self._draining[version] = thread
            del served
            thread.start()
            threads.append(thread)
        return threads

    def _drain(self, version: int, served: ServedVersion) -> None:
        try:
            served.drain()
        except Exception:
            _log.exception("model %s version %d: draining failed", self.model, version)
        finally:
            del served
            self._on_end(version)
            with self._lock:
                del self._draining[version]
            _log.info("model %s version %d has ended", self.model, version)

    def _none_available(self) -> ModelNotFoundError:
        return ModelNotFoundError(f"Request for unknown model: '{self.model}' has no available versions")

    def _others(self) -> dict[int, str]:
        """Versions that don't answer though somebody could expect it, and why."""
        if self._is_unloaded:
            return {}
        statuses = self.statuses(with_idle=False)
        return {s.version: s.reason for s in statuses if s.state is not VersionState.READY}

    def _status(self, version: int, is_awaited: bool) -> VersionStatus:
        """Under _lock."""
        reason = ""
        if version in self._loaded:
            fault = self._loaded[version].engine.fault
            state = VersionState.READY if fault is None else VersionState.UNAVAILABLE
            reason = fault or ""
            if not fault and version not in self.routes.versions:
                state = VersionState.LOADING
                reason = why_held_back(self._policy) if version in self._held_back() else ""
        elif version in self._draining:
            state = VersionState.UNLOADING
        elif version == self._loading:
            state = VersionState.LOADING
        elif is_awaited:  # no failure: whoever waits for it goes on waiting
            state, reason = VersionState.LOADING, "waits to be loaded"
        elif version in self._held_back():
            state, reason = VersionState.LOADING, why_held_back(self._policy)
        else:
            state, reason = VersionState.UNAVAILABLE, self._why_not(version)
        return VersionStatus(self.model, version, state, reason)

    def _why_not(self, version: int) -> str:
        if self._is_unloaded:
            return "unloaded by hand"
        blocked = self._failed.get(version) or self._rolled_back.get(version)
        if blocked is not None:
            return blocked.reason
        return why_not_served(self._folder / str(version), version in self._on_disk, self._policy)
