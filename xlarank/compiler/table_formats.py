"""Row formats of a model's tables, as small as the error budget allows: `find_formats`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from xlarank.compiler.golden_set import Judgement
from xlarank.device import ScoreError
from xlarank.host import encode_rows
from xlarank.spec import ModelSpec, Precision, PrecisionPolicy, RowFormat, TableSpec

__all__ = [
    "Formats",
    "TableChoice",
    "choose_formats",
    "find_formats",
    "holds",
    "smaller_formats",
    "with_formats",
]

Formats = Mapping[str, RowFormat]
"""By table name."""

_MOST_EXACT_FIRST = (RowFormat.FLOAT16, RowFormat.BFLOAT16, RowFormat.INT8, RowFormat.INT4)

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

_LARGEST = {
    RowFormat.FLOAT16: float(np.finfo(np.float16).max),
    RowFormat.BFLOAT16: _LARGEST_FLOAT32 * (2 - 2**-7) / 2,
    # From the smallest value of a row to its largest is a float32, rounded.
    RowFormat.INT8: 0.499 * _LARGEST_FLOAT32,
    RowFormat.INT4: 0.499 * _LARGEST_FLOAT32,
}
"""Absolute value up to which a format holds every row."""

_MARGIN = 0.9
"""Of the budget for formats that are found: they are tried by the compiler and proven without it."""

_SHARE_BESIDE_MATMULS = 0.5
"""Of the budget, where matmuls may be lowered too: their scores are held to the whole, tables included."""


@dataclasses.dataclass(frozen=True)
class TableChoice:
    """The row formats of a model's tables, and what they cost."""

    formats: Formats
    """Of every table."""

    errors: Mapping[str, ScoreError]
    """By task: of the reference scores with these tables, against those with float32 tables."""

    auc_loss: Mapping[str, float]
    """By binary task with labels of both classes: AUC with float32 tables minus AUC with these."""

    note: str = ""
    """Why a table may be in a larger format than it could; may be empty."""

    @property
    def is_smaller(self) -> bool:
        """Whether any table isn't float32."""
        return any(row_format is not RowFormat.FLOAT32 for row_format in self.formats.values())

    def __str__(self) -> str:
        """How many tables are in each format, in words."""
        counts = collections.Counter(self.formats.values())
        return ", ".join(f"{counts[f]} of {len(self.formats)} in {f}" for f in RowFormat if f in counts)


def with_formats(spec: ModelSpec, formats: Formats) -> ModelSpec:
    """The spec with its tables in these formats; tables that aren't named keep theirs."""
    tables = (dataclasses.replace(t, dtype=formats.get(t.name, t.dtype)) for t in spec.tables)
    return dataclasses.replace(spec, tables=tuple(tables))


def smaller_formats(table: TableSpec, largest: float) -> list[RowFormat]:
    """Formats worth a try for a float32 table, smallest first.

    Args:
      table: its spec.
      largest: absolute value in it; beyond float16 bfloat16 takes that one's place, beyond others none.

    Returns:
      Formats whose rows are smaller than those of every more exact one.
    """
    found: list[RowFormat] = []
    least = RowFormat.FLOAT32.row_bytes(table.dim)
    for row_format in _MOST_EXACT_FIRST:
        if largest <= _LARGEST[row_format] and row_format.row_bytes(table.dim) < least:
            least = row_format.row_bytes(table.dim)
            found.insert(0, row_format)
    return found


def choose_formats(
    candidates: Mapping[str, Sequence[RowFormat]],
    fits: Callable[[Formats], bool],
    is_time_up: Callable[[], bool],
) -> dict[str, RowFormat]:
    """The smallest formats that fit, found greedily: the tables named first have the first claim.

    Tables are tried together; a group that doesn't fit in its smallest formats is halved, so that a few
    trials settle many tables that fit.

    Args:
      candidates: formats by table, at least one each, smallest first; the largest table comes first.
      fits: whether scores are good enough with these formats, the other tables in float32.
      is_time_up: asked before each trial.

    Returns:
      Formats of the tables that may be in a smaller one than float32.
    """
    chosen: dict[str, RowFormat] = {}

    def settle(group: Sequence[str]) -> None:
        alone = len(group) == 1
        for rank in range(len(candidates[group[0]]) if alone else 1):
            tried = chosen | {name: candidates[name][rank] for name in group}
            if is_time_up():
                return
            if fits(tried):
                chosen.update(tried)
                return
        if not alone:
            middle = len(group) // 2
            settle(group[:middle])
            settle(group[middle:])

    if candidates:
        settle(list(candidates))
    return chosen


