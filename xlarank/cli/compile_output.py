"""What `xlarank compile` prints: `show`, `explain`, `facts_of`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from xlarank.compiler import BuildResult
from xlarank.compiler.autotune import Choice
from xlarank.compiler.result import BucketResult, PassNotes
from xlarank.spec import Bucket, Precision, RowFormat
from xlarank.spec.wording import counted

__all__ = ["explain", "facts_of", "show"]


def facts_of(result: BuildResult) -> dict[str, Any]:
    """The result as JSON values."""
    manifest, tuning = result.manifest, result.tuning
    held = {placement.table: placement.num_rows for placement in manifest.placements}
    return {
        "path": str(result.path),
        "model": manifest.spec.name,
        "version": manifest.version,
        "reused_version": result.reused,
        "parameters": result.analysis.num_parameters,
        "flops_per_row": result.analysis.flops_per_row,
        "unused_features": list(manifest.unused_features),
        "param_bytes": tuning.param_bytes,
        "prepared_bytes": tuning.total_prepared_bytes,
        "dropped_buckets": [_bucket_facts(bucket) for bucket in tuning.dropped],
        "precision_note": tuning.precision_note,
        "tables": {
            table.name: {
                "format": table.dtype.value,
                "bytes": table.num_bytes,
                "device_rows": held.get(table.name, 0),
                "float32_bytes": table.num_rows * RowFormat.FLOAT32.row_bytes(table.dim),
            }
            for table in manifest.spec.tables
        },
        "table_errors": {task: dataclasses.asdict(e) for task, e in manifest.table_errors.items()},
        "table_note": result.tables.note,
        "note": result.note,
        "buckets": [
            {
                **_bucket_facts(found.bucket),
                "form": str(found.form),
                "precision": found.form.precision.value,
                "seconds": dict.fromkeys(manifest.programs[0].seconds, found.seconds),
                "plain_seconds": choice.plain_seconds,
                "chosen_seconds": choice.seconds_of(found.form),
                "reason": choice.reason,
                "tried": [
                    {"form": trial.form.label, "seconds": trial.seconds, "refusal": trial.refusal}
                    for trial in choice.trials
                ],
                "max_error": {task: error.max for task, error in found.judgement.errors.items()},
                "p99_error": {task: error.p99 for task, error in found.judgement.errors.items()},
                "budget_p99_error": {t: error.p99 for t, error in found.judgement.budget_errors.items()},
                "auc_loss": dict(found.judgement.auc_loss),
                "limit": tuning.limits.limit_of(found.cost)[0].value,
                "flops": found.cost.flops,
            }
            for found, choice, _ in result.by_bucket
        ],
    }


def _bucket_facts(bucket: Bucket) -> dict[str, int]:
    return {"rows": bucket.rows, "requests": bucket.requests}


def show(result: BuildResult, console: Console) -> None:
    """Prints a row a bucket: what was tried and chosen, the time before and after, the error."""
    manifest, tuning = result.manifest, result.tuning
    tasks = [task.name for task in manifest.spec.tasks]
    table = Table(title=f"{manifest.spec.name} version {manifest.version}: {result.path}")
    table.add_column("bucket", justify="right")
    table.add_column("form")
    for name in ("plain ms", "chosen ms", "gain", "published ms", "rows/s", *(f"error {t}" for t in tasks)):
        table.add_column(name, justify="right")
    table.add_column("tried (ms)", overflow="fold")
    for found, choice, _ in result.by_bucket:
        table.add_row(*_cells(found, choice, tasks))
    console.print(table)
    for line in _remarks(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if tuning.dropped:
        buckets = ", ".join(str(bucket) for bucket in tuning.dropped)
        line = f"not compiled, as the bucket with more requests is as fast: {buckets}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(found: BucketResult, choice: Choice, tasks: list[str]) -> list[str]:
    before, after = choice.plain_seconds, choice.seconds_of(found.form)
    gain = "-" if before is None or after is None else f"{before / after:.2f}x"
    tried = ", ".join(_trial_text(trial) for trial in choice.trials if trial.form != found.form)
    lowered = found.form.precision is not Precision.FLOAT32
    judged = found.judgement.budget_errors if lowered else found.judgement.errors
    errors = [judged[task] for task in tasks]
    return [
        str(found.bucket),
        found.form.label,
        "-" if before is None else f"{before * 1e3:.3f}",
        "-" if after is None else f"{after * 1e3:.3f}",
        gain,
        f"{found.seconds * 1e3:.3f}",
        f"{found.bucket.rows / found.seconds:,.0f}",
        *(f"{e.p99:.0e} p99, {e.max:.0e}" if lowered else f"{e.max:.0e}" for e in errors),
        tried or choice.reason,
    ]


def _trial_text(trial: Any) -> str:
    refused = " refused" if trial.refusal else ""
    return f"{trial.form.label.replace(', ', '+')} {trial.seconds * 1e3:.3f}{refused}"


def _remarks(result: BuildResult) -> list[str]:
    manifest, tuning = result.manifest, result.tuning
    lines = [
        f"weights {tuning.param_bytes / 1e6:.2f} MB, prepared arrays of all buckets "
        f"{tuning.total_prepared_bytes / 1e6:.2f} MB"
    ]
    if result.reused is not None:
        lines.append(
            f"same architecture as version {result.reused}: its programs, forms, times and compiled code "
            f"were reused; scores and rows were proven with the new weights"
        )
    if result.note:
        lines.append(result.note)
    if manifest.unused_features:
        lines.append(f"no score depends on {', '.join(manifest.unused_features)}: not looked up")
    if tuning.precision_note:
        lines.append(tuning.precision_note)
    lines += _table_remarks(result)
    lines += _refusals(result)
    if result.timing_note:
        lines.append(result.timing_note)
    return lines


def _table_remarks(result: BuildResult) -> list[str]:
    """The tables' formats, what they save and what they cost."""
    tables, lines = result.manifest.spec.tables, []
    if result.tables.is_smaller:
        wide = sum(table.num_rows * RowFormat.FLOAT32.row_bytes(table.dim) for table in tables)
        taken = sum(table.num_bytes for table in tables)
        formats = ", ".join(f"{table.name} {table.dtype}" for table in tables)
        lines.append(f"tables {taken / 1e6:.2f} MB, in float32 {wide / 1e6:.2f} MB: {formats}")
        for task, error in result.tables.errors.items():
            loss = result.tables.auc_loss.get(task)
            auc = "" if loss is None else f", AUC loss {loss:+.1e}"
            lines.append(
                f"error of the tables, task {task}: {error.p99:.1e} p99, {error.max:.1e} at most{auc}"
            )
    if result.tables.note:
        lines.append(result.tables.note)
    for placement in result.manifest.placements:
        table = result.manifest.spec.table_by_name[placement.table]
        ids = ", ".join(f"{name} {count}" for name, count in placement.capacities.items())
        lines.append(
            f"table {table.name}: {placement.num_rows:,} of {table.num_rows:,} rows on each device, "
            f"{placement.num_bytes(result.manifest.spec) / 1e6:.2f} MB; ids that it looks up a bag at most: "
            f"{ids}"
        )
    return lines


