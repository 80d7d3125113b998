"""The step of a build that settles how tables are kept: `settle_tables`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xlarank.compiler.options import BuildOptions
from xlarank.compiler.program import Traces
from xlarank.compiler.reference import reference_scores
from xlarank.compiler.table_formats import Formats, find_formats, with_formats
from xlarank.compiler.table_trial import DecodedTables, TableTrial
from xlarank.host import HostTable, encode_rows
from xlarank.spec import ModelSpec, RankRequest, RowFormat, TaskKind

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["SettledTables", "float32_tables", "requests_of", "settle_tables"]

Scores = Mapping[str, Sequence[np.ndarray]]
"""By task, [N] float32 a request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettledTables:
    """Tables as the bundle will hold them, and all that is made anew for them."""

    spec: ModelSpec
    """The model with the formats."""

    tables: Mapping[str, HostTable | np.ndarray]
    """Encoded; a float32 table is as it was given."""

    requests: Sequence[RankRequest]
    """The golden requests of that spec."""

    scores: Scores
    """Their reference scores with the tables decoded: what programs must reproduce."""

    note: str
    """Why a table may be in a larger format than it could; may be empty."""


def float32_tables(spec: ModelSpec) -> ModelSpec:
    """The model as it was trained."""
    return with_formats(spec, dict.fromkeys(spec.table_by_name, RowFormat.FLOAT32))


def requests_of(spec: ModelSpec, requests: Sequence[RankRequest]) -> list[RankRequest]:
    """The same requests for a spec that differs in its tables' formats alone, if at all."""
    if all(request.spec == spec for request in requests):
        return list(requests)
    names = [feature.name for feature in spec.features]
    return [RankRequest(spec, dict(zip(names, request.columns, strict=True))) for request in requests]


def settle_tables(
    traces: Traces,
    stated: ModelSpec,
    tables: Mapping[str, np.ndarray],
    requests: Sequence[RankRequest],
    scores: Scores,
    labels: Mapping[str, np.ndarray],
    options: BuildOptions,
    *,
    target: Device,
    start: Formats | None,
    labelled: Sequence[str],
    clock: Callable[[], float] = time.monotonic,
) -> SettledTables:
    """Finds the tables' formats, encodes them, and scores the golden requests with them.

    Args:
      traces: of the model with float32 tables.
      stated: the author's spec.
      tables: [R, D] float32 by name.
      requests: golden ones, of the spec of `traces`.
      scores: their reference scores with float32 tables.
      labels: [rows of all golden requests] by task.
      options: the policy, and the time for trying formats.
      target: the device to try on.
      start: formats of an earlier version; None without one.
      labelled: tasks with labels of both classes.
      clock: seconds, monotonic.
    """
    policy, deadline = options.policy, clock() + options.tune_seconds
    decoded = DecodedTables(traces.spec, tables, requests)

    @functools.cache
    def trial() -> TableTrial:
        return TableTrial(traces, decoded, requests, scores, labels, policy, target)

    formats, note = find_formats(
        stated,
        tables,
        policy,
        lambda formats: trial().judge(formats),
        start=start,
        unlabelled=[t.name for t in stated.tasks if t.kind is TaskKind.BINARY and t.name not in labelled],
        is_time_up=lambda: clock() >= deadline,
    )
    spec = with_formats(stated, formats)
    if spec == traces.spec:
        return SettledTables(spec=spec, tables=tables, requests=requests, scores=scores, note=note)
    decoded.set(formats)
    return SettledTables(
        spec=spec,
        tables={name: _encoded(name, table, formats[name]) for name, table in tables.items()},
        requests=requests_of(spec, requests),
        scores=reference_scores(traces.model.reference, traces.spec, decoded.tables, requests),
        note=note,
    )


def _encoded(name: str, table: np.ndarray, row_format: RowFormat) -> HostTable | np.ndarray:
    if row_format is RowFormat.FLOAT32:
        return table
    return encode_rows(table, row_format, where=f"table {name!r}")
