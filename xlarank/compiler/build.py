"""From a model and its tables to a proven bundle on disk: `build_bundle`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from xlarank import device
from xlarank.bundle import BundleWriter
from xlarank.compiler.builder import Builder, Progress
from xlarank.compiler.golden import random_requests
from xlarank.compiler.options import BuildOptions, check_arguments, checked_labels
from xlarank.compiler.placement import PlacementPolicy
from xlarank.compiler.result import BuildResult
from xlarank.compiler.split import Apply, DenseModel, split_function, split_module
from xlarank.compiler.tables import float32_tables
from xlarank.errors import ConfigError, ModelError
from xlarank.host import check_tables
from xlarank.spec import (
    DEFAULT_ROWS,
    ErrorBudget,
    ModelSpec,
    PrecisionPolicy,
    Ragged,
    RankRequest,
)

__all__ = ["build", "build_bundle"]


def build_bundle(
    model: nnx.Module | Apply,
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    *,
    out: str | os.PathLike[str],
    params: Any = None,
    version: int | None = None,
    buckets: Iterable[int] | None = None,
    golden: Sequence[RankRequest] | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    precision: str = "auto",
    table_precision: str = "auto",
    table_placement: str = "auto",
    device_table_bytes: int | None = None,
    placement_trace: Sequence[RankRequest] | Mapping[str, np.ndarray | Ragged] | None = None,
    max_score_error: float = 2e-3,
    max_auc_loss: float = 5e-4,
    tune_seconds: float = 30.0,
) -> Path:
    """Compiles a model for every bucket, proves it and publishes a bundle.

    Args:
      model: any nnx.Module, put in evaluation mode, or a plain function ``apply(params, features)`` of JAX
        operations: activations by feature name in, logits [B] by task name out.
      spec: its features, tables and tasks, fitted.
      tables: [R, D] float32 by table name.
      out: the repository folder; the bundle is ``<out>/<spec.name>/<version>``.
      params: of a plain function, any pytree of arrays; None for a module.
      version: ascending integer; one above the highest there by default.
      buckets: row counts to compile for, `DEFAULT_ROWS` by default.
      golden: requests to prove the scores with, at compile time and at every load; random valid ones by
        default.
      labels: [rows of all golden requests] float32 by task, NaN where unknown.
      precision: "float32", "bfloat16", "float16", "int8", or "auto": the fastest that keeps to the budget of
        `xlarank.spec.ErrorBudget`; without labels of every binary task its AUC loss can't be known, and
        "auto" is float32.
      table_precision: "float32", "float16", "bfloat16", "int8" or "int4" for all tables, or "auto": by table
        the smallest that keeps to the budget, float32 without labels of every binary task; a table whose
        spec states another format than float32 keeps that.
      table_placement: "host", "device" (all rows of all tables), "split" (the rows that the golden requests
        read most), or "auto": on accelerators what fits, on CPUs "host". The host keeps every row.
      device_table_bytes: most bytes of table rows on a device; half of its memory by default.
      placement_trace: which rows are read most, in place of the golden requests: other requests; or by table
        name how often each row is read, [R] integers, or bags of row numbers, as
        `xlarank.host.traces.read_trace` gives them.
      max_score_error: of a lower precision and smaller tables together: 99th percentile over golden rows of
        the difference from the reference score.
      max_auc_loss: likewise, on labelled golden rows.
      tune_seconds: most time to spend on trying forms, and on trying formats of tables.

    Returns:
      The bundle's folder, ready for ``Engine.load``.

    Raises:
      ConfigError: if spec, tables, labels or buckets are wrong.
      ModelError: if the model can't be compiled, or lets rows touch each other; names the operation.
      VerifyError: if compiled scores leave the tolerance or the budget.
      BundleError: if the version exists.
    """
    device.configure()
    rows = DEFAULT_ROWS if buckets is None else tuple(buckets)
    options = BuildOptions(
        version=version,
        bucket_rows=rows,
        policy=PrecisionPolicy.named(
            precision, ErrorBudget(max_score_error, max_auc_loss), tables=table_precision
        ),
        placement=PlacementPolicy.named(table_placement, device_table_bytes, placement_trace),
        tune_seconds=tune_seconds,
    )
    return build(
        model, spec, tables, out=Path(out), params=params, options=options, golden=golden, labels=labels
    ).path


def build(
    model: nnx.Module | Apply,
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    *,
    out: Path,
    options: BuildOptions,
    params: Any = None,
    golden: Sequence[RankRequest] | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    on_progress: Progress = lambda _text, _done, _total: None,
) -> BuildResult:
    """`build_bundle` with every option.

    Args:
      model: see `build_bundle`, as for the next two, `params`, `golden` and `labels`.
      spec: fitted.
      tables: float32 by name.
      out: repository folder.
      options: how.
      params: of a plain function.
      golden: requests to prove with.
      labels: of the golden requests.
      on_progress: see `Progress`.
    """
    check_arguments(spec, tables, golden)
    if options.keep_failed is not None and options.keep_failed.resolve() == out.resolve():
        raise ConfigError(f"keep_failed: expected another folder than {out}, which is served from")
    spec.check_fitted()
    check_tables(float32_tables(spec), tables)
    given = golden if golden is not None else random_requests(spec)
    checked = checked_labels(spec, given, labels)
    requests = [request for request in given if request.num_candidates]
    if not requests:
        raise ConfigError(f"model {spec.name!r}: expected golden requests with candidates, got none")
    dense = _split(model, spec, params)
    with BundleWriter(out, spec.name, options.version) as writer:
        builder = Builder(dense, spec, tables, requests, checked, options, on_progress)
        return builder.build(out, writer)


def _split(model: nnx.Module | Apply, spec: ModelSpec, params: Any) -> DenseModel:
    try:
        if isinstance(model, nnx.Module) or not callable(model):
            return split_module(model)  # type: ignore[arg-type]
        return split_function(model, params)
    except ModelError as error:
        raise ModelError(f"model {spec.name!r}: {error}") from error
