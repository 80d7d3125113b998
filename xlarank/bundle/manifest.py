"""What a bundle says of itself: `Manifest` and its parts."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from xlarank.bundle.document import FORMAT_VERSION, Fields, parse, render
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import Bucket, BucketLadder, LatencyProfile, ModelSpec, Tolerance

__all__ = [
    "CACHE_FOLDER",
    "GOLDEN_FILE",
    "MANIFEST_FILE",
    "PARAMS_FILE",
    "PROGRAMS_FOLDER",
    "FileDigest",
    "Form",
    "Manifest",
    "ProgramEntry",
    "table_file",
]

MANIFEST_FILE = "manifest.json"
PARAMS_FILE = "params.safetensors"
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


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to lay the dense weights out for the row programs."""

    prepare: str | None = None
    """File under programs/ that makes prepared weights of the params; None: the params as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramEntry:
    """The program of one bucket, and what was proven and measured of it."""

    bucket: Bucket
    """Rows and requests that it is compiled for."""

    form: str
    """Key of `Manifest.forms`: the prepared weights that it takes."""

    file: str
    """Path in the bundle, under programs/; several buckets never share one."""

    precision: str
    """Name of the precision policy."""

    max_error: Mapping[str, float]
    """By task: largest difference from the reference score over the golden requests; >= 0."""

    seconds: Mapping[str, float]
    """By device kind: measured seconds a batch; > 0."""

    def __post_init__(self) -> None:
        where = f"program {self.bucket}"
        for field in ("max_error", "seconds"):
            values = {str(key): float(value) for key, value in getattr(self, field).items()}
            object.__setattr__(self, field, values)
        if not all(0 <= error < float("inf") for error in self.max_error.values()):
            raise ConfigError(f"{where}: expected finite errors >= 0, got {dict(self.max_error)}")
        if not all(0 < seconds < float("inf") for seconds in self.seconds.values()):
            raise ConfigError(f"{where}: expected finite seconds > 0, got {dict(self.seconds)}")
        if not self.precision:
            raise ConfigError(f"{where}: expected the name of a precision policy, got ''")
        _check_program_file(where, self.file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle but its arrays and programs."""

    spec: ModelSpec
    """The model, fitted."""

    programs: tuple[ProgramEntry, ...]
    """One a bucket, ascending by bucket."""

    forms: Mapping[str, Form]
    """By name; every program names one."""

    params: tuple[str, ...]
    """Names in params.safetensors, in the order in which prepare and the identity form take them."""

    tolerance: Tolerance
    """Largest difference from the reference that was let pass; the replay at load lets no more pass."""

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
        for field, kind in (("programs", tuple), ("params", tuple), ("forms", dict), ("files", dict)):
            object.__setattr__(self, field, kind(getattr(self, field)))
        for field in ("provenance", "fingerprint", "cache_files"):
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
        prepares = [form.prepare for form in self.forms.values() if form.prepare is not None]
        tables = [table_file(table.name) for table in self.spec.tables]
        programs = [program.file for program in self.programs]
        return tuple(dict.fromkeys([PARAMS_FILE, GOLDEN_FILE, *tables, *prepares, *programs]))

    def to_json(self) -> str:
        """The text of manifest.json, with its digest."""
        return render(
            {
                "format_version": FORMAT_VERSION,
                "version": self.version,
                "spec": self.spec.to_dict(),
                "programs": [_program_to_dict(program) for program in self.programs],
                "forms": {name: {"prepare": form.prepare} for name, form in self.forms.items()},
                "params": list(self.params),
                "tolerance": dataclasses.asdict(self.tolerance),
                "provenance": dict(self.provenance),
                "fingerprint": dict(self.fingerprint),
                "files": {path: dataclasses.asdict(digest) for path, digest in self.files.items()},
                "cache_files": {p: dataclasses.asdict(digest) for p, digest in self.cache_files.items()},
            }
        )

    @classmethod
    def from_json(cls, data: bytes, *, file: str = MANIFEST_FILE) -> Manifest:
        """Reads the bytes of a published bundle's manifest.json.

        Args:
          data: the file's content.
          file: its name, for messages.

        Raises:
          BundleError: for an unknown format version, a changed byte, an unknown key, a value of another
            type, or values that contradict each other; names the file.
        """
        fields = Fields(parse(data, file), file)
        fields.take("format_version", int)
        spec_value, spec_where = fields.take("spec", dict), f"{file}: spec"
        try:
            spec = ModelSpec.from_dict(spec_value)
        # Values of a wrong type fail in the specs as they would in Python.
        except (ConfigError, TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:
            raise BundleError(f"{spec_where}: {error}") from error
        try:
            manifest = cls(
                spec=spec,
                version=fields.take("version", int),
                programs=tuple(_program_from_fields(entry) for entry in fields.objects("programs")),
                forms={name: _form_from_fields(f) for name, f in fields.named_objects("forms").items()},
                params=fields.strings("params"),
                tolerance=_tolerance_from_fields(fields.fields("tolerance")),
                provenance=fields.texts("provenance"),
                fingerprint=fields.texts("fingerprint"),
                files={p: _digest_from_fields(f) for p, f in fields.named_objects("files").items()},
                cache_files={
                    p: _digest_from_fields(f) for p, f in fields.named_objects("cache_files").items()
                },
            )
        except ConfigError as error:
            raise BundleError(f"{file}: {error}") from error
        fields.finish()
        manifest.check_published(file)
        return manifest

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
            if program.form not in self.forms:
                raise ConfigError(f"{at}: form {program.form!r} is not of the forms {sorted(self.forms)}")
            if sorted(program.max_error) != sorted(tasks):
                raise ConfigError(f"{at}: expected max_error of {tasks}, got {dict(program.max_error)}")
            if program.seconds.keys() != self.programs[0].seconds.keys():
                raise ConfigError(
                    f"{at}: expected seconds for {sorted(self.programs[0].seconds)}, as program "
                    f"{self.programs[0].bucket} has, got {sorted(program.seconds)}"
                )
            if program.file in files:
                raise ConfigError(f"{at}: file {program.file!r} is another bucket's too")
            files.add(program.file)
        for name, form in self.forms.items():
            if form.prepare is not None:
                _check_program_file(f"{where}: form {name!r}", form.prepare)


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


def _program_to_dict(program: ProgramEntry) -> dict[str, Any]:
    return {
        "rows": program.bucket.rows,
        "requests": program.bucket.requests,
        "form": program.form,
        "file": program.file,
        "precision": program.precision,
        "max_error": dict(program.max_error),
        "seconds": dict(program.seconds),
    }


def _program_from_fields(fields: Fields) -> ProgramEntry:
    program = ProgramEntry(
        bucket=Bucket(fields.take("rows", int), fields.take("requests", int)),
        form=fields.take("form", str),
        file=fields.take("file", str),
        precision=fields.take("precision", str),
        max_error=fields.numbers("max_error"),
        seconds=fields.numbers("seconds"),
    )
    fields.finish()
    return program


def _form_from_fields(fields: Fields) -> Form:
    form = Form(fields.take_optional("prepare", str))
    fields.finish()
    return form


def _tolerance_from_fields(fields: Fields) -> Tolerance:
    tolerance = Tolerance(fields.number("probability"), fields.number("regression"))
    fields.finish()
    return tolerance


def _digest_from_fields(fields: Fields) -> FileDigest:
    digest = FileDigest(fields.take("sha256", str), fields.take("bytes", int))
    fields.finish()
    return digest