def find_formats(
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    policy: PrecisionPolicy,
    judge: Callable[[Formats], Judgement],
    *,
    start: Formats | None,
    unlabelled: Sequence[str],
    is_time_up: Callable[[], bool],
) -> tuple[Formats, str]:
    """Formats of every table, by what was asked for.

    Args:
      spec: the author's: a format other than float32 stays as it is stated, unless the policy names one.
      tables: [R, D] float32 by name.
      policy: what was asked for, and the budget.
      judge: scores the golden requests with these formats.
      start: of an earlier version of the model, taken if they hold for these weights too.
      unlabelled: binary tasks whose AUC loss can't be known.
      is_time_up: asked before each trial.

    Returns:
      The formats, and why some table may be larger than need be; only those that were found are within the
      budget for sure.

    Raises:
      ConfigError: if a row is more than a format holds that was asked for; names the table and the row.
    """
    names = [table.name for table in spec.tables]
    if policy.tables is not None:
        named = dict.fromkeys(names, policy.tables)
        _check_range(named, tables)
        return named, ""
    stated = {table.name: table.dtype for table in spec.tables}
    _check_range(stated, tables)
    free = [table for table in spec.tables if table.dtype is RowFormat.FLOAT32]
    if not free:
        return stated, ""
    if unlabelled:
        return stated, (
            f"tables stay as they are: the golden requests have no labels of both classes for "
            f"{', '.join(unlabelled)}, so the AUC loss of smaller ones can't be known; give labels, or name "
            f"a table precision"
        )

    def fits(found: Formats) -> bool:
        return holds(judge(stated | dict(found)), spec, policy)

    started = {name: (start or {}).get(name, RowFormat.FLOAT32) for name in (table.name for table in free)}
    smaller = {name for name, row_format in started.items() if row_format is not RowFormat.FLOAT32}
    still_holds = all(_largest(tables[name]) <= _LARGEST[started[name]] for name in smaller)
    if start is not None and still_holds and (not smaller or (not is_time_up() and fits(started))):
        return stated | started, ""
    free.sort(key=lambda table: -table.num_rows * table.dim)
    candidates = {table.name: smaller_formats(table, _largest(tables[table.name])) for table in free}
    candidates = {name: formats for name, formats in candidates.items() if formats}
    chosen = choose_formats(candidates, fits, is_time_up)
    note = "time was up before smaller formats of every table were tried" if is_time_up() else ""
    return stated | chosen, note


def holds(judgement: Judgement, spec: ModelSpec, policy: PrecisionPolicy) -> bool:
    """Whether scores with smaller tables leave enough of the budget."""
    share = _MARGIN * (1.0 if policy.precision is Precision.FLOAT32 else _SHARE_BESIDE_MATMULS)
    for task in spec.tasks:
        # What the compiler may change by itself counts too: a budget that small leaves tables in float32.
        limit = share * policy.budget.max_score_error - policy.tolerance.of(task.kind)
        error = judgement.budget_errors[task.name]
        if not (error.p99 <= limit and np.isfinite(error.max)):
            return False
        if not judgement.auc_loss.get(task.name, 0.0) <= share * policy.budget.max_auc_loss:
            return False
    return True


def _check_range(formats: Formats, tables: Mapping[str, np.ndarray]) -> None:
    """Refuses rows that their formats can't hold, those that no golden request reads too."""
    for name, row_format in formats.items():
        if row_format is not RowFormat.FLOAT32 and _largest(tables[name]) > _LARGEST[row_format]:
            encode_rows(tables[name], row_format, where=f"table {name!r}")


def _largest(table: np.ndarray) -> float:
    """Largest absolute value of a table, without a copy of it."""
    return float(max(table.max(), -table.min()))
