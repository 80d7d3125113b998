"""From a bundle on disk to proven executables: `Loader`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xlarank import device
from xlarank.bundle import Bundle
from xlarank.errors import ConfigError, VerifyError
from xlarank.host import DeviceRows, Gatherer, HugePages, TableMemory
from xlarank.runtime.background import in_background
from xlarank.runtime.program_key import updatable_tables
from xlarank.runtime.table_check import TableCheck
from xlarank.runtime.tables import LoadedTables, TableBytes, load_tables
from xlarank.spec import Bucket, BucketLadder, LatencyProfile, ModelSpec

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jax import Array
    from jax.stages import Compiled
    from jaxlib._jax import Device

__all__ = [
    "ExportedProgram",
    "GoldenCheck",
    "LoadReport",
    "LoadedModel",
    "Loader",
    "fingerprint_differences",
    "host_threads_of",
    "read_programs",
]

_log = logging.getLogger(__name__)

_REPLAYED_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading did."""

    seconds: dict[str, float]
    """By step: tables, compile (deserialise, place weights, compile or find in the cache), row updates (the
    programs that write them on devices), replay, profile."""

    fingerprint_differences: dict[str, tuple[str, str]]
    """What differs here from where the bundle was compiled: {key: (there, here)}; then programs/ was
    compiled anew."""

    max_error: dict[str, float]
    """Largest error by task of the golden rows replayed: up to 4 full batches a bucket, on every device."""

    table_memory: Mapping[str, TableMemory]
    """By table: where it is. Updatable ones are in memory, whatever was asked for."""

    huge_pages: HugePages | None
    """How much of those in memory lies in huge pages; None if all tables are mapped."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Everything that serving needs of one bundle."""

    version: int
    gatherer: Gatherer
    table_check: TableCheck
    """Of mapped tables, not yet started."""

    ladder: BucketLadder
    replicas: Sequence[device.Replica]
    device_writer: device.TableWriter
    profiles: Sequence[LatencyProfile]
    """By device, the same object for devices of one kind: the slowest of the kind counts."""

    golden_check: GoldenCheck
    """Proves a device again while serving."""

    report: LoadReport


