"""The text of manifest.json: `manifest_to_json`, `manifest_from_json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from xlarank.bundle.document import FORMAT_VERSION, Fields, parse, render
from xlarank.bundle.manifest import MANIFEST_FILE, FileDigest, Manifest, ProgramEntry, TableError
from xlarank.errors import BundleError, ConfigError
from xlarank.spec import Bucket, ErrorBudget, ModelSpec, TablePlacement, Tolerance

__all__ = ["manifest_from_json", "manifest_to_json"]


def manifest_to_json(manifest: Manifest) -> str:
    """The text of manifest.json, with its digest."""
    return render(
        {
            "format_version": FORMAT_VERSION,
            "version": manifest.version,
            "spec": manifest.spec.to_dict(),
            "programs": [_program_to_dict(program) for program in manifest.programs],
            "params": list(manifest.params),
            "prepare": manifest.prepare,
            "num_prepared": manifest.num_prepared,
            "placements": [dataclasses.asdict(placement) for placement in manifest.placements],
            "placed_at": list(manifest.placed_at),
            "unused_features": list(manifest.unused_features),
            "activations": manifest.activations,
            "tolerance": dataclasses.asdict(manifest.tolerance),
            "budget": dataclasses.asdict(manifest.budget),
            "table_errors": {t: dataclasses.asdict(error) for t, error in manifest.table_errors.items()},
            "refusal": manifest.refusal,
            "architecture": manifest.architecture,
            "provenance": dict(manifest.provenance),
            "fingerprint": dict(manifest.fingerprint),
            "files": {path: dataclasses.asdict(digest) for path, digest in manifest.files.items()},
            "cache_files": {p: dataclasses.asdict(digest) for p, digest in manifest.cache_files.items()},
        }
    )


def manifest_from_json(data: bytes, *, file: str = MANIFEST_FILE) -> Manifest:
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
        manifest = Manifest(
            spec=spec,
            version=fields.take("version", int),
            programs=tuple(_program_from_fields(entry) for entry in fields.objects("programs")),
            params=fields.strings("params"),
            prepare=fields.take_optional("prepare", str),
            num_prepared=fields.take("num_prepared", int),
            placements=tuple(_placement_from_fields(entry) for entry in fields.objects("placements")),
            placed_at=fields.integers("placed_at"),
            unused_features=fields.strings("unused_features"),
            activations=fields.take("activations", str),
            tolerance=_tolerance_from_fields(fields.fields("tolerance")),
            budget=_budget_from_fields(fields.fields("budget")),
            table_errors={
                task: _table_error_from_fields(f) for task, f in fields.named_objects("table_errors").items()
            },
            refusal=fields.take("refusal", str),
            architecture=fields.take("architecture", str),
            provenance=fields.texts("provenance"),
            fingerprint=fields.texts("fingerprint"),
            files={p: _digest_from_fields(f) for p, f in fields.named_objects("files").items()},
            cache_files={p: _digest_from_fields(f) for p, f in fields.named_objects("cache_files").items()},
        )
    except ConfigError as error:
        raise BundleError(f"{file}: {error}") from error
    fields.finish()
    manifest.check_published(file)
    return manifest


def _program_to_dict(program: ProgramEntry) -> dict[str, Any]:
    return {
        "rows": program.bucket.rows,
        "requests": program.bucket.requests,
        "form": program.form,
        "prepared": list(program.prepared),
        "file": program.file,
        "precision": program.precision.value,
        "max_error": dict(program.max_error),
        "p99_error": dict(program.p99_error),
        "seconds": dict(program.seconds),
    }


def _program_from_fields(fields: Fields) -> ProgramEntry:
    program = ProgramEntry(
        bucket=Bucket(fields.take("rows", int), fields.take("requests", int)),
        form=fields.take("form", str),
        prepared=fields.integers("prepared"),
        file=fields.take("file", str),
        precision=fields.take("precision", str),  # type: ignore[arg-type]
        max_error=fields.numbers("max_error"),
        p99_error=fields.numbers("p99_error"),
        seconds=fields.numbers("seconds"),
    )
    fields.finish()
    return program


def _placement_from_fields(fields: Fields) -> TablePlacement:
    placement = TablePlacement(
        fields.take("table", str),
        fields.take("num_rows", int),
        {name: int(count) for name, count in fields.numbers("capacities").items()},
    )
    fields.finish()
    return placement


def _tolerance_from_fields(fields: Fields) -> Tolerance:
    tolerance = Tolerance(fields.number("probability"), fields.number("regression"))
    fields.finish()
    return tolerance


def _budget_from_fields(fields: Fields) -> ErrorBudget:
    budget = ErrorBudget(fields.number("max_score_error"), fields.number("max_auc_loss"))
    fields.finish()
    return budget


def _table_error_from_fields(fields: Fields) -> TableError:
    auc_loss = fields.optional_number("auc_loss")
    error = TableError(fields.number("p99"), fields.number("max"), auc_loss)
    fields.finish()
    return error


def _digest_from_fields(fields: Fields) -> FileDigest:
    digest = FileDigest(fields.take("sha256", str), fields.take("bytes", int))
    fields.finish()
    return digest
