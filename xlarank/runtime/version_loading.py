"""Loading a version, beside others that serve or alone: `VersionLoader`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from xlarank import device
from xlarank.bundle import Bundle, Verify, open_bundle
from xlarank.errors import ConfigError
from xlarank.host import FeatureStore, TableMemory
from xlarank.runtime.background import in_background
from xlarank.runtime.captures import Captures
from xlarank.runtime.compile_helper import CompileHelper
from xlarank.runtime.engine import Engine
from xlarank.runtime.features import ModelStores
from xlarank.runtime.loading import Loader
from xlarank.runtime.metrics import Metrics
from xlarank.runtime.pacing import PacedRuns
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.program_key import program_key
from xlarank.runtime.tables import HeldTables, TableBytes, memory_beside
from xlarank.spec.serving import QueueConfig

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["LoadOptions", "VersionLoader"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the versions of a repository are loaded; see `Engine.load`."""

    host_threads: int
    """Threads of each engine's gather."""

    use_bundle_code: bool = True
    """Whether compiled code in bundles may be used."""

    table_memory: TableMemory | None = None
    """Where tables are kept."""

    queue: QueueConfig = dataclasses.field(default_factory=QueueConfig.unbounded)
    """How requests of each engine wait and how many may."""

    captures: Captures = dataclasses.field(default_factory=Captures)
    """Keeps requests that fail or are slow, of all versions."""

    on_progress: Callable[[str], None] | None = None
    """Told each step in words."""

    held: HeldTables | None = None
    """Tables that are loaded already, of every version that is to be."""

    on_table_bytes: TableBytes | None = None
    """Told the bytes of tables read so far, and of how many."""


