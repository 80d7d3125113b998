"""What a bundle says of itself: `Manifest` and its parts. Their text is of `manifest_json`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

from xlarank.bundle.tables import digests_file
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import (
    Bucket,
    BucketLadder,
    ErrorBudget,
    LatencyProfile,
    ModelSpec,
    Placement,
    Precision,
    RowFormat,
    TablePlacement,
    Tolerance,
)
from xlarank.spec.placement import check_placements

__all__ = [
    "CACHE_FOLDER",
    "DEVICE_ROWS_FILE",
    "GOLDEN_FILE",
    "MANIFEST_FILE",
    "PARAMS_FILE",
    "PROGRAMS_FOLDER",
    "FileDigest",
    "Manifest",
    "ProgramEntry",
    "TableError",
    "table_file",
]

MANIFEST_FILE = "manifest.json"
PARAMS_FILE = "params.safetensors"
DEVICE_ROWS_FILE = "device_rows.safetensors"
GOLDEN_FILE = "golden.safetensors"
PROGRAMS_FOLDER = "programs"
CACHE_FOLDER = "cache"

_SHA256 = re.compile(r"[0-9a-f]{64}")


def table_file(name: str) -> str:
    """Path of a table's array inside a bundle."""
    return f"tables/{name}.npy"


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    sha256: str
    """64 hex digits."""

    bytes: int
    """Size."""

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256) or self.bytes < 0:
            raise ConfigError(f"file digest: expected 64 hex digits and a size >= 0, got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramEntry:
    """The program of one bucket, and what was proven and measured of it."""

    bucket: Bucket
    """Rows and requests that it is compiled for."""

    form: str
    """How the compiler rewrote the model for this bucket, in words, such as ``hoisted, expert_major``."""

    prepared: tuple[int, ...]
    """The prepared arrays that it takes: places among the outputs of `Manifest.prepare` and, after them, the
    rows of tables on devices."""

    file: str
    """Path in the bundle, under programs/; several buckets never share one."""

    precision: Precision
    """That its matmuls with weights multiply in."""

    max_error: Mapping[str, float]
    """By task: largest difference from the reference score over the golden requests; >= 0."""

    p99_error: Mapping[str, float]
    """By task: 99th percentile over golden rows of the same; >= 0."""

    seconds: Mapping[str, float]
    """By device kind: measured seconds a batch; > 0."""

    def __post_init__(self) -> None:
        where = f"program {self.bucket}"
        for field in ("max_error", "p99_error", "seconds"):
            values = {str(key): float(value) for key, value in getattr(self, field).items()}
            object.__setattr__(self, field, values)
        for errors in (self.max_error, self.p99_error):
            if not all(0 <= error < float("inf") for error in errors.values()):
                raise ConfigError(f"{where}: expected finite errors >= 0, got {dict(errors)}")
        if not all(0 < seconds < float("inf") for seconds in self.seconds.values()):
            raise ConfigError(f"{where}: expected finite seconds > 0, got {dict(self.seconds)}")
        try:
            object.__setattr__(self, "precision", Precision(self.precision))
        except ValueError:
            allowed = [precision.value for precision in Precision]
            raise ConfigError(
                f"{where}: precision must be one of {allowed}; was {self.precision!r}"
            ) from None
        object.__setattr__(self, "prepared", tuple(self.prepared))
        _check_program_file(where, self.file)


@dataclasses.dataclass(frozen=True)
class TableError:
    """What the tables' formats cost one task: reference scores with them against those with float32."""

    p99: float
    """99th percentile over golden rows; >= 0."""

    max: float
    """Largest; >= 0."""

    auc_loss: float | None
    """AUC with float32 tables minus AUC with these; None without labels of both classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.p99 <= self.max < float("inf"):
            raise ConfigError(f"table error: expected finite 0 <= p99 <= max, got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle but its arrays and programs."""

    spec: ModelSpec
    """The model, fitted."""

    programs: tuple[ProgramEntry, ...]
    """One a bucket, ascending by bucket."""

    params: tuple[str, ...]
    """Names in params.safetensors, in the order in which `prepare` takes them."""

    prepare: str | None = None
    """File under programs/ that makes the prepared arrays of the params, once; None: the params as they
    are."""

    num_prepared: int
    """How many arrays `prepare` makes, or params there are without it, and tables that devices hold rows
    of."""

    placements: tuple[TablePlacement, ...] = ()
    """Of the tables that devices hold rows of, in the order of their arrays among the prepared."""

    placed_at: tuple[int, ...] = ()
    """Places of those tables' arrays among the prepared: what a row update writes."""

    unused_features: tuple[str, ...] = ()
    """Features that no score depends on: checked in requests, not looked up."""

    activations: str = "float32"
    """Numeric format in which activations reach the device: float32 or bfloat16."""

    tolerance: Tolerance
    """Largest difference from the reference that was let pass in float32."""

    budget: ErrorBudget
    """What was let pass in a lower precision, the tables' share included."""

    table_errors: Mapping[str, TableError] = dataclasses.field(default_factory=dict)
    """By task; empty where nothing is known of tables that are all float32."""

    refusal: str = ""
    """Why compile refused its scores; such a bundle is kept for study and never loaded."""

    architecture: str
    """Digest of all that programs and forms depend on: equal for another checkpoint of the same model."""

    provenance: Mapping[str, str]
    """Where the bundle comes from: created (UTC), versions of xlarank, jax, flax and python, config…"""

    fingerprint: Mapping[str, str]
    """What the files under cache/ were compiled for."""

    version: int = 0
    """Version in the repository; set by `BundleWriter.publish`."""

    files: Mapping[str, FileDigest] = dataclasses.field(default_factory=dict)
    """Every file but the manifest and cache/, by path in the bundle; set by `BundleWriter.publish`."""

    cache_files: Mapping[str, FileDigest] = dataclasses.field(default_factory=dict)
    """The files under cache/, advisory; set by `BundleWriter.publish`."""

    def __post_init__(self) -> None:
        where = f"manifest of {self.spec.name!r}"
        self.spec.check_fitted()
        for field in ("programs", "params", "placements", "placed_at", "unused_features"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("provenance", "fingerprint", "files", "cache_files", "table_errors"):
            object.__setattr__(self, field, dict(getattr(self, field)))
        if self.version < 0:
            raise ConfigError(f"{where}: version must be >= 0; was {self.version}")
        if len(set(self.params)) != len(self.params):
            raise ConfigError(f"{where}: params must be distinct, got {list(self.params)}")
        for field in ("provenance", "fingerprint"):
            for key, value in getattr(self, field).items():
                if not isinstance(key, str) or not isinstance(value, str):
                    raise ConfigError(f"{where}: {field}: expected strings, got {key!r}: {value!r}")
        self._check_programs(where)
        check_placements(self.spec, self.unused_features, self.placements)
        if len(self.placed_at) != len(self.placements) or not all(
            0 <= place < self.num_prepared for place in self.placed_at
        ):
            raise ConfigError(
                f"{where}: expected placed_at to hold a place in [0, {self.num_prepared}) for each of "
                f"{len(self.placements)} tables on devices, got {list(self.placed_at)}"
            )
        for path in self.files:
            _check_path(where, path, in_cache=False)
        for path in self.cache_files:
            _check_path(where, path, in_cache=True)

    @functools.cached_property
    def ladder(self) -> BucketLadder:
        """The buckets of the programs."""
        return BucketLadder(tuple(program.bucket for program in self.programs))

    @functools.cached_property
    def latency(self) -> dict[str, LatencyProfile]:
        """By device kind: the seconds of the programs, as compile measured them."""
        kinds = self.programs[0].seconds
        return {kind: LatencyProfile({p.bucket: p.seconds[kind] for p in self.programs}) for kind in kinds}

    @functools.cached_property
    def required_files(self) -> tuple[str, ...]:
        """Paths that the bundle must have, by what the manifest says."""
        prepares = [self.prepare] if self.prepare is not None else []
        arrays = [table_file(table.name) for table in self.spec.tables]
        tables = [path for array in arrays for path in (array, digests_file(array))]
        programs = [program.file for program in self.programs]
        rows = [DEVICE_ROWS_FILE] if self.split_tables else []
        return tuple(dict.fromkeys([PARAMS_FILE, GOLDEN_FILE, *rows, *tables, *prepares, *programs]))

    @functools.cached_property
    def split_tables(self) -> tuple[str, ...]:
        """Tables of which devices hold some rows: device_rows.safetensors has their numbers."""
        return tuple(p.table for p in self.placements if p.kind(self.spec) is Placement.SPLIT)

    def error_limits(self, program: ProgramEntry) -> dict[str, float]:
        """By task: the largest error that golden rows may show when the bundle is loaded.

        In float32 the tolerance. In a lower precision twice what compile found, or the budget if that is
        more: another CPU may round otherwise, and the budget's own 99th percentile was held over all golden
        rows.
        """
        if program.precision is Precision.FLOAT32:
            return {task.name: self.tolerance.of(task.kind) for task in self.spec.tasks}
        return {
            name: max(self.budget.max_score_error, 2 * error) for name, error in program.max_error.items()
        }

    def check_published(self, where: str) -> None:
        """Raises BundleError unless the version is set and every required file has a digest."""
        if self.version < 1:
            raise BundleError(f"{where}: expected a version >= 1, got {self.version}")
        if missing := [path for path in self.required_files if path not in self.files]:
            raise BundleError(f"{where}: names {missing} but has no digest of them")

    def _check_programs(self, where: str) -> None:
        if not self.programs:
            raise ConfigError(f"{where}: expected a program a bucket, got none")
        assert self.ladder  # refuses buckets that are not distinct and ascending
        tasks = [task.name for task in self.spec.tasks]
        files: set[str] = set()
        for program in self.programs:
            at = f"{where}: program {program.bucket}"
            if not all(0 <= place < self.num_prepared for place in program.prepared):
                raise ConfigError(
                    f"{at}: prepared must be places in [0, {self.num_prepared}); was {list(program.prepared)}"
                )
            for field in ("max_error", "p99_error"):
                errors = getattr(program, field)
                if sorted(errors) != sorted(tasks):
                    raise ConfigError(f"{at}: expected {field} of {tasks}, got {dict(errors)}")
            if program.seconds.keys() != self.programs[0].seconds.keys():
                raise ConfigError(
                    f"{at}: expected seconds for {sorted(self.programs[0].seconds)}, as program "
                    f"{self.programs[0].bucket} has, got {sorted(program.seconds)}"
                )
            if program.file in files:
                raise ConfigError(f"{at}: file {program.file!r} is another bucket's too")
            files.add(program.file)
        if self.prepare is not None:
            _check_program_file(f"{where}: prepare", self.prepare)
        elif self.num_prepared != len(self.params) + len(self.placements):
            raise ConfigError(
                f"{where}: without prepare, num_prepared must be that of the params and of the tables on "
                f"devices, {len(self.params)} + {len(self.placements)}; was {self.num_prepared}"
            )
        if self.table_errors and sorted(self.table_errors) != sorted(tasks):
            raise ConfigError(f"{where}: expected table_errors of {tasks}, got {dict(self.table_errors)}")
        lossy = [table.name for table in self.spec.tables if table.dtype is not RowFormat.FLOAT32]
        if lossy and not self.table_errors:
            raise ConfigError(f"{where}: expected table_errors, as tables {lossy} aren't float32; got none")
        if unknown := sorted(set(self.unused_features) - set(self.spec.feature_by_name)):
            raise ConfigError(f"{where}: unused_features {unknown} are no features of the model")
        if self.activations not in ("float32", "bfloat16"):
            raise ConfigError(f"{where}: activations must be float32 or bfloat16; was {self.activations!r}")


def _check_program_file(where: str, path: str) -> None:
    _check_path(where, path, in_cache=False)
    if not path.startswith(f"{PROGRAMS_FOLDER}/"):
        raise ConfigError(
            f"{where}: expected a path under programs/, as add_program returns it, got {path!r}"
        )


def _check_path(where: str, path: str, *, in_cache: bool) -> None:
    """Refuses a path that could lead out of the bundle, or into the wrong part of it."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in path or path == MANIFEST_FILE:
        raise ConfigError(f"{where}: expected a path inside the bundle, got {path!r}")
    if in_cache != (parts[0] == CACHE_FOLDER and len(parts) > 1):
        place = "under" if in_cache else "outside"
        raise ConfigError(f"{where}: expected a path {place} {CACHE_FOLDER}/, got {path!r}")
