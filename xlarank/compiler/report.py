"""report.html of a bundle: what was built, proven and measured, for a person."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from xlarank.bundle import Manifest
from xlarank.compiler.analyze import Analysis

__all__ = ["render_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #1d2733 }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
p.lead { color: #5a6775; margin-top: .2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e3e8ee }
th:first-child, td:first-child { text-align: left } th { color: #5a6775; font-weight: 600 }
td.bar { width: 30% } td.bar div { background: #3b82c4; height: .8rem; border-radius: 2px; min-width: 1px }
code { font-size: .85em; overflow-wrap: anywhere }
"""


def render_report(manifest: Manifest, analysis: Analysis) -> str:
    """A self-contained page: sizes, cost by layer and table, time and error by bucket, provenance.

    Args:
      manifest: with programs and their measured seconds.
      analysis: of the same model.
    """
    spec = manifest.spec
    tolerance = manifest.tolerance
    parts = [
        f"<h1>{html.escape(spec.name)}</h1>",
        f"<p class=lead>{analysis.num_parameters:,} dense parameters, "
        f"{analysis.flops_per_row / 1e6:.3g} MFLOP a candidate, {len(spec.features)} features, "
        f"{_bytes(sum(t.num_bytes for t in analysis.tables))} of embedding tables; "
        f"tasks {html.escape(', '.join(task.name for task in spec.tasks))}</p>",
        "<h2>Buckets</h2>",
        f"<p>Median of a full batch. Scores were proven against the op-by-op Flax reference at fills of 1, "
        f"2, half, full - 1 and full rows; allowed: {tolerance.probability:g} on probabilities, "
        f"{tolerance.regression:g} relative on regressions.</p>",
    ]
    for kind, profile in manifest.latency.items():
        slowest = max(profile.seconds.values())
        rows = [
            (
                str(entry.bucket.rows),
                str(entry.bucket.requests),
                f"{entry.seconds[kind] * 1e3:.3f}",
                f"{entry.bucket.rows / entry.seconds[kind]:,.0f}",
                *(f"{entry.max_error[task.name]:.1e}" for task in spec.tasks),
                f"{entry.form}, {entry.precision}",
                _Bar(entry.seconds[kind] / slowest),
            )
            for entry in manifest.programs
        ]
        errors = [f"error {task.name}" for task in spec.tasks]
        parts.append(
            f"<p>Device kind <code>{html.escape(kind)}</code>, knee at {profile.knee_rows()} rows</p>"
        )
        parts.append(_table(["rows", "requests", "ms", "rows/s", *errors, "form", ""], rows))
    parts += [
        "<h2>Matrix multiplications</h2>",
        _table(
            ["source", "count", "shapes at 32 rows", "kFLOP a row", "right-hand bytes"],
            [
                (m.source, str(m.count), m.shapes, f"{m.flops / 1e3:,.1f}", _bytes(m.weight_bytes))
                for m in analysis.matmuls
            ],
        ),
        "<h2>Layers</h2>",
        _table(
            ["layer", "parameters", "bytes"],
            [(x.name, f"{x.num_parameters:,}", _bytes(x.num_bytes)) for x in analysis.layers],
        ),
        "<h2>Embedding tables</h2>",
        _table(
            ["table", "rows", "dim", "bytes", "ids a request", "ids a candidate"],
            [
                (
                    t.name,
                    f"{t.rows:,}",
                    str(t.dim),
                    _bytes(t.num_bytes),
                    f"{t.lookups_per_request:.1f}",
                    f"{t.lookups_per_candidate:.1f}",
                )
                for t in analysis.tables
            ],
        ),
        "<h2>Provenance</h2>",
        _table(["", ""], [*manifest.provenance.items(), *manifest.fingerprint.items()]),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(spec.name)}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


class _Bar(float):
    """A share in [0, 1], drawn."""


def _table(header: Sequence[str], rows: Iterable[Sequence[str | _Bar]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: str | _Bar) -> str:
    if isinstance(cell, _Bar):
        return f'<td class=bar><div style="width:{cell:.1%}"></div></td>'
    return f"<td>{html.escape(cell)}</td>"


def _bytes(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
