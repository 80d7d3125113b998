"""The models of a repository, loaded and answering: `ModelRepository`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TypeVar

from xlarank import device
from xlarank.bundle import list_versions
from xlarank.errors import (
    BundleError,
    ConfigError,
    ModelNotFoundError,
    OverloadError,
    UnavailableError,
)
from xlarank.host import FeatureOptions, TableMemory, native_available
from xlarank.runtime.captures import Captures
from xlarank.runtime.changes import Changes
from xlarank.runtime.compile_helper import InterruptedLoadError
from xlarank.runtime.device_health import DeviceState
from xlarank.runtime.engine import Engine
from xlarank.runtime.features import stores_by_model
from xlarank.runtime.loading import host_threads_of
from xlarank.runtime.metrics import Metrics
from xlarank.runtime.model_versions import ModelVersions
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.pool_metrics import PoolMetrics
from xlarank.runtime.routes import ServedVersion, not_ready
from xlarank.runtime.tables import HeldTables, TableBytes
from xlarank.runtime.version_loading import LoadOptions, VersionLoader
from xlarank.runtime.version_metrics import VersionMetrics
from xlarank.runtime.watching import Listing, Stop, Watcher
from xlarank.spec import PlatformOptions
from xlarank.spec.serving import FaultConfig, QueueConfig
from xlarank.spec.versions import ModelPolicy, VersionOptions, VersionState, VersionStatus

__all__ = ["ModelRepository"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_LAST_CHANGE_SECONDS = 5.0
"""How long `close` waits for a version that is being loaded: its files may never come."""

# Positions of requests without a key: multiples of the golden ratio fill [0, 1) most evenly, so that even a
# few requests keep a label's share.
_GOLDEN = 0.6180339887498949


class ModelRepository:
    """The models in a folder, each in the versions that its policy says, on shared devices.

    Any thread may call it. Versions are loaded and swapped one at a time, in one thread. A rollback and an
    unload don't wait for compiling: that load, and those that wait for their turn, begin anew behind them.
    """

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        num_devices: int | None = None,
        platforms: Sequence[PlatformOptions] = (),
        host_threads: int | None = None,
        compile_cache: Path | None = None,
        use_bundle_code: bool = True,
        table_memory: TableMemory | str | None = None,
        allow_reference_gather: bool = False,
        metrics: Metrics | None = None,
        features: Sequence[FeatureOptions] = (),
        versions: VersionOptions | None = None,
        queue: QueueConfig | None = None,
        captures: Captures | None = None,
        faults: FaultConfig | None = None,
        on_progress: Callable[[str], None] | None = None,
        on_table_bytes: TableBytes | None = None,
        held: HeldTables | None = None,
        stop: Stop | None = None,
    ) -> ModelRepository:
        """Loads every model; when this returns all of them are ready.

        A repository that is watched may be empty, and a version that fails doesn't stop it: it is not ready
        until every model has a version that answers, and what is wrong is in `index`.

        Args:
          path: ``<path>/<model>/<version>`` are the bundles.
          num_devices, host_threads, compile_cache, use_bundle_code, table_memory, metrics, queue, captures,
            on_progress, on_table_bytes: see `Engine.load`.
          platforms: instead of `num_devices`, where devices are taken from and what they cost; a request goes
            to the cheapest one that meets its deadline, by the times measured on each kind of device.
          allow_reference_gather: serve without the native kernel, slowly.
          features: feature files to open, each for the model that it was built for.
          versions: which versions, and whether to look for new ones; the latest, and no, by default.
          faults: when a device is given up; `FaultConfig()` by default.
          held: tables of the versions to serve, which another process has chosen and loaded: those, whatever
            the folder has, and for good; `versions` then says who gets which.
          stop: the watcher's clock; see `Watcher`.

        Raises:
          ConfigError: if the folder holds no bundle, the native kernel isn't built, memory doesn't suffice,
            or a feature file is of no model here or of other features than the model's.
          BundleError: if a bundle or a feature file is damaged.
          VerifyError: if a bundle's golden requests get other scores here.
        """
        if not native_available() and not allow_reference_gather:
            raise ConfigError(
                "the native gather kernel isn't built and the NumPy one is far slower: build it with "
                "`pip install .`, or serve all the same with --allow-reference-gather"
            )
        versions = versions or VersionOptions()
        is_watched = versions.watch_seconds is not None
        options = LoadOptions(
            host_threads=host_threads_of(host_threads),
            use_bundle_code=use_bundle_code,
            table_memory=None if table_memory is None else TableMemory.named(table_memory),
            queue=queue or QueueConfig.unbounded(),
            captures=captures or Captures(),
            on_progress=on_progress,
            on_table_bytes=on_table_bytes,
            held=held,
        )
        root = Path(path)
        found = _models_in(root, may_be_empty=is_watched)
        if held is None:
            versions.check_models(root, found)
        else:
            versions = dataclasses.replace(versions, watch_seconds=None)
            by_model = itertools.groupby(sorted(held.tables), key=lambda version: version[0])
            found = {model: [version for _, version in own] for model, own in by_model}
        # Of models that are removed processes that come later know nothing; who started the first has looked.
        stores = stores_by_model(features, None if is_watched or held is not None else found)
        device.configure(num_devices=num_devices, platforms=platforms, compile_cache=compile_cache)
        metrics = metrics or Metrics()
        devices = device.devices(num_devices, platforms)
        costs = [own.cost for own in platforms for _ in device.devices(platforms=[own])] or None
        pool = DevicePool(len(devices), costs=costs, faults=faults)
        stopping = threading.Event()
        loader = VersionLoader(
            pool,
            metrics,
            options,
            stores,
            devices=devices,
            warm_share=versions.warm_share,
            wait=stopping.wait,
        )
        repository = cls(root, pool, metrics, versions, loader, stopping, is_held=held is not None)
        try:
            repository._follow(found, strict=held is not None or not is_watched)
            repository._serve(stop)
        except BaseException:
            repository.close()
            raise
        return repository

    def __init__(
        self,
        root: Path,
        pool: DevicePool,
        metrics: Metrics,
        versions: VersionOptions,
        loader: VersionLoader,
        stopping: threading.Event,
        *,
        is_held: bool,
    ) -> None:
        """Use `open`."""
        self._root = root
        self._pool = pool
        self._metrics = metrics
        self._policy_lock = threading.Lock()  # held by who puts policies in force
        self._versions = versions  # guarded by _policy_lock
        self._is_held = is_held
        self._loader = loader
        # By name; replaced whole by the thread that changes versions, read by any.
        self._models: dict[str, ModelVersions] = {}
        self._required: set[str] = set()  # models that have answered, or were there at the start
        self._changes = Changes("xlarank-versions")
        self._orders: dict[str, int] = {}  # by model, of the last rollback or unload; set by any thread
        self._order_counter = itertools.count(1)
        self._watcher: Watcher | None = None
        self._counter = itertools.count()
        self._stopping = stopping  # set once
        self._is_closed = False  # for `close` alone
        self._has_left_work = False  # moves one way
        self._is_serving = False  # moves one way
        # Replaced whole, by `show_elsewhere`.
        self._elsewhere: tuple[VersionStatus, ...] = ()
        self._awaited: dict[str, dict[str, str]] = {}
        self._unserved: tuple[str, ...] = ()
        self._listing = Listing(self._root)
        self._version_metrics = VersionMetrics(
            lambda: self.index(with_idle=False), lambda: loader.num_serving_compiles
        )
        self._pool_metrics = PoolMetrics(pool.snapshot)
        for collector in (self._version_metrics, self._pool_metrics):
            metrics.register(collector)

    @property
    def is_ready(self) -> bool:
        """Whether every model that was there at the start, or has answered since, has a version that answers.

        Models that were unloaded by hand don't count, and a version that is loading beside another or has
        failed changes nothing. False while there is no model.
        """
        required = [m for m in self._models.values() if m.model in self._required and not m.is_unloaded]
        is_served = bool(required) and all(m.is_ready for m in required) and not self._unserved
        return is_served and not self._stopping.is_set()

    @property
    def has_left_work(self) -> bool:
        """Whether `close` has left a thread behind that loads a version or runs a batch: the process's end
        would wait for it."""
        return self._has_left_work

    @property
    def num_devices(self) -> int:
        """Devices that the models share."""
        return self._pool.num_devices

    def models(self) -> list[tuple[str, int, bool]]:
        """Name, version and readiness of every version that requests may go to."""
        is_open = not self._stopping.is_set()
        return [
            (name, version, is_open and served.engine.fault is None)
            for name, model in sorted(self._models.items())
            for version, served in sorted(model.routes.versions.items())
        ]

    def index(self, *, with_idle: bool = True) -> list[VersionStatus]:
        """Every version on disk or in memory, as of the last look: by model, then by version.

        Args:
          with_idle: with those on disk that nobody asked for, and those of other processes, which count them
            themselves.
        """
        models = sorted(self._models.items())
        own = [status for _, model in models for status in model.statuses(with_idle=with_idle)]
        if not with_idle or not self._elsewhere:
            return own
        by_version = {(status.model, status.version): status for status in self._elsewhere}
        for status in own:
            if status.state is not VersionState.UNAVAILABLE:
                by_version[status.model, status.version] = status
            by_version.setdefault((status.model, status.version), status)
        return [status for _, status in sorted(by_version.items())]

    def show_elsewhere(
        self,
        awaited: Sequence[VersionStatus],
        idle: Sequence[VersionStatus] = (),
        unserved: Sequence[str] = (),
    ) -> None:
        """Has the index, requests and readiness know of versions that other processes of the server see to.

        Args:
          awaited: all that failed, are loaded or wait there, in the place of those told before.
          idle: all that nobody asks for, likewise.
          unserved: models that are to be served, and of which no version is.
        """
        self._elsewhere = (*awaited, *idle)
        reasons: dict[str, dict[str, str]] = {}
        for status in awaited:
            reasons.setdefault(status.model, {})[str(status.version)] = status.reason
        self._awaited, self._unserved = reasons, tuple(unserved)

    def overload(self, num_arriving: int) -> OverloadError | None:
        """See `DevicePool.overload`."""
        return self._pool.overload(num_arriving)

    def engine(self, name: str, version: str = "") -> Engine:
        """The engine of a version, to ask it about itself. To submit to it use `lease`, which keeps it open.

        Args:
          name: of the model.
          version: a number, a label, or "" for the newest that answers.

        Raises:
          ModelNotFoundError: if there is no such model or version.
          UnavailableError: if the version isn't ready, or has failed since it was loaded, or the repository
            is closing.
        """
        model = self._known(name)
        engine = self._pick(model, version, None).engine
        if engine.fault is not None:
            raise UnavailableError(f"model '{name}' version {engine.version} has failed: {engine.fault}")
        return engine

    @contextlib.contextmanager
    def lease(
        self, name: str, version: str = "", key: str | None = None, *, by_traffic: bool = True
    ) -> Iterator[Engine]:
        """The engine for a request or a change, which stays open meanwhile; raises as `engine`.

        Hold it until the request is submitted: what was accepted is answered, whatever becomes of the
        version.

        Args:
          name: of the model.
          version: a number, a label, or "".
          key: of the request: its affinity key if it has one, else its id if it has one; requests of one key
            go to the same version while shares of traffic stay. None or "" without.
          by_traffic: whether the traffic of the model's labels says which version "" is, as for a request;
            else, and without labels, it is the newest that answers.
        """
        model = self._known(name)
        position = self._position(model, key) if by_traffic else None
        while not (served := self._pick(model, version, position)).try_lease():
            pass  # another version has just taken its place
        try:
            yield served.engine
        finally:
            served.release()

    def poll(self) -> None:
        """Looks at the folder, loads what is new and swaps to it, as the watcher does; waits for all that."""
        self._change(self._look)

    def load(self, name: str) -> None:
        """Loads a model by its policy, whatever was unloaded, has failed or was rolled back before.

        Raises:
          ModelNotFoundError: if the folder has no such model.
          ModelError: if a version of it can't be served; says why.
          UnavailableError: if a rollback or an unload of it that was asked later came first.
        """
        order = self._orders.get(name, 0)

        def load() -> None:
            self._loader.check_turn(self._root / name, order)  # also where there is nothing to load
            found = self._found(name)
            if name not in found and name not in self._models:
                raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
            self._model(name).load(found.get(name, ()))
            self._required.add(name)

        self._change(load, lambda: self._orders.get(name, 0) != order)

    def unload(self, name: str) -> None:
        """Ends a model until `load`; when this returns what it had accepted is answered.

        Raises:
          ModelNotFoundError: if there is no such model.
        """
        model = self._known(name)
        for thread in self._change_first(name, model.unload):
            thread.join()

    def rollback(self, name: str, version: int | None = None) -> int:
        """Goes back to an older version than the one that answers now; see `ModelVersions.roll_back`."""
        model = self._known(name)
        below = max(model.routes.versions, default=None)
        return self._change_first(
            name, lambda: model.roll_back(self._found(name).get(name, ()), version, below=below)
        )

    def set_policy(self, policy: ModelPolicy) -> None:
        """Serves by another policy from now on: the way to pin a version, to go back, to move a label.

        When this returns the versions that it wants answer, as far as they can; `index` says why not. What no
        wanted version can replace goes on. Labels that lead to versions that answer already have moved
        before anything is waited for.

        Args:
          policy: of one model, or, without a name, of all that have none of their own.
        """
        with self._policy_lock:
            others = [other for other in self._versions.models if other.name != policy.name]
            self._put_policies((*others, policy))
        self.poll()

    def set_policies(self, models: Sequence[ModelPolicy]) -> None:
        """`set_policy` of all models at once, without waiting: what is to be loaded or ended is at the next
        look.

        Args:
          models: in the place of all policies before; a model that has none any more goes by the default.
        """
        with self._policy_lock:
            self._put_policies(models)

    def abandon(self, why: str) -> None:
        """Answers UNAVAILABLE what was accepted and isn't done, whatever devices are at. Then `close`."""
        self._pool.abandon(why)

    def close(self) -> None:
        """Finishes what was accepted, then stops everything. Idempotent.

        A version that is being loaded is waited for a few seconds, then left behind; see `has_left_work`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._stopping.set()
        self._loader.close()
        if not self._changes.close(_LAST_CHANGE_SECONDS):
            self._has_left_work = True
            begun = [s for s in self.index() if s.state is VersionState.LOADING and not s.reason]
            loading = [f"{s.model}/{s.version}" for s in begun]
            _log.error(
                "repository %s: left behind after %g s, still loading: %s",
                self._root,
                _LAST_CHANGE_SECONDS,
                ", ".join(loading) or "none, the folder is looked at",
            )
        if self._watcher is not None:
            self._watcher.stop()
        models = list(self._models.values())
        for model in models:
            for served in model.routes.versions.values():
                served.drain()
        for model in models:
            model.wait_until_drained()
        self._has_left_work |= not self._pool.close()
        for collector in (self._version_metrics, self._pool_metrics):
            self._metrics.unregister(collector)

    def _serve(self, stop: Stop | None) -> None:
        self._required |= set(self._models)
        self._is_serving = True
        if self._versions.watch_seconds is not None:
            self._watcher = Watcher(self._watch, self._versions.watch_seconds, stop)

    def _change(
        self, work: Callable[[], Result], is_overridden: Callable[[], bool] = lambda: False
    ) -> Result:
        """Does it in the one thread that changes versions, and waits; anew if it had to give way.

        Raises:
          InterruptedLoadError: if it had to give way to what overrides it.
          UnavailableError: if the repository is closing.
        """
        gave_way = ""  # not the error itself, whose frames keep what was loaded of a version

        def unless_overridden() -> Result:
            if gave_way and is_overridden():  # since this was asked again
                raise InterruptedLoadError(gave_way)
            return work()

        while True:
            try:
                return self._changes.do(unless_overridden)
            except InterruptedLoadError as error:
                if is_overridden():
                    raise
                gave_way = str(error)
            except CancelledError:
                raise UnavailableError(f"repository {self._root} is shutting down") from None

    def _change_first(self, name: str, work: Callable[[], Result]) -> Result:
        """`_change` of a model that other loads give way to."""
        order = self._orders[name] = next(self._order_counter)
        self._loader.give_way(order)

        def first() -> Result:
            with self._loader.turn(order):
                return work()

        try:
            return self._change(first, lambda: self._orders[name] != order)
        finally:
            self._loader.go_on(order)

    def _watch(self) -> None:
        with contextlib.suppress(UnavailableError):  # the repository is closing
            self.poll()

    def _look(self) -> None:
        if not any(status.state is DeviceState.HEALTHY for status in self._pool.statuses()):
            return  # nothing can be proven now: a version would be found to fail that does not
        found = self._listing.look()
        if found is None:
            return
        try:
            self._follow(found, strict=False)
        except InterruptedLoadError:
            raise
        except UnavailableError:  # the repository is closing
            return

    def _follow(self, found: dict[str, list[int]], *, strict: bool) -> None:
        for name in sorted({*found, *self._models}):
            if self._stopping.is_set():
                return
            model = self._model(name)
            model.follow(found.get(name, ()), strict=strict)
            if strict and not model.is_ready:
                raise ConfigError(
                    f"model {name!r}: no version is served under its policy: "
                    + "; ".join(f"version {s.version}: {s.reason}" for s in model.statuses())
                )
            if model.is_ready:
                self._required.add(name)
            elif model.is_gone:
                self._models = {other: m for other, m in self._models.items() if other != name}
                self._required.discard(name)

    def _put_policies(self, models: Sequence[ModelPolicy]) -> None:
        """Under _policy_lock."""
        self._versions = dataclasses.replace(self._versions, models=tuple(models))
        for name, model in self._models.items():
            model.move_labels(self._versions.policy_of(name))

    def _found(self, name: str) -> dict[str, list[int]]:
        """Versions by model; BundleError if those of this one can't be looked at."""
        unreadable: dict[str, BundleError] = {}
        found = list_versions(self._root, unreadable)
        if name in unreadable:
            raise unreadable[name]
        return found

    def _model(self, name: str) -> ModelVersions:
        """By the policy of now."""
        with self._policy_lock:
            policy = self._versions.policy_of(name)
            if name not in self._models:
                model = ModelVersions(
                    name,
                    self._root / name,
                    policy,
                    functools.partial(self._load_version, name),
                    metrics=self._version_metrics,
                    on_end=functools.partial(self._let_go, name),
                    drain_seconds=self._versions.drain_seconds,
                    is_held=self._is_held,
                )
                self._models = {**self._models, name: model}
            self._models[name].set_policy(policy)
            return self._models[name]

    def _load_version(self, name: str, version: int, peers: Sequence[Engine]) -> Engine:
        is_beside = self._is_serving and any(model.routes.versions for model in self._models.values())
        return self._loader.load(self._root / name / str(version), peers, is_beside=is_beside)

    def _known(self, name: str) -> ModelVersions:
        model = self._models.get(name)
        if model is None and (awaited := self._awaited.get(name)):
            raise not_ready(f"'{name}'", awaited)
        if model is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        return model

    def _position(self, model: ModelVersions, key: str | None) -> float:
        policy = model.routes.policy
        if not policy.labels:
            return 0.0  # for nothing
        return policy.position(key) if key else next(self._counter) * _GOLDEN % 1.0

    def _pick(self, model: ModelVersions, version: str, position: float | None) -> ServedVersion:
        if self._stopping.is_set():
            raise UnavailableError(f"model '{model.model}' is shutting down")
        try:
            return model.routes.pick(version, position)
        except ModelNotFoundError:
            awaited = self._awaited.get(model.model, {})
            if version not in awaited:
                raise
            raise not_ready(f"'{model.model}' version {version}", awaited[version]) from None

    def _let_go(self, model: str, version: int) -> None:
        self._loader.remove(model, version)
        self._version_metrics.remove(model, version)


def _models_in(root: Path, *, may_be_empty: bool) -> dict[str, list[int]]:
    """Versions by model; ConfigError for a folder that can't be a repository."""
    if not root.is_dir():
        raise ConfigError(f"repository {root}: expected a folder of models, found none")
    unreadable: dict[str, BundleError] = {}
    found = list_versions(root, unreadable)
    for error in unreadable.values():
        _log.error("a folder of the repository can't be looked at, and isn't served: %s", error)
    if not found and any(path.name.isdigit() for path in (root.resolve(), *root.iterdir())):
        raise ConfigError(f"repository {root}: expected a folder of models, found a model; serve its parent")
    if not found and not may_be_empty:
        raise ConfigError(
            f"repository {root}: expected bundles as <model>/<version>, found none; "
            f"`xlarank compile` writes them"
        )
    return found