def _refusals(result: BuildResult) -> list[str]:
    """One line a precision whose scores may not be served, with the first reason."""
    refused: dict[str, list[tuple[Bucket, str]]] = collections.defaultdict(list)
    for _, choice, _ in result.by_bucket:
        for trial in choice.trials:
            if trial.refusal:
                refused[trial.form.precision.value].append((choice.bucket, trial.refusal))
    return [
        f"{precision} was refused in {counted(len({bucket for bucket, _ in found}), 'bucket')}: {found[0][1]}"
        for precision, found in refused.items()
    ]


def explain(result: BuildResult, console: Console) -> None:
    """Prints what runs once a request, each equation that had to expand a context value, why, and its bytes,
    and why a pass did not apply; equal explanations of several buckets once."""
    groups: dict[Any, list[tuple[Bucket, PassNotes]]] = collections.defaultdict(list)
    for found, _, notes in result.by_bucket:
        expansions = tuple((e.operation, e.source, e.reason) for e in notes.expansions)
        reason = _without_sizes(notes.hoist_reason, found.bucket)
        key = (notes.hoist_applies, reason, notes.siblings, notes.sensitive, notes.inside, expansions)
        groups[key].append((found.bucket, notes))
    for members in groups.values():
        _explain_group([bucket for bucket, _ in members], members[-1][1], members[-1][0], console)


def _without_sizes(reason: str, bucket: Bucket) -> str:
    return reason.replace(str(bucket.rows), "B").replace(str(bucket.requests), "Q")


def _explain_group(buckets: list[Bucket], notes: PassNotes, shown: Bucket, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    console.rule(f"buckets {', '.join(str(bucket) for bucket in buckets)}", align="left")
    if not notes.hoist_applies:
        say(f"hoist_context does not apply: {notes.hoist_reason}")
    else:
        if notes.hoist_reason:
            say(f"hoist_context: {notes.hoist_reason}")
        say(f"hoist_context: {counted(len(notes.hoisted), 'operation')} can run once a request:")
        by_source: dict[str, list[str]] = collections.defaultdict(list)
        for operation, source in notes.hoisted:
            by_source[source].append(operation)
        for source, operations in by_source.items():
            say(f"  {', '.join(dict.fromkeys(operations))} at {source}")
    if notes.siblings:
        for count, source in notes.siblings:
            say(f"fuse_experts: {count} sibling matmuls, the first at {source}")
    else:
        say("fuse_experts does not apply: no two matmuls do the same to the same operand with other weights")
    _explain_precision(notes, say)
    if not notes.expansions:
        return
    table = Table(
        title=f"context values repeated for their candidates, in bucket {shown}", title_justify="left"
    )
    for name in ("operation", "shape", "bytes"):
        table.add_column(name)
    table.add_column("why", overflow="fold")
    table.add_column("at", overflow="fold")
    for e in notes.expansions:
        table.add_row(e.operation, str(list(e.shape)), f"{e.num_bytes:,}", e.reason, e.source)
    console.print(table)


def _explain_precision(notes: PassNotes, say: Callable[[str], None]) -> None:
    kept = set(notes.sensitive)
    if all(matmul.source in kept or not matmul.weight_bytes for matmul in notes.before):
        say("lower_precision does not apply: no matmul with weights but those that the scores feel most")
    for source in notes.sensitive:
        say(f"lower_precision leaves in float32, as the scores feel its error most: {source}")
    for source in notes.inside:
        say(f"inside a scan, while or cond, neither merged nor lowered: the matmul at {source}")