def host_threads_of(given: int | None, num_processes: int = 1) -> int:
    """Threads of each gather: as given, else the process's share of the CPUs, 4 at most; ConfigError below 1.

    Args:
      given: what was asked for.
      num_processes: that gather on these CPUs.
    """
    if given is None:
        return min(4, max(1, len(os.sched_getaffinity(0)) // num_processes))
    if given < 1:
        raise ConfigError(f"host_threads must be >= 1; was {given}")
    return given


class GoldenCheck:
    """Replays golden requests in every bucket. Any thread, each with buffers of its own."""

    def __init__(
        self,
        gatherer: Gatherer,
        golden: device.GoldenReplay,
        limits: Mapping[Bucket, Mapping[str, float]],
    ) -> None:
        """
        Args:
          gatherer: of the model's tables.
          golden: its requests and their reference scores.
          limits: largest error by bucket and task.
        """
        self._gatherer, self._golden, self._limits = gatherer, golden, limits
        # An error is inf where a score isn't finite.
        self._any_finite = {bucket: dict.fromkeys(own, sys.float_info.max) for bucket, own in limits.items()}

    def __call__(
        self,
        run: Callable[[Bucket, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        buffers: device.BatchBuffers,
        *,
        where: str,
    ) -> dict[str, float]:
        """Up to 4 full batches a bucket.

        Golden scores are those of tables as they were written: once an update of rows has begun, here or in
        another process, what can still be told is whether the device runs and its scores are finite.

        Args:
          run: runs a batch.
          buffers: to write and read.
          where: on what, in words.

        Returns:
          The largest error by task.

        Raises:
          VerifyError: names task, bucket and error that leave their limit.
        """
        if not self._gatherer.has_updates:
            try:
                return self._replay(run, buffers, where, self._limits)
            except VerifyError:
                if not self._gatherer.has_updates:  # else the first one has begun meanwhile
                    raise
        return self._replay(run, buffers, f"{where}, on updated tables", self._any_finite)

    def _replay(
        self,
        run: Callable[[Bucket, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        buffers: device.BatchBuffers,
        where: str,
        limits: Mapping[Bucket, Mapping[str, float]],
    ) -> dict[str, float]:
        spec = self._gatherer.spec
        worst = dict.fromkeys((task.name for task in spec.tasks), 0.0)
        replayed = self._golden.replay(run, limits, buffers.leaves, _REPLAYED_BATCHES)
        for bucket, errors in replayed.items():
            device.check_errors(spec, f"bucket {bucket} (rows x requests)", errors, limits[bucket], where)
            worst = {task: max(worst[task], errors[task]) for task in worst}
        return worst


class Loader:
    """Loads one bundle onto devices; nothing is served before all of it has run."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        devices: Sequence[Device],
        host_threads: int,
        use_bundle_code: bool = True,
        backend: str = "auto",
        table_memory: TableMemory | None = None,
        on_progress: Callable[[str], None] | None = None,
        on_table_bytes: TableBytes | None = None,
        library: device.ProgramLibrary | None = None,
        paces: Callable[[int], device.Pace] | None = None,
        host_pace: device.Pace = device.at_once,
        can_prove: Callable[[int], bool] | None = None,
        profiles: Sequence[LatencyProfile] | None = None,
        tables: LoadedTables | None = None,
    ) -> None:
        """See `xlarank.runtime.Engine.load`, and:

        Args:
          library: programs that are compiled already.
          paces: by index of the device, what makes the runs that prove and time; given where others serve
            meanwhile, and then tables are read by one thread of low priority.
          host_pace: what reads each piece of the tables, and each program from the compilation cache.
          can_prove: by index of the device, whether the version is proven and timed there; everywhere without
            it, or where it says no of all.
          profiles: by device, of the same programs on the same devices; they are timed without it.
          tables: the bundle's, loaded already; they are loaded without it.
        """
        self._bundle = bundle
        self._devices = devices
        self._host_threads = host_threads
        self._use_bundle_code = use_bundle_code
        self._backend = backend
        self._table_memory = table_memory
        self._on_progress = on_progress
        self._on_table_bytes = on_table_bytes
        self._library = library
        self._paces = paces
        self._host_pace = host_pace
        self._can_prove = can_prove or (lambda _: True)
        self._known_profiles = profiles
        self._loaded_tables = tables
        self._seconds: dict[str, float] = {}

    @property
    def spec(self) -> ModelSpec:
        """Of the bundle."""
        return self._bundle.spec

    def load(self) -> LoadedModel:
        """Reads or maps tables, compiles, replays the golden requests on every device and bucket, times them.

        Raises:
          BundleError: if a file of the bundle can't be read as what it should be.
          ConfigError: if the tables don't fit the memory that they were asked into.
          VerifyError: names task, bucket and error when golden scores differ here.
        """
        manifest = self._bundle.manifest
        if manifest.refusal:
            raise VerifyError(f"{self._bundle.path}: was refused when it was compiled: {manifest.refusal}")
        differences = self._compare_fingerprints()
        tables = self._timed("tables", self._tables)
        gatherer = self._gatherer(tables)
        replicas = self._timed("compile", self._replicas, gatherer, not differences)
        writer = self._timed("row updates", self._device_writer, replicas)
        golden, buffers = self._golden(gatherer), device.BatchBuffers(gatherer.signature, manifest.ladder)
        limits = {entry.bucket: manifest.error_limits(entry) for entry in manifest.programs}
        check = GoldenCheck(gatherer, golden, limits)
        errors = self._timed("replay", self._replay, replicas, check, buffers)
        profiles = self._timed("profile", self._profiles, replicas, golden, buffers)
        return LoadedModel(
            version=manifest.version,
            gatherer=gatherer,
            table_check=tables.check,
            ladder=manifest.ladder,
            replicas=replicas,
            device_writer=writer,
            profiles=profiles,
            golden_check=check,
            report=LoadReport(self._seconds, differences, errors, tables.memory, tables.huge_pages),
        )

    def _timed(self, step: str, work: Callable, *args):
        if self._on_progress is not None:
            self._on_progress(f"{self._bundle.spec.name} {self._bundle.manifest.version}: {step}")
        start = time.perf_counter()
        result = work(*args)
        self._seconds[step] = time.perf_counter() - start
        return result

    def _compare_fingerprints(self) -> dict[str, tuple[str, str]]:
        differences = fingerprint_differences(self._bundle, self._devices)
        if differences:
            text = "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in differences.items())
            _log.warning(
                "bundle %s was compiled elsewhere, its programs are compiled anew: %s",
                self._bundle.path,
                text,
            )
        return differences

    def _tables(self) -> LoadedTables:
        if self._loaded_tables is not None:
            return self._loaded_tables
        load = functools.partial(
            load_tables,
            self._bundle,
            self._table_memory,
            platforms=[d.platform for d in self._devices],
            on_bytes=self._on_table_bytes,
        )
        if self._paces is None:
            loaded = load(num_threads=self._host_threads)
        else:
            loaded = in_background(lambda: load(num_threads=1, pace=self._host_pace))
        if self._on_progress is not None and loaded.memory:
            self._on_progress(f"{self._bundle.spec.name} {self._bundle.manifest.version}: {loaded}")
        return loaded

    def _gatherer(self, tables: LoadedTables) -> Gatherer:
        manifest, numbers = self._bundle.manifest, self._bundle.device_rows()
        return Gatherer(
            self._bundle.spec,
            tables.tables,
            num_threads=self._host_threads,
            backend=self._backend,
            unused=manifest.unused_features,
            activations=manifest.activations,
            device_rows=DeviceRows.of_bundle(manifest.placements, numbers),
            shared_rows=tables.shared_rows,
        )

    def _replicas(self, gatherer: Gatherer, is_same_place: bool) -> list[device.Replica]:
        if self._use_bundle_code and is_same_place:
            device.seed_compile_cache(self._bundle.cache_files())
        programs, prepare = read_programs(self._bundle)
        weights = [*self._bundle.params().values()]
        tables = device.place_tables(self._devices, gatherer.device_arrays())
        return [
            self._replica(d, gatherer, programs, prepare, weights, placed)
            for d, placed in zip(self._devices, tables, strict=True)
        ]

    def _replica(
        self,
        target: Device,
        gatherer: Gatherer,
        programs: Mapping[Bucket, ExportedProgram],
        prepare: ExportedProgram | None,
        weights: Sequence[np.ndarray],
        placed: Sequence[Array],
    ) -> device.Replica:
        library = self._library or device.ProgramLibrary()

        def compiled(program: ExportedProgram, compile_: device.Compile) -> Compiled:
            return self._host_pace(functools.partial(program.compiled, library, target, compile_))

        lay_out = None if prepare is None else compiled(prepare, device.compile_prepare)
        prepared = device.prepare_weights(target, lay_out, weights)
        bucket_programs = {
            entry.bucket: device.BucketProgram(
                compiled(programs[entry.bucket], device.compile_row_program), entry.prepared
            )
            for entry in self._bundle.manifest.programs
        }
        return device.Replica(target, gatherer.signature, bucket_programs, (*prepared, *placed), lay_out)

    def _device_writer(self, replicas: Sequence[device.Replica]) -> device.TableWriter:
        """For row updates of the tables that devices hold rows of."""
        tables = updatable_tables(self._bundle)
        return device.TableWriter(replicas, {name: place for name, (_, place) in tables.items()})

    def _golden(self, gatherer: Gatherer) -> device.GoldenReplay:
        requests, values = self._bundle.golden()
        ends = np.cumsum([request.num_candidates for request in requests])
        scores = {task: np.split(rows, ends[:-1]) for task, rows in values["scores"].items()}
        return device.GoldenReplay(gatherer, requests, scores, self._bundle.manifest.ladder.max_rows)

    def _replay(
        self, replicas: Sequence[device.Replica], check: GoldenCheck, buffers: device.BatchBuffers
    ) -> dict[str, float]:
        worst = dict.fromkeys((task.name for task in self._bundle.spec.tasks), 0.0)
        for index, replica in self._trusted(replicas):
            run = functools.partial(self._run, index, replica)
            errors = check(run, buffers, where=f"golden replay on {replica.device}")
            worst = {task: max(worst[task], errors[task]) for task in worst}
        return worst

    def _run(
        self, index: int, replica: device.Replica, bucket: Bucket, leaves: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        return self._pace(index)(functools.partial(replica.run, bucket, leaves))

    def _profiles(
        self,
        replicas: Sequence[device.Replica],
        golden: device.GoldenReplay,
        buffers: device.BatchBuffers,
    ) -> Sequence[LatencyProfile]:
        if self._known_profiles is not None:
            return self._known_profiles
        by_kind: dict[str, list[LatencyProfile]] = {}
        for index, replica in self._trusted(replicas):
            measured = device.measure_profile(replica, golden, buffers, pace=self._pace(index))
            by_kind.setdefault(device.device_kind(replica.device), []).append(measured)
        slowest = {
            kind: LatencyProfile({b: max(p.seconds_of(b) for p in measured) for b in measured[0].seconds})
            for kind, measured in by_kind.items()
        }
        unknown = max(slowest.values(), key=lambda profile: max(profile.seconds.values()))
        return [slowest.get(device.device_kind(replica.device), unknown) for replica in replicas]

    def _trusted(self, replicas: Sequence[device.Replica]) -> list[tuple[int, device.Replica]]:
        """Those that can prove a version, by index; all where none can, which says why."""
        numbered = list(enumerate(replicas))
        return [(index, replica) for index, replica in numbered if self._can_prove(index)] or numbered

    def _pace(self, index: int) -> device.Pace:
        return device.at_once if self._paces is None else self._paces(index)


@dataclasses.dataclass(frozen=True)
class ExportedProgram:
    """A program of a bundle, read and not yet compiled."""

    digest: str
    """sha256 of its file."""

    data: bytes

    def compiled(self, library: device.ProgramLibrary, target: Device, compile_: device.Compile) -> Compiled:
        """Compiled for a device; see `xlarank.device.ProgramLibrary`."""
        return library.compiled(self.digest, lambda: device.deserialize_program(self.data), target, compile_)


def read_programs(bundle: Bundle) -> tuple[dict[Bucket, ExportedProgram], ExportedProgram | None]:
    """Row programs by bucket, and the one that prepares weights if there is one.

    Raises:
      BundleError: if a file can't be read.
    """
    files, data = bundle.manifest.files, bundle.prepare()
    programs = {
        entry.bucket: ExportedProgram(files[entry.file].sha256, bundle.program(entry))
        for entry in bundle.manifest.programs
    }
    if data is None:
        return programs, None
    return programs, ExportedProgram(files[bundle.manifest.prepare or ""].sha256, data)


def fingerprint_differences(bundle: Bundle, devices: Sequence[Device]) -> dict[str, tuple[str, str]]:
    """How the place that a bundle was compiled at and this one differ: both values by key, {} if they don't.

    Of devices of several kinds the one counts that is most like it: the bundle's compiled code is for it.
    """
    there = bundle.manifest.fingerprint

    def differences(here: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        return {
            key: (there.get(key, ""), here.get(key, ""))
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        }

    kinds = {device.device_kind(target): target for target in devices}
    return min((differences(device.fingerprint(target)) for target in kinds.values()), key=len)
