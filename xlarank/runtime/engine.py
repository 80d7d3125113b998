"""One version of one model, loaded, proven and answering: `Engine`."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

import numpy as np

from xlarank import device
from xlarank.bundle import Verify, open_bundle, resolve_bundle
from xlarank.errors import ConfigError, RequestError, UnavailableError, XlarankError
from xlarank.host import FeatureStore, Gatherer, TableMemory
from xlarank.runtime.answer import Answer
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.captures import Captures
from xlarank.runtime.execution import Execution
from xlarank.runtime.loading import Loader, LoadReport, host_threads_of
from xlarank.runtime.metrics import Metrics, ModelMetrics
from xlarank.runtime.pending import Pending
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.table_versions import TableVersion, TableVersions
from xlarank.runtime.tables import TableBytes
from xlarank.runtime.workload import ModelWorkload
from xlarank.spec import (
    BucketLadder,
    Column,
    LatencyProfile,
    ModelSpec,
    RankRequest,
    RequestOptions,
    check_candidate_ids,
)
from xlarank.spec.serving import QueueConfig

__all__ = ["Engine"]

_log = logging.getLogger(__name__)


class Engine:
    """Scores requests on one or more devices.

    Any thread may call `submit` and `score`. Requests of different callers share batches; each request
    runs whole on one device.

    Attributes:
      spec: what a request must hold.
      version: the bundle's.
      ladder: the compiled buckets.
      profiles: measured seconds a bucket, by device.
      load_report: what loading did and how long each step took.
      metrics: counters of this model and version.
      features: gives the candidate features of requests that name candidates by id; None without a store.
    """

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        num_devices: int | None = None,
        host_threads: int | None = None,
        compile_cache: Path | None = None,
        use_bundle_code: bool = True,
        table_memory: TableMemory | str | None = None,
        backend: str = "auto",
        pool: DevicePool | None = None,
        metrics: Metrics | None = None,
        features: FeatureStore | None = None,
        queue: QueueConfig | None = None,
        captures: Captures | None = None,
        on_progress: Callable[[str], None] | None = None,
        on_table_bytes: TableBytes | None = None,
    ) -> Engine:
        """Loads a bundle; when this returns every bucket on every device has run and been proven.

        Args:
          path: a version folder ``<repository>/<model>/<version>``, or ``<repository>/<model>`` for its
            latest version.
          num_devices: how many devices to serve on, all by default; on a CPU host that hasn't used JAX yet,
            so many XLA host devices are made.
          host_threads: threads of the gather; by default the CPUs of the process, 4 at most.
          compile_cache: the process's compilation cache folder, see `xlarank.device.configure`.
          use_bundle_code: whether compiled code in the bundle may be used; without it programs/ is
            compiled.
          table_memory: "huge" reads the tables into huge pages, "mmap" maps their files; by default huge
            where the kernel has such pages and the tables fit. Updatable tables are read into memory
            whatever it is. Mapped tables are checked in part before this returns and to the end in the
            background, and a file that is cut short is found within about a second; see `fault`. Who reads
            what such a file no longer has in that time is killed by the system: replace files, never
            truncate them.
          backend: of the gather: "native", "numpy" or "auto".
          pool: device threads to share with other engines; its own by default.
          metrics: registry to count in; its own by default.
          features: candidate features by id, made for this model's spec; it may outlive the engine.
          queue: how requests wait and how many may; by default nothing is refused for its sake.
          captures: keeps requests that fail or are slow; by default those that fail, in memory.
          on_progress: told each step in words.
          on_table_bytes: told the bytes of tables read so far, and of how many.

        Raises:
          BundleError: if the bundle is damaged, truncated or of an unknown format.
          VerifyError: if its golden requests get other scores here.
          ConfigError: for devices, memory or options that can't be had, or a store made for other features.
        """
        if table_memory is not None:
            table_memory = TableMemory.named(table_memory)
        host_threads = host_threads_of(host_threads)
        device.configure(num_devices=num_devices, compile_cache=compile_cache)
        bundle = open_bundle(resolve_bundle(Path(path)), verify=Verify.ALL_BUT_TABLES)
        loader = Loader(
            bundle,
            devices=device.devices(num_devices if pool is None else pool.num_devices),
            host_threads=host_threads,
            use_bundle_code=use_bundle_code,
            backend=backend,
            table_memory=table_memory,
            on_progress=on_progress,
            on_table_bytes=on_table_bytes,
        )
        return cls(
            loader,
            pool,
            metrics or Metrics(),
            features,
            queue or QueueConfig.unbounded(),
            captures or Captures(),
        )

    def __init__(
        self,
        loader: Loader,
        pool: DevicePool | None,
        metrics: Metrics,
        features: FeatureStore | None,
        queue: QueueConfig,
        captures: Captures,
    ) -> None:
        """Use `load`."""
        # The formats of its tables are the bundle's own affair.
        if features is not None and (features.spec.name, features.spec.features) != (
            loader.spec.name,
            loader.spec.features,
        ):
            raise ConfigError(
                f"model {loader.spec.name!r}: expected a feature store made for its features, got one "
                f"made for others, of model {features.spec.name!r}"
            )
        loaded = loader.load()
        self._num_open = 0  # guarded by _idle: requests accepted and not yet answered
        self._is_open = True  # guarded by _idle; moves one way
        self._idle = threading.Condition()
        self.spec: ModelSpec = loaded.gatherer.spec
        self.version = loaded.version
        self.ladder: BucketLadder = loaded.ladder
        self.profiles: Sequence[LatencyProfile] = loaded.profiles
        self.load_report: LoadReport = loaded.report
        self.metrics: ModelMetrics = metrics.model(
            self.spec.name,
            self.version,
            pending=lambda: self._num_open,
            features=None if features is None else features.stats,
        )
        self._table_check = loaded.table_check
        if features is not None and features.file is not None:
            self._table_check.watch(features.file)
        huge_pages = loaded.report.huge_pages
        self.metrics.set_tables(
            places={
                name: (str(memory), self.spec.table_by_name[name].num_bytes)
                for name, memory in loaded.report.table_memory.items()
            },
            huge_page_bytes=0 if huge_pages is None else huge_pages.got,
            checked_bytes=lambda: self._table_check.num_checked_bytes,
        )
        self._table_versions = TableVersions(
            (table.name for table in self.spec.tables if table.updatable), shared=loaded.gatherer.shared_rows
        )
        self.metrics.set_table_versions(self._table_versions.now)
        self.features = features
        self._gatherer: Gatherer = loaded.gatherer
        self._device_writer = loaded.device_writer
        self._updates = threading.Lock()
        self._tasks = tuple(task.name for task in self.spec.tasks)
        check = functools.partial(loaded.golden_check, where="golden replay")
        self._execution = Execution(self._gatherer, self.ladder, loaded.replicas, check=check)
        # Weakly: in a cycle with its workload an engine that has ended would keep its tables until the
        # collector comes by.
        own = weakref.ref(self)

        def drop(pending: Pending, is_late: bool) -> None:
            if (engine := own()) is not None:
                engine._pool.drop(engine._queue, pending, is_late=is_late)

        self._workload = ModelWorkload(
            self.spec.name,
            self.version,
            self.ladder,
            self._execution,
            self.metrics,
            captures,
            drop=drop,
        )
        self._owns_pool = pool is None
        self._pool = pool or DevicePool(len(loaded.replicas))
        plans = {
            id(profile): BucketPlan.of_config(self.ladder, profile, queue) for profile in loaded.profiles
        }
        self._queue = self._pool.attach(
            self._workload,
            self.spec.name,
            [plans[id(profile)] for profile in loaded.profiles],
            queue,
            version=self.version,
        )
        self._table_check.start()

    @property
    def damage(self) -> str | None:
        """What was found to be wrong with files in use since loading, such as a damaged table."""
        return self._table_check.fault

    @property
    def fault(self) -> str | None:
        """What was found to be wrong since loading, such as a damaged table, or no device that works.

        No request is taken then.
        """
        return self._table_check.fault or self._pool.fault

    @property
    def num_request_path_compiles(self) -> int:
        """Compiles while answering requests; anything but 0 is a defect."""
        return self._execution.num_compiles

    def check(self, spec: ModelSpec, columns: Sequence[Column]) -> None:
        """The `ContentCheck` to make requests with: as strict as the default one, at native speed."""
        self._gatherer.check(spec, columns)

    def request(self, features: Mapping[str, object], *, candidate_ids: object = None) -> RankRequest:
        """Makes a request for this model; see `RankRequest`.

        Args:
          features: values by name.
          candidate_ids: [N] int64; candidate features that `features` lacks then come from the feature store.

        Raises:
          FeatureError: for values that a request can't have, or ids that the store doesn't have.
          ConfigError: for ids without a store.
          UnavailableError: for ids where a file in use is damaged.
        """
        if candidate_ids is None:
            return RankRequest(self.spec, features, check=self._gatherer.check)
        self._check_damage()
        ids = check_candidate_ids(candidate_ids)
        joined = self._store().join(ids, features)
        return RankRequest(self.spec, joined, num_candidates=len(ids), check=self._gatherer.check)

    def update_features(self, ids: object, features: Mapping[str, object]) -> None:
        """Puts rows into the feature store: every request made after this returns sees them.

        See `FeatureStore.update`. ConfigError without a store.
        """
        self._store().update(ids, features)

    def remove_features(self, ids: object) -> int:
        """Takes rows out of the feature store; returns how many there were. See `FeatureStore.remove`."""
        return self._store().remove(ids)

    def submit(self, request: RankRequest, options: RequestOptions | None = None) -> Future[Answer]:
        """Queues a request.

        Args:
          request: made for this engine's `spec` (or an equal one).
          options: priority, deadline, affinity, arrival; `RequestOptions()` by default.

        Returns:
          A future; its scores are empty arrays for zero candidates. Cancelling it before its batch is
          gathered drops the request. Its callbacks run on the device's thread, which does nothing else
          meanwhile: they must not wait for the engine.

        Raises:
          UnavailableError: if the engine is closed or has a `fault`.
          OverloadError: if too much is queued.
          DeadlineError: if the answer is predicted to come after the deadline. The future raises it when the
            deadline passes while the request is queued; none is executed late.
          ConfigError: if the request was made for another model.
        """
        if not isinstance(request, RankRequest):
            raise RequestError(
                f"model {self.spec.name!r}: expected a RankRequest, got {type(request).__name__}; "
                f"engine.request(features) makes one"
            )
        self._check_damage()  # that no device works, the pool says below
        options = options or RequestOptions()
        bound = self._gatherer.bind(request)
        pending = Pending(bound, self._tasks, time.monotonic(), options.arrived_at)
        with self._idle:
            if not self._is_open:
                raise UnavailableError(f"model {self.spec.name!r} version {self.version} is closed")
            self._num_open += 1
        try:
            if request.num_candidates:
                self._pool.submit(self._queue, pending, request.num_candidates, options)
            else:  # nothing to run, but answered and counted like any other
                self._workload.respond(pending)
        except XlarankError:  # which its future doesn't get: it is in frames that the error keeps, a cycle
            self._count_done()
            raise
        if request.num_candidates:
            self.metrics.record_accepted(request.num_candidates)
        # Weakly: a future keeps its callbacks, and a request that refers to itself stays until the collector
        # comes by, with its engine.
        own = weakref.ref(pending)
        pending.future.add_done_callback(lambda future: self._on_done(future, own()))
        return pending.future

    def score(self, request: RankRequest) -> dict[str, np.ndarray]:
        """Scores a request and waits: {task: [N] float32}; see `submit`."""
        return dict(self.submit(request).result().scores)

    def update_rows(self, table: str, rows: np.ndarray, values: np.ndarray) -> int:
        """Writes rows of an updatable table while it serves; any thread, lookups are not held up.

        Every batch whose gather begins after this returns reads the new rows; a batch that is being gathered
        meanwhile reads each row as it was or as it is, never a mixture.

        Args:
          table: its name; its TableSpec says `updatable`.
          rows: [K] integers, row numbers in [0, R): what hashing or a vocabulary makes of an id.
          values: [K, D] floats, finite; encoded in the table's format.

        Returns:
          The table's version: its updates since the bundle was loaded. An update of no rows is none.

        Raises:
          RequestError: names what is wrong; nothing is written then.
          UnavailableError: if the engine is closed.
        """
        with self._idle:
            if not self._is_open:
                raise UnavailableError(f"model {self.spec.name!r} version {self.version} is closed")
        with self._updates:  # what devices hold must not fall behind the host's for two at once
            self._gatherer.update_rows(table, rows, values)
            if not len(rows):
                return self._table_versions.now()[table].version
            if table in self._gatherer.device_rows:
                self._device_writer.write(table, *self._gatherer.device_update(table, np.asarray(rows)))
        return self._table_versions.advance(table, len(rows))

    @property
    def table_versions(self) -> dict[str, TableVersion]:
        """Updates of each updatable table so far, by name."""
        return self._table_versions.now()

    def close(self) -> None:
        """Finishes what was accepted, then stops. Idempotent."""
        with self._idle:
            self._is_open = False
            self._idle.wait_for(lambda: self._num_open == 0)
        self._table_check.stop()
        self._pool.detach(self._queue)
        if self._owns_pool:
            self._pool.close()
        self._workload.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_damage(self) -> None:
        if self._table_check.fault is not None:
            raise UnavailableError(
                f"model {self.spec.name!r} version {self.version} has failed: {self._table_check.fault}"
            )

    def _store(self) -> FeatureStore:
        if self.features is None:
            raise ConfigError(
                f"model {self.spec.name!r} was loaded without a feature store; give Engine.load one"
            )
        return self.features

    def _on_done(self, future: Future[Answer], pending: Pending | None) -> None:
        if pending is not None and future.cancelled():
            self._pool.cancel(self._queue, pending)
        self._count_done()

    def _count_done(self) -> None:
        with self._idle:
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.notify_all()
