"""From a Flax module and its tables to a proven bundle on disk: `build_bundle`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from xlarank import device
from xlarank.bundle import BundleWriter, Form, Manifest, ProgramEntry, open_bundle
from xlarank.compiler.analyze import Analysis, analyze
from xlarank.compiler.golden import random_requests
from xlarank.compiler.lower import lower_program
from xlarank.compiler.reference import reference_scores
from xlarank.compiler.report import render_report
from xlarank.compiler.split import DenseModel, row_program, split_module
from xlarank.compiler.verify import verify_bucket
from xlarank.errors import ConfigError
from xlarank.host import Gatherer, check_tables
from xlarank.spec import (
    DEFAULT_ROWS,
    FLOAT32,
    Bucket,
    BucketLadder,
    ModelSpec,
    PrecisionPolicy,
    RankRequest,
    Signature,
)

__all__ = ["BuildOptions", "BuildResult", "build", "build_bundle"]

_log = logging.getLogger(__name__)

_PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """A published bundle and what is known of it."""

    path: Path
    """``<repository>/<model>/<version>``."""

    manifest: Manifest
    """As published."""

    analysis: Analysis
    """Costs of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a bundle is made."""

    version: int | None = None
    """Version to publish; None: one above the highest there."""

    bucket_rows: tuple[int, ...] = DEFAULT_ROWS
    """Row counts of the ladder; each gets buckets of 1, B/32 and B requests."""

    num_devices: int | None = None
    """Devices to leave compiled code for; all by default."""

    precision: PrecisionPolicy = FLOAT32
    """Numeric format and the tolerance to prove."""

    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where the weights come from, kept in the manifest."""


def build_bundle(
    model: nnx.Module,
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    *,
    out: str | os.PathLike[str],
    version: int | None = None,
    buckets: Iterable[int] | None = None,
    golden: Sequence[RankRequest] | None = None,
) -> Path:
    """Compiles a model for every bucket, proves it and publishes a bundle.

    Args:
      model: any nnx.Module of DESIGN §3: activations by feature name in, logits [B] by task name out. It
        is put in evaluation mode.
      spec: its features, tables and tasks, fitted.
      tables: [R, D] float32 by table name.
      out: the repository folder; the bundle is ``<out>/<spec.name>/<version>``.
      version: ascending integer; one above the highest there by default.
      buckets: row counts to compile for, `DEFAULT_ROWS` by default.
      golden: requests to prove the scores with, at compile time and at every load; random valid ones by
        default.

    Returns:
      The bundle's folder, ready for ``Engine.load``.

    Raises:
      ConfigError: if spec, tables or buckets are wrong.
      ModelError: if the model can't be compiled, or lets rows touch each other; names the operation.
      VerifyError: if compiled scores leave the tolerance.
      BundleError: if the version exists.
    """
    device.configure()
    rows = DEFAULT_ROWS if buckets is None else tuple(buckets)
    options = BuildOptions(version=version, bucket_rows=rows)
    return build(model, spec, tables, out=Path(out), options=options, golden=golden).path