class VersionLoader:
    """Loads versions of all models of a repository, one at a time.

    Beside versions that serve: programs that the process doesn't have are compiled by a helper process first;
    files are read and checked by one thread of lower priority; what proves and times the version runs
    between the batches of those that serve, for a small share of the time. New weights of programs in use
    take the compiled code and the measured times as they are.
    """

    def __init__(
        self,
        pool: DevicePool,
        metrics: Metrics,
        options: LoadOptions,
        stores: Mapping[str, ModelStores],
        *,
        devices: Sequence[Device],
        warm_share: float,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """
        Args:
          pool: device threads of all engines.
          metrics: registry that engines count in.
          options: for each of them.
          stores: by model, what makes its feature stores.
          devices: that the pool's threads drive, by index.
          warm_share: of a device's time, see `VersionOptions`.
          wait: pauses for some seconds.
        """
        self._pool = pool
        self._metrics = metrics
        self._options = options
        self._stores = stores
        self._library = device.ProgramLibrary()
        self._warm_share = warm_share
        self._wait = wait
        self._devices = devices
        self._helper = CompileHelper(
            platforms=device.platforms_of(devices),
            use_bundle_code=options.use_bundle_code,
            compile_cache=device.compile_cache_folder(),
            # An accelerator's requests need few of the cores, and one nearly always runs.
            idle=pool.idle if any(d.platform == "cpu" for d in devices) else None,
        )
        self._keys: weakref.WeakKeyDictionary[Engine, str] = weakref.WeakKeyDictionary()
        # Keys of programs that were found in the cache, or put there, and what was in it then: JAX doesn't
        # say which files are a program's.
        self._in_cache: set[str] = set()
        self._cache_files: set[str] = set()
        self._num_compiled_alone = device.num_compiled()

    @property
    def num_serving_compiles(self) -> int:
        """Programs compiled while this process served, or others of the same server did; 0 is healthy."""
        return device.num_compiled() - self._num_compiled_alone

    def load(self, path: Path, peers: Sequence[Engine], *, is_beside: bool) -> Engine:
        """Loads a version; when this returns it has been proven.

        Args:
          path: ``<repository>/<model>/<version>``.
          peers: versions of the same model that are loaded.
          is_beside: whether anything serves meanwhile.

        Raises:
          InterruptedLoadError: if it has to give way.
          XlarankError: if it can't be served; says why, naming the file where one is at fault.
        """
        self._helper.check(path)
        before = device.num_compiled()
        held = self._options.held
        tables = None if held is None else held.take(path.parent.name, int(path.name))
        paced = PacedRuns(
            self._pool,
            share=self._warm_share,
            check=functools.partial(self._helper.check, path),
            wait=self._wait,
        )
        host_pace = paced.beside if is_beside else device.at_once
        bundle = self._open(path, is_beside, host_pace)
        if tables is not None:
            tables.check_bundle(bundle)
        key = program_key(bundle)
        twin = next((peer for peer in peers if self._keys.get(peer) == key), None)
        if is_beside and twin is None and not self._is_in_cache(key):
            seconds = self._helper.compile(path)
            _log.info("%s: a process of its own has compiled it in %.1f s", path, seconds)
        options = self._options
        loader = Loader(
            bundle,
            devices=self._devices,
            host_threads=options.host_threads,
            use_bundle_code=options.use_bundle_code,
            table_memory=memory_beside(
                options.table_memory, (peer.load_report.table_memory for peer in peers)
            ),
            on_progress=options.on_progress,
            on_table_bytes=options.on_table_bytes,
            library=self._library,
            paces=paced.on if is_beside else None,
            host_pace=host_pace,
            can_prove=paced.can_prove if is_beside else None,
            profiles=None if twin is None else twin.profiles,
            tables=tables,
        )
        stores = self._stores.get(bundle.spec.name)
        store = None if stores is None else self._store(stores, bundle, peers, is_beside)
        engine = Engine(loader, self._pool, self._metrics, store, options.queue, options.captures)
        self._keys[engine] = key
        if twin is None:  # else nothing was read from the cache
            self._in_cache.add(key)
            self._cache_files |= device.compile_cache_files()
        if stores is not None:
            stores.last = store
        compiled = device.num_compiled() - before
        if not is_beside and (held is None or not held.is_beside):
            self._num_compiled_alone += compiled
        elif compiled:
            _log.error("%s: %d programs were compiled in the process that serves", path, compiled)
        return engine

    def remove(self, model: str, version: int) -> None:
        """Lets go of a version that has ended."""
        self._metrics.remove(model, version)

    def give_way(self, order: int) -> None:
        """Ends the compiling, if one is at it, and begins no load before the `turn` of the same order."""
        self._helper.give_way(order)

    def check_turn(self, path: Path, order: int) -> None:
        """See `CompileHelper.check_turn`."""
        self._helper.check_turn(path, order)

    def turn(self, order: int) -> AbstractContextManager[None]:
        """See `CompileHelper.turn`."""
        return self._helper.turn(order)

    def go_on(self, order: int) -> None:
        """What `give_way` was for has been done, or is given up. Idempotent."""
        self._helper.go_on(order)

    def close(self) -> None:
        """Ends what `load` waits for."""
        self._helper.close()

    def _is_in_cache(self, key: str) -> bool:
        """Whether programs of this key have been in the cache, and it has lost no file since."""
        if not self._cache_files <= device.compile_cache_files():
            self._in_cache.clear()
            self._cache_files.clear()
        return key in self._in_cache

    def _open(self, path: Path, is_beside: bool, pace: device.Pace) -> Bundle:
        def read() -> Bundle:
            # First the little that tells another model's bundle from a damaged one.
            name = pace(lambda: open_bundle(path, verify=Verify.SIZES)).spec.name
            if name != path.parent.name:
                raise ConfigError(
                    f"repository {path.parent.parent}: folder {path.parent.name!r} holds model {name!r}; "
                    f"clients ask by folder and metrics count by name, so the two must be equal"
                )
            num_threads = 1 if is_beside else None
            return pace(lambda: open_bundle(path, verify=Verify.ALL_BUT_TABLES, num_threads=num_threads))

        return in_background(read) if is_beside else read()

    def _store(
        self, stores: ModelStores, bundle: Bundle, peers: Sequence[Engine], is_beside: bool
    ) -> FeatureStore:
        in_background(stores.refresh) if is_beside else stores.refresh()
        known = [peer.features for peer in peers if peer.features is not None]
        return stores.store(bundle.path, bundle.spec, known)