def build(
    module: nnx.Module,
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    *,
    out: Path,
    options: BuildOptions,
    golden: Sequence[RankRequest] | None = None,
    on_bucket: Callable[[Bucket, int, int], None] | None = None,
) -> BuildResult:
    """`build_bundle` with every option.

    Args:
      module: see `build_bundle`, as for the next three and `golden`.
      spec: fitted.
      tables: float32 by name.
      out: repository folder.
      options: how.
      golden: requests to prove with.
      on_bucket: told each bucket that is done, its number and how many there are, for progress.
    """
    _check_arguments(spec, tables, options, golden)
    spec.check_fitted()
    check_tables(spec, tables)
    fingerprint = device.fingerprint()
    ladder = BucketLadder.of_rows(options.bucket_rows)
    requests = [r for r in (golden if golden is not None else random_requests(spec)) if r.num_candidates]
    if not requests:
        raise ConfigError(f"model {spec.name!r}: expected golden requests with candidates, got none")
    signature = Signature.of_model(spec)
    model = split_module(module)
    analysis = analyze(model, spec, signature, requests)
    scores = reference_scores(module, spec, tables, requests)
    gatherer = Gatherer(spec, tables)
    golden_replay = device.GoldenReplay(gatherer, requests, scores, ladder.max_rows)
    random = random_requests(spec, seed=1)
    no_scores = {t.name: [np.zeros(r.num_candidates, np.float32) for r in random] for t in spec.tasks}
    probes = device.GoldenReplay(gatherer, random, no_scores, ladder.max_rows)
    with BundleWriter(out, spec.name, options.version) as writer:
        writer.add_params(dict(zip(model.names, model.params, strict=True)))
        for table in spec.tables:
            writer.add_table(table.name, tables[table.name])
        rows = {task: np.concatenate(parts) for task, parts in scores.items()}
        writer.add_golden(requests, {"scores": rows})
        entries = _compile(model, spec, signature, ladder, golden_replay, probes, options, writer, on_bucket)
        writer.add_text("analysis.json", json.dumps(analysis.to_dict(), indent=1))
        manifest = Manifest(
            spec=spec,
            programs=tuple(entries),
            forms={_PLAIN: Form()},
            params=model.names,
            tolerance=options.precision.tolerance,
            provenance=_provenance() | dict(options.provenance),
            fingerprint=fingerprint,
        )
        writer.add_text("report.html", render_report(manifest, analysis))
        path = writer.publish(manifest)
    return BuildResult(path, open_bundle(path, verify=False).manifest, analysis)


def _check_arguments(spec: object, tables: object, options: BuildOptions, golden: object) -> None:
    """Raises ConfigError for what isn't of the type that `build_bundle` takes."""
    if not isinstance(spec, ModelSpec):
        raise ConfigError(f"spec: expected a ModelSpec, got {type(spec).__name__}")
    if not isinstance(tables, Mapping):
        raise ConfigError(f"tables: expected arrays by table name, got {type(tables).__name__}")
    if options.version is not None and type(options.version) is not int:
        raise ConfigError(f"version: expected an integer >= 1, got {options.version!r}")
    for number, request in enumerate(golden if isinstance(golden, Sequence) else ()):
        if not isinstance(request, RankRequest):
            raise ConfigError(
                f"golden request {number}: expected a RankRequest, got {type(request).__name__}"
            )
        if request.spec is not spec and request.spec != spec:
            raise ConfigError(
                f"golden request {number}: was made for another spec than model {spec.name!r}'s"
            )


def _compile(
    model: DenseModel,
    spec: ModelSpec,
    signature: Signature,
    ladder: BucketLadder,
    golden: device.GoldenReplay,
    probes: device.GoldenReplay,
    options: BuildOptions,
    writer: BundleWriter,
    on_bucket: Callable[[Bucket, int, int], None] | None,
) -> list[ProgramEntry]:
    """Lowers, compiles for every device, proves and times each bucket."""
    targets = device.devices(options.num_devices)
    kind = device.device_kind(targets[0])
    buffers = device.BatchBuffers(signature, ladder)
    entries = []
    with device.compile_cache_at(writer.cache_dir):
        for number, bucket in enumerate(ladder.buckets, start=1):
            program = row_program(model, spec, signature, bucket)
            data = lower_program(program, model, spec, signature, bucket)
            file = writer.add_program(f"{_PLAIN}-{bucket}.stablehlo", data)
            programs = {bucket: device.deserialize_program(data)}
            replicas = [device.Replica(d, signature, programs, model.params) for d in targets]
            errors = verify_bucket(
                spec,
                signature,
                bucket,
                replicas[0],
                program,
                golden,
                probes,
                buffers,
                options.precision.tolerance,
            )
            profile = device.measure_profile(replicas[0], golden, buffers)
            entries.append(
                ProgramEntry(
                    bucket=bucket,
                    form=_PLAIN,
                    file=file,
                    precision=options.precision.name,
                    max_error=errors,
                    seconds={kind: profile.seconds_of(bucket)},
                )
            )
            if on_bucket is not None:
                on_bucket(bucket, number, len(ladder.buckets))
    return entries


def _provenance() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("flax", "jaxlib")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
        versions["xlarank"] = importlib.metadata.version("xlarank")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "python": platform.python_version(), "jax": jax.__version__, **versions}
